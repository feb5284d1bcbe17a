"""The command that shows everything once: a question answered without measuring, then a small model on this machine's cores.

Modelled: the question first, in seconds, on a page of its own and in the report; then, with torch, this machine is measured a
little, the small model is planned for a small part of its memory, and the chosen schedule and two rivals are run for real beside
their predictions. In a clone, with transformers, the model itself generates text; an installed package brings its recording alone, which
is replayed. Without torch, the plan is for a published machine and nothing is run. Ignored: other models and machines;
`simulate`, `calibrate`, `plan`, `run` and `validate` take them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.terminal import print_json, print_plan, print_validation
from ..base.text_files import check_outputs, output_folder, write_atomic
from .options.declarations import JsonFlag
from .parts import own_model
from .parts.artefacts import write_offload_report, write_perfetto
from .parts.first_question import first_answer

if TYPE_CHECKING:
    from ..executor.validation.validated import Validation

DEMO_MODEL = "tiny-moe"
DEMO_WINDOW = 2000
# Without torch: a published machine, and a budget of which its runtime takes the larger part.
DEMO_HARDWARE, DEMO_MEMORY = "t4", "436MiB"
# On this machine's cores: about half of the experts fit.
DEMO_CPU_MEMORY = "48MiB"
_CALIBRATE_SECONDS = 12.0
_RUN_STEPS, _REPEATS, _RIVALS = 48, 5, 2
_NEW_TOKENS = 24


def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan, the report and the timeline.")
    ] = Path("out/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Answer a question without measuring; then measure this CPU, plan a small model, run it, and report how far off that was."""
    output_folder(folder, "--output")
    paths = {
        "answer": folder / "answer.html",
        "plan": folder / "plan.json",
        "report": folder / "report.html",
        "timeline": folder / "timeline.json",
    }
    runs = importlib.util.find_spec("torch") is not None
    if runs:
        paths |= {"profile": folder / "cpu.json", "validation": folder / "validation.json"}
    check_outputs({f"--output: {path.name}": path for path in paths.values()})
    answer = first_answer()
    write_atomic(paths["answer"], answer.page())
    if not as_json:
        typer.echo("\n".join([*answer.lines(), f"  page: {paths['answer']}", ""]))
        sys.stdout.flush()  # it is read while the rest runs
    with tempfile.TemporaryDirectory(prefix="moeplan-") as place:
        own = own_model.checkpoint(Path(place)) if runs and own_model.available() else None
        _planned_and_run(paths, answer, own, as_json)


def _planned_and_run(paths: dict[str, Path], answer: Any, own: Path | None, as_json: bool) -> None:
    """Measure this machine, plan, run, and write and print what came of it; `own`: a checkpoint of the small model."""
    from ..api.plan import plan
    from ..base.progress import reporter

    runs = "profile" in paths
    if runs:
        _calibrate(paths["profile"])
        machine, memory, dense_bits = str(paths["profile"]), DEMO_CPU_MEMORY, "32"
    else:
        sys.stderr.write("demo: torch is not installed, so nothing is run; pip install 'moeplan[run]'\n")
        machine, memory, dense_bits = DEMO_HARDWARE, DEMO_MEMORY, "16"
    found = plan(DEMO_MODEL, machine, trace="bundled", memory=memory, window=DEMO_WINDOW, dense_bits=dense_bits,
                 progress=reporter("demo: plan"))  # fmt: skip
    document, simulation = found.to_dict(), found.simulation
    write_atomic(paths["plan"], json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_perfetto(paths["timeline"], simulation, found.best)
    measured, section = _run(document, simulation, own) if runs else (None, None)
    if measured is not None:
        write_atomic(paths["validation"], json.dumps(measured, indent=1, allow_nan=False) + "\n")
    write_offload_report(
        paths["report"], document, simulation, found.best,
        more_sections=(*(() if section is None else (section,)), answer.section()),
    )  # fmt: skip
    if as_json:
        print_json(
            _figures(document, measured)
            | {"question": answer.to_dict()}
            | {name: str(path) for name, path in paths.items()}
        )
        return
    print_plan(document, str(paths["plan"]))
    if measured is not None:
        print_validation(measured)
        for text in measured["generated"]:
            typer.echo(f"  generated {text!r}, the same under every schedule")
        for line in measured["learnt"]:
            typer.echo(f"  learnt    {line}")
    typer.echo(f"report    {paths['report']}\ntimeline  {paths['timeline']} (open it in Perfetto)")


def _calibrate(path: Path) -> None:
    """Measure this machine with the demo's own shapes and write its profile."""
    from ..base.progress import reporter
    from ..executor.calibration.calibrate import calibrate_device
    from ..specs.models.load import load_model

    model = load_model(DEMO_MODEL)
    calibrate_device(
        "cpu", quick=True, models=[model], bits=(model.native_bits,), out=path, seconds=_CALIBRATE_SECONDS,
        progress=reporter("demo: calibrate"),
    )  # fmt: skip


def _run(document: dict[str, Any], simulation: Any, own: Path | None) -> tuple[dict[str, Any], Any]:
    """Return the figures of running the plan and its rivals, and the report's section about them.

    own: a checkpoint of the small model, which then runs itself; None: its recording is replayed.
    """
    from ..base.progress import reporter
    from ..reports.validation.page import predicted_measured_section

    found: Validation
    if own is not None:
        from ..api.model_validation import validate_checkpoint

        found = validate_checkpoint(
            document, own, own_model.texts(own), max_new_tokens=_NEW_TOKENS, baselines=_RIVALS, repeats=_REPEATS,
            trace="bundled", gates=own_model.gates(), progress=reporter("demo: run"),
        )  # fmt: skip
    else:
        from ..api.load import as_routing
        from ..executor.validation.validate_plan import validate_plan

        found = validate_plan(
            document, simulation.model, as_routing("bundled"), profile=simulation.profile, num_baselines=_RIVALS,
            steps=_RUN_STEPS, repeats=_REPEATS, check_drift=False, progress=reporter("demo: run"),
        )  # fmt: skip
    measured = found.to_dict() | found.best_to_dict()
    measured |= {
        "generated": [bytes(ids).decode("utf-8", "replace") for ids in found.generated],
        "learnt": own_model.learnt(measured["configurations"]),
    }
    predicted, observed = found.timelines()
    return measured, predicted_measured_section(measured, predicted=predicted, measured=observed)


def _figures(document: dict[str, Any], measured: dict[str, Any] | None) -> dict[str, Any]:
    """Return the demo's headline: the best schedule's decode speed, predicted and, where it ran, measured."""
    name = "decode_tokens_per_s"
    if measured is None:
        return {f"predicted_{name}": document["best"][name], f"measured_{name}": None, "relative_error": None}
    return {
        f"predicted_{name}": measured["predicted"][name], f"measured_{name}": measured["measured"][name],
        "relative_error": measured["relative_error"], "counts_equal": measured["counts_equal"],
    }  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(demo)
