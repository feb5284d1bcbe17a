"""`moeplan calibrate`: measure this machine, or take over what another tool measured of one, and write its profile.

Modelled: the options, and what is printed and written. Ignored: measuring (`calibrate/`, `executor/`), which needs torch and is
imported only when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import InputError, UnknownName
from ..base.terminal import print_calibration, print_json
from ..base.text_files import check_outputs
from ..base.units import GIGA, MEGA, parse_quantity
from .options.bounds import WEEK_S, between
from .options.conditions import ConditionedCommand
from .options.declarations import (
    EngineOption,
    JsonFlag,
    QuantOption,
    UbatchOption,
    model_file,
)
from .options.device import (
    DeviceOption,
    TextsOption,
    TogetherOption,
    numbered,
)
from .options.lengths import PromptOption, ReplyOption
from .parts.own_speeds import SPEED_TOOLS, Named, learn_speeds, print_learned

if TYPE_CHECKING:
    from ..executor.calibration.calibrate import Calibration
    from ..executor.calibration.rank_runs import RankExtent

_KERNELS = "aiconfigurator"
_LEAST_LINK, _MOST_LINK = MEGA, 100 * GIGA
_CALIBRATED_BITS = {"cpu": "32,16,4", "cuda": "16,4"}


def calibrate(
    file: Annotated[
        Path | None, typer.Argument(help="with --from: what the tool wrote (aiconfigurator needs none).", metavar="[FILE]")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="profile.json to write.")] = Path("profile.json"),
    device: DeviceOption = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, about a minute.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            help="Also measure steps of so many ranks, processes of this machine that exchange tokens: for expert-parallel plans.",
            callback=between(2, 64, "ranks"),
        ),
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes",
            help="with --ranks: nodes that they are in; two are network namespaces with a limited link between where the system permits.",
            callback=between(1, 32, "nodes"),
        ),
    ] = 1,
    link: Annotated[
        str | None, typer.Option("--link", help="with --nodes: rate of the link between nodes, one direction; default 20MB/s.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Measure this model's shapes instead of the standard ones; with --from llama-bench or vllm-bench: the model of the "
            "lines that count, where the file does not say it well enough.",
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option("--bits", help="Weight formats of experts; default 32,16,4 on a CPU, 16,4 on a GPU.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="File of raw samples; default: the profile's, with .samples.json.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            help="About how long it may take, in seconds; default: as long as every part needs.",
            callback=between(1.0, WEEK_S, "seconds"),
        ),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--from", help="Take over what was measured elsewhere, from FILE: links of nvbandwidth or nccl-tests; speeds of "
                     "llama-bench or vllm-bench, which move what is believed of a machine. Or aiconfigurator: kernels of a datacentre "
                     "card, from the tables of the installed wheel aiconfigurator-core.", metavar="TOOL"),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="with --from and a FILE: the machine whose constants are replaced or moved.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="with --from aiconfigurator: which of its systems, e.g. h200_sxm.")
    ] = None,
    quant: QuantOption = None,
    engine: EngineOption = None,
    prompt_tokens: PromptOption = None,
    reply_tokens: ReplyOption = None,
    concurrency: TogetherOption = None,
    ubatch: UbatchOption = None,
    text: TextsOption = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Measure this machine, or take over what another tool measured, and write its profile."""
    from ..base.progress import reporter

    check_outputs(
        {"--output": output, "--samples": samples or output.parent / f"{output.stem}.samples.json"},
        {
            "--model": None if model is None else model_file(model),
            "FILE": file,
            "--hardware": hardware,
        }
        | numbered("text", text),
    )
    if tool == _KERNELS:
        from ..calibrate.imports.aiconfigurator.profile import import_kernels

        document = import_kernels(system, output, engine=engine, progress=reporter("fit"))
    elif tool in SPEED_TOOLS:
        named = Named(
            tool=tool, path=_file(tool, file), hardware=hardware, model=model, quant=quant, engine=engine, prompt_tokens=prompt_tokens,
            reply_tokens=reply_tokens, concurrency=concurrency, ubatch=ubatch,
        )  # fmt: skip
        learned = learn_speeds(named, output)
        if as_json:
            print_json(learned)
        else:
            print_learned(learned)
        return
    elif tool is not None:
        document = _imported(tool, file, hardware, output, samples)
    else:
        formats = None if bits is None else _formats(bits)
        found = _measured(
            device,
            model,
            text,
            formats,
            output,
            quick=quick,
            samples=samples,
            seconds=seconds,
            ranks=_rank_extent(ranks, nodes, link, device),
        )
        document = found.to_dict(str(output))
    if as_json:
        print_json(document)
    else:
        print_calibration(document)


