"""`moeplan validate`: run schedules on a real device beside their predictions, or set speeds of other tools beside theirs.

Modelled: the options, the limits that a run must keep, and what is printed and written. Ignored: running (`executor/`), which needs
torch and is imported only when the command runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import InputError, UnknownName
from ..base.terminal import print_json, print_validation
from ..base.text_files import check_outputs, write_atomic
from .options.bounds import PASSES, WEEK_S, between, share
from .options.conditions import ConditionedCommand
from .options.declarations import (
    EngineOption,
    JsonFlag,
    OptionalTraceOption,
    PolicyOption,
    QuantOption,
    UbatchOption,
    model_file,
)
from .options.device import (
    CheckpointOption,
    DeviceOption,
    GatesOption,
    NewTokensOption,
    PromptFilesOption,
    TogetherOption,
    numbered,
)
from .options.lengths import PromptOption, ReplyOption
from .options.settings import print_settings
from .parts.own_speeds import SPEED_TOOLS, Named, compare_speeds, print_compared

if TYPE_CHECKING:
    pass

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
        | numbered("prompt", prompt_file)
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


def register(app: typer.Typer) -> None:
    """Add this module's command to the front door."""
    app.command(cls=ConditionedCommand)(validate)
