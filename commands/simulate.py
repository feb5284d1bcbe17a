"""The command that predicts one schedule.

Modelled: its options and what it prints. Ignored: the prediction itself (`sim/`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_prediction
from ..text_files import check_outputs
from .artefacts import write_perfetto
from .options import (
    DenseBitsOption,
    HardwareOption,
    JsonFlag,
    MemoryOption,
    ModelOption,
    SetOption,
    TraceOption,
    WindowOption,
    complete_schedule,
    model_file,
    rehearse,
)
from .settings import print_settings, split_settings


def simulate(
    model: ModelOption,
    hardware: HardwareOption,
    trace: TraceOption,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule", help="Preset to start from (moeplan schedule list).", autocompletion=complete_schedule
        ),
    ] = "mixtral-offloading",
    settings: SetOption = None,
    memory: MemoryOption = None,
    window: WindowOption = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Engine that runs it: twin, simpy, or both (compared).")
    ] = "twin",
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Write a Perfetto timeline (.json).")] = None,
    dense_bits: DenseBitsOption = "16",
    as_json: JsonFlag = False,
) -> None:
    """Predict one schedule on one recording and one machine."""
    from ..errors import UnknownName
    from ..planner.plan import prediction_to_dict
    from ..presets import load_preset
    from ..schedule import apply_settings, parse_setting

    check_outputs({"--timeline": timeline}, {"--model": model_file(model), "--hardware": hardware, "--trace": trace})
    if engine not in ("twin", "simpy", "both"):
        raise UnknownName("--engine", engine, ("twin", "simpy", "both"))
    changes = split_settings(settings)
    chosen = apply_settings(load_preset(schedule), dict(parse_setting(text) for text in changes.schedule))
    chosen = dataclasses.replace(chosen, workload=changes.changed_request(chosen.workload))
    rehearsal = rehearse(model, hardware, trace, memory, window, dense_bits, changes)
    prediction = rehearsal.predict(chosen, engine=engine, rows=timeline is not None)
    if timeline is not None:
        write_perfetto(timeline, rehearsal, prediction)
    document = prediction_to_dict(prediction) | {"set_by_user": changes.made}
    if as_json:
        print_json(document)
    else:
        print_prediction(document)
        print_settings(document)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(simulate)