def _measured(
    device: str, model: str | None, texts: list[Path] | None, bits: tuple[str, ...] | None, output: Path, *, quick: bool,
    samples: Path | None, seconds: float | None, ranks: RankExtent | None,
) -> Calibration:  # fmt: skip
    """Return what was measured here: stand-ins of a model's shapes or of the standard ones, or a model itself where there are texts."""
    from ..api.validate import check_device, check_torch
    from ..base.progress import reporter

    check_torch()
    check_device(device)
    formats = bits or _formats(_CALIBRATED_BITS[device])
    if texts and ranks is not None:
        raise InputError("--ranks", ranks.ranks, "ranks run made-up routing, not a model on texts", "leave out --text")
    if texts:
        from ..api.model_validation import calibrate_checkpoint

        return calibrate_checkpoint(
            str(model), texts, output, bits=formats, device=device, quick=quick, samples=samples, seconds=seconds,
            progress=reporter("calibrate"),
        )  # fmt: skip
    from ..executor.calibration.calibrate import calibrate_device
    from ..specs.models.load import load_model

    return calibrate_device(
        device, quick=quick, models=None if model is None else [load_model(model)], bits=formats, out=output, samples_out=samples,
        seconds=seconds, exchanges=True, ranks=ranks, progress=reporter("calibrate"),
    )  # fmt: skip


def _rank_extent(ranks: int | None, nodes: int, link: str | None, device: str) -> RankExtent | None:
    """Return which ranks are measured; raises InputError for numbers and rates that do not belong together."""
    if ranks is None:
        return None
    from ..executor.calibration.rank_runs import LINK_BYTES_PER_S, RankExtent

    if device != "cpu":
        raise InputError("--ranks", ranks, "ranks are processes on this machine's cores", "use --device cpu")
    if ranks % nodes or ranks == nodes > 1:
        raise InputError(
            "--nodes", nodes, f"{ranks} ranks do not make nodes of at least two", "use --ranks 4 --nodes 2"
        )
    if link is not None and nodes == 1:
        raise InputError("--link", link, "one node has no link to others", "leave it out, or add --nodes 2")
    rate = LINK_BYTES_PER_S if link is None else parse_quantity(link, "bytes/s", "--link")
    if not _LEAST_LINK <= rate <= _MOST_LINK:
        raise InputError("--link", link, "not a rate from 1 MB/s to 100 GB/s", "write for instance 20MB/s")
    return RankExtent(ranks=ranks, nodes=nodes, link_bytes_per_s=rate)


def _file(tool: str, path: Path | None) -> Path:
    """Return the file that a tool wrote; raises InputError without one."""
    if path is None:
        raise InputError("--from", tool, "names no file", f"write --from {tool} FILE")
    return path


def _imported(tool: str, path: Path | None, hardware: str | None, output: Path, samples: Path | None) -> dict[str, Any]:
    """Return the document of a profile whose links another tool measured."""
    from ..base.json_files import read_text
    from ..calibrate.imports.profile import TOOLS, import_profile
    from ..specs.machines.profile_file import load_hardware

    if tool not in TOOLS:
        raise UnknownName("--from", tool, (*TOOLS, *SPEED_TOOLS, _KERNELS))
    path = _file(tool, path)
    if hardware is None:
        raise InputError("--hardware", "(absent)", "the tool measures links only", "name the machine that has them")
    text = read_text(path, "--from")
    return import_profile(tool, text, load_hardware(hardware), output, samples)


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(part.strip() for part in text.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", text, "no weight format named", "write for instance --bits 16,4")
    return formats


def register(app: typer.Typer) -> None:
    """Add this module's command to the front door."""
    app.command(cls=ConditionedCommand)(calibrate)
