"""The command that runs a real model under a plan's schedule.

Modelled: its options, and what it prints and writes: the text, speeds beside what was waited for, a timeline, the recording that
the run itself made. Ignored: running (`executor/model/`), which needs torch and transformers and is imported only when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import Internal
from ..base.terminal import SPEEDS, print_json
from ..base.text_files import check_outputs
from ..base.units import MS_PER_S, format_bytes
from .options.bounds import PASSES, between
from .options.declarations import JsonFlag, SetOption, model_file

if TYPE_CHECKING:
    from ..api.run import RunResult


def run(
    model: Annotated[str, typer.Option("--model", help="Folder of a Hugging Face checkpoint: config.json and safetensors files.")],
    prompt_file: Annotated[list[Path], typer.Option("--prompt-file", help="Text to continue. Repeatable: one after another.")],
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.json made for this model.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Instead of a plan: a preset (moeplan schedule list).")
    ] = None,
    settings: SetOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens to generate for each prompt.", callback=between(1, PASSES, "tokens"))
    ] = 64,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    memory: Annotated[
        str | None, typer.Option("--memory", help="Device memory that the run may take; default: the plan's, or most of what is free.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", help="Recording of this model: what a static cache knows of popularity.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Profile of this machine, where a schedule weighs costs; default: the plan's machine."),
    ] = None,
    gates: Annotated[
        Path | None, typer.Option("--gates", help="Trained gates that guess instead of the model's own (moeplan gates train).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only add up the memory it takes, and say whether that is there.")] = False,
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Write what really ran when, for Perfetto (.json).")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Write the routing of the run as a recording (.safetensors).")] = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Run a real Mixture-of-Experts model under a plan: its experts lie in host memory or on disk, and move as the schedule says."""
    from ..api.run import run as go
    from ..base.progress import reporter

    inputs: dict[str, Any] = {
        "--model": model_file(model),
        "--plan": plan,
        "--trace": trace,
        "--profile": profile,
        "--gates": gates,
    }
    check_outputs(
        {"--timeline": timeline, "--record": record},
        inputs | {f"prompt {n}": path for n, path in enumerate(prompt_file)},
    )
    found = go(
        model, plan=plan, schedule=schedule, settings=settings or (), prompts=prompt_file, max_new_tokens=max_new_tokens, device=device,
        memory=memory, trace=trace, profile=profile, gates=gates, dry_run=dry_run, progress=reporter("run"),
    )  # fmt: skip
    if found.run is not None:
        if record is not None:
            from ..traces.format import save_trace

            save_trace(found.run.recording, record)
        if timeline is not None:
            from ..reports.timelines.perfetto import write_timeline

            write_timeline(timeline, found.run.timeline)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    if found.figures is not None and found.figures["replay_differences"] and not found.schedule.timing_dependent:
        raise Internal("a run decided otherwise than its replay: " + "; ".join(found.figures["replay_differences"]))


def _print(found: RunResult) -> None:
    memory, told = found.memory, found.figures
    for item in memory["items"]:
        typer.echo(f"  {item['place']:6}  {format_bytes(item['bytes']):>10}  {item['name']}: {item['note']}")
    if memory["disk_bytes"]:
        typer.echo(f"  disk    {format_bytes(memory['disk_bytes']):>10}  a temporary file of all experts")
    if told is None:
        typer.echo(
            f"it fits: {format_bytes(memory['device_bytes'])} on the device, of {format_bytes(memory['device_limit_bytes'])}; "
            f"{format_bytes(memory['host_bytes'])} on the host, of {format_bytes(memory['host_available_bytes'])} that may be taken"
        )
        return
    for text in found.texts:
        sys.stdout.write(text + "\n")
    typer.echo(
        f"{found.schedule.name} on {found.device}: {told['prompt_tokens']} prompt tokens, {told['generated_tokens']} generated"
    )
    for name, title, unit in SPEEDS[:3]:
        value = told[name]
        scale, unit = (MS_PER_S, f"m{unit}") if unit.startswith("s ") and value is not None and value < 1 else (1, unit)
        typer.echo(
            f"  {title:9} "
            + ("none: a single token was generated" if value is None else f"{scale * value:,.2f} {unit}")
        )
    step = told["step_s"]
    typer.echo(
        f"  step      mean {step['mean'] * MS_PER_S:.2f} ms, p50 {step['p50'] * MS_PER_S:.2f}, p99 {step['p99'] * MS_PER_S:.2f}"
    )
    if told["stall_per_token_s"] is not None:
        typer.echo(f"  waited    {told['stall_per_token_s'] * MS_PER_S:.3f} ms a generated token for copies of experts")
    typer.echo(f"  hits      {told['hit_rate']:.4f} of {told['hits'] + told['misses']} look-ups")
    if told["recall"] is not None:
        used = f"{told['prefetches_used']} of {told['prefetches']} experts fetched ahead were used"
        typer.echo(f"  recall    {told['recall']:.4f} one layer ahead; {used}")
    typer.echo(f"  copied    {format_bytes(told['bytes_copied'])} to the device" + (
        f", {told['disk_reads']} experts read from disk" if told["disk_reads"] else ""))  # fmt: skip
    typer.echo(
        f"  memory    {format_bytes(told['device_bytes'])} on the device, {format_bytes(told['host_peak_bytes'])} the process at its peak"
    )
    if found.schedule.timing_dependent:
        typer.echo("  replay    decisions depend on time: counts may differ from a replay")
    elif not told["replay_differences"]:
        typer.echo(
            "  replay    the simulator's replay of this run's own recording counts the same hits, misses, copies and bytes"
        )


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(run)
