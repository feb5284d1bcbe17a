"""The commands that need a real device: measure it, and run schedules on it beside their predictions.

Modelled: their options, and what is printed and written. Ignored: measuring (`calibrate/`) and running (`executor/`), which
need torch and are imported only when a command runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import InputError, UnknownName
from ..base.terminal import print_calibration, print_json, print_validation
from ..base.text_files import check_outputs, write_atomic
from ..base.units import GIGA, MEGA, parse_quantity
from .options.bounds import PASSES, WEEK_S, between, share
from .options.conditions import ConditionedCommand
from .options.declarations import (
    CheckpointOption,
    EngineOption,
    GatesOption,
    JsonFlag,
    NewTokensOption,
    OptionalTraceOption,
    PolicyOption,
    PromptFilesOption,
    QuantOption,
    TextsOption,
    UbatchOption,
    model_file,
)
from .options.lengths import PromptOption, ReplyOption
from .options.settings import print_settings
from .parts.own_speeds import SPEED_TOOLS, Named, compare_speeds, learn_speeds, print_compared, print_learned

if TYPE_CHECKING:
    from ..executor.calibration.calibrate import Calibration
    from ..executor.calibration.rank_runs import RankExtent

_KERNELS = "aiconfigurator"
_LEAST_LINK, _MOST_LINK = MEGA, 100 * GIGA
_CALIBRATED_BITS = {"cpu": "32,16,4", "cuda": "16,4"}

DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
TogetherOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        help="with --from vllm-bench: the batch of a latency file.",
        callback=between(1, 1024, "requests"),
    ),
]


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
        | _numbered("text", text),
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


def _numbered(what: str, paths: list[Path] | None) -> dict[str, str | Path | None]:
    """Return files by what they are called where several are read."""
    return {f"{what} {number}": path for number, path in enumerate(paths or ())}


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


BaselinesOption = Annotated[
    int,
    typer.Option("--baselines", help="Rivals of a plan to run beside it.", callback=between(0, 1000, "schedules")),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Forward passes of a plan to run; default: 64, or what ends in time.",
        callback=between(1, PASSES, "forward passes"),
    ),
]
RunSecondsOption = Annotated[
    float,
    typer.Option(
        "--seconds",
        help="About how long the runs of a plan may take, in seconds, unless --steps is given.",
        callback=between(1.0, WEEK_S, "seconds"),
    ),
]
MeasuredElsewhereOption = Annotated[
    tuple[str, Path] | None,
    typer.Option(
        "--from",
        help="Set speeds that were measured elsewhere beside their predictions, and run nothing: llama-bench or "
        "vllm-bench, and a file.",
        metavar="TOOL FILE",
    ),
]
MinCoverageOption = Annotated[
    str | None,
    typer.Option(
        "--min-coverage",
        help="End with status 1 where intervals hold a smaller share of all that was measured, e.g. 80%; what is not predicted is "
        "not held.",
    ),
]


def validate(
    plan_path: Annotated[
        Path | None, typer.Argument(help="plan.json, as moeplan plan writes it.", metavar="[PLAN]")
    ] = None,
    grid_path: Annotated[Path | None, typer.Option("--grid", help="Grid of configurations (.yaml).")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Profile of this machine; default: it is measured in the same run.")
    ] = None,
    device: DeviceOption = "cpu",
    trace: OptionalTraceOption = None,
    baselines: BaselinesOption = 2,
    steps: StepsOption = None,
    seconds: RunSecondsOption = 120.0,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory that a plan's runs may take; default: most of what is free.")
    ] = None,
    repeats: Annotated[
        int,
        typer.Option("--repeats", help="How often each schedule of a plan runs.", callback=between(1, 10_000, "runs")),
    ] = 3,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a constant of --profile, e.g. machine.host.per_layer_s=50us, in its own units. Repeatable.",
        ),
    ] = None,
    tables: MeasuredElsewhereOption = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="with --from: the machine that the speeds were measured on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="with --from: the model, where the file does not say it well enough.")
    ] = None,
    quant: QuantOption = None,
    engine: EngineOption = None,
    prompt_tokens: PromptOption = None,
    reply_tokens: ReplyOption = None,
    concurrency: TogetherOption = None,
    ubatch: UbatchOption = None,
    fail_over: Annotated[
        str | None,
        typer.Option("--fail-over", help="End with status 1 where the median error is over this share, e.g. 10%."),
    ] = None,
    min_coverage: MinCoverageOption = None,
    policy: PolicyOption = None,
    checkpoint: CheckpointOption = None,
    prompt_file: PromptFilesOption = None,
    max_new_tokens: NewTokensOption = 64,
    gates: GatesOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the figures, with all measured times (.json).")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML page.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a plan, or a grid of schedules, for real and say how wrong the predictions were; or take speeds that another tool measured."""
    from ..base.progress import reporter

    check_outputs(
        {"--output": output, "--report": report},
        {
            "the plan": plan_path,
            "--grid": grid_path,
            "--profile": profile,
            "--trace": trace,
            "--hardware": hardware,
            "--policy": policy,
            "--gates": gates,
        }
        | _numbered("prompt", prompt_file)
        | {"--checkpoint": None if checkpoint is None else model_file(checkpoint)}
        | {"--from": None if tables is None else tables[1], "--model": None if model is None else model_file(model)},
    )
    limits = Limits(
        fail_over=None if fail_over is None else share(fail_over, "--fail-over"),
        min_coverage=None if min_coverage is None else share(min_coverage, "--min-coverage"),
    )
    if tables is not None:
        if plan_path is not None:
            raise InputError("the plan", str(plan_path), "nothing runs where --from names speeds", "leave it out")
        named = Named(
            tool=tables[0], path=tables[1], hardware=hardware, model=model, quant=quant, engine=engine, prompt_tokens=prompt_tokens,
            reply_tokens=reply_tokens, concurrency=concurrency, ubatch=ubatch,
        )  # fmt: skip
        _compare(named, output, limits, as_json)
        return
    from ..api.settings import open_settings
    from ..api.validate import validate as run

    if report is not None and plan_path is not None:
        _check_page(report, plan_path)
    changes = open_settings(settings)
    found: Any
    if checkpoint is not None:
        from ..api.model_validation import validate_checkpoint

        if not prompt_file:
            raise InputError("--prompt-file", "(absent)", "a model continues a text", "give a file of text")
        found = validate_checkpoint(
            plan_path or "", checkpoint, prompt_file, max_new_tokens=max_new_tokens, profile=profile, device=device, trace=trace,
            gates=gates, baselines=baselines, repeats=repeats, memory=memory, settings=changes, progress=reporter("validate"),
        )  # fmt: skip
    else:
        found = run(
            plan_path, grid=grid_path, profile=profile, device=device, trace=trace, baselines=baselines, steps=steps, seconds=seconds,
            memory=memory, repeats=repeats, settings=changes, policy=policy, progress=reporter("validate"),
        )  # fmt: skip
    document = found.to_dict() if plan_path is None else found.to_dict() | found.best_to_dict()
    document["set_by_user"] = changes.made
    document["failed"] = limits.broken(document, document["num_configurations"], document["num_configurations"])
    if document.get("kind") == "expert-parallel":
        document["failed"] += document["wrong"]
    if output is not None:
        write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if report is not None:
        from ..reports.validation.page import write_predicted_measured

        predicted, measured = found.timelines()
        write_predicted_measured(report, document, predicted=predicted, measured=measured)
    if as_json:
        print_json(document)
    else:
        print_validation(document)
        print_settings(document)
    _end(document, as_json)


def _check_page(report: Path, plan_path: Path) -> None:
    """Return nothing; raises InputError where a page is asked for of a plan that has none."""
    from ..specs.plans.document import EXPERT_PARALLEL, read_plan

    if read_plan(plan_path).get("kind") == EXPERT_PARALLEL:
        raise InputError("--report", str(report), "pages are of plans for one device", "leave it out, or use --output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a validation must keep to end well."""

    fail_over: float | None
    """Most of the median error."""
    min_coverage: float | None
    """Least share of everything measured that an interval holds."""

    def broken(self, document: dict[str, Any], num_predicted: int, num_measured: int) -> list[str]:
        """Return the limits that a document of a validation breaks, in words."""
        found = []
        error, held = document["median_relative_error"], document["coverage"] * num_predicted / num_measured
        if self.fail_over is not None and error > self.fail_over:
            found.append(f"the median error of {error:.2%} is over {self.fail_over:.2%}")
        if self.min_coverage is not None and held < self.min_coverage:
            found.append(f"intervals hold {held:.2%} of the {num_measured} measured, {self.min_coverage:.2%} asked for")
        return found


def _end(document: dict[str, Any], as_json: bool) -> None:
    """Say which limits are broken, and end with status 1 where one is."""
    if document["failed"]:
        if not as_json:
            for line in document["failed"]:
                typer.echo(f"FAILED: {line}")
        raise typer.Exit(1)


def _compare(named: Named, output: Path | None, limits: Limits, as_json: bool) -> None:
    """Set another tool's speeds beside their predictions: print them, and write them where asked."""
    if named.tool not in SPEED_TOOLS:
        raise UnknownName("--from", named.tool, SPEED_TOOLS)
    document = compare_speeds(named)
    document["failed"] = limits.broken(document, document["num_predicted"], document["num_lines"])
    if output is not None:
        write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(document)
    else:
        print_compared(document)
    _end(document, as_json)


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(part.strip() for part in text.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", text, "no weight format named", "write for instance --bits 16,4")
    return formats


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(calibrate)
    app.command(cls=ConditionedCommand)(validate)
