"""The commands about recordings of expert routing.

Modelled: their options and what they print. Ignored: reading and writing (`traces/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import InputError
from ..base.terminal import print_json
from ..base.text_files import check_outputs
from ..traces.kinds import READERS
from .options.declarations import JsonFlag
from .parts.trace_record import trace_record
from .parts.trace_synth import trace_synth

if TYPE_CHECKING:
    from ..traces.stats import TraceStats

SOURCES = ", ".join(READERS)


def trace_import(
    path: Annotated[str, typer.Argument(help="File or folder to read.")],
    kind: Annotated[
        str, typer.Option("--from", help=f"Source format: {SOURCES}. docs/recordings.md says how to make each.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recording to write (.safetensors).")],
    option: Annotated[list[str] | None, typer.Option("--option", help="Reader option: key=value. Repeatable.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a recording of routing, or of expert loads, from an engine's file."""
    from ..traces.format import save_profile, save_trace
    from ..traces.readers import import_trace
    from ..traces.readers.account import account_of
    from ..traces.recording import PREFILL, RoutingTrace

    check_outputs({"--output": output}, {"what is read": path})
    recording = import_trace(kind, path, **_reader_options(kind, option or []))
    if isinstance(recording, RoutingTrace):
        save_trace(recording, output)
        facts: dict[str, Any] = {"kind": "routing", "num_tokens": recording.num_tokens, "top_k": recording.top_k}
        facts |= {
            "num_requests": int(recording.request[-1]) + 1,
            "prefill_tokens": int((recording.phase == PREFILL).sum()),
        }
        facts |= {"decode_tokens": recording.num_tokens - facts["prefill_tokens"]}
    else:
        save_profile(recording, output)
        facts = {"kind": "load", "note": "counts only: no token routing, so no replay of caches"}
        facts |= {"counted_choices": int(recording.counts.sum()), "top_k": recording.top_k}
    facts |= {
        "num_layers": recording.num_layers,
        "layer_ids": list(recording.layer_ids),
        "num_experts": recording.num_experts,
        "model": recording.model,
        "path": str(output),
        **account_of(recording),
    }
    if as_json:
        print_json(facts)
    else:
        _print_import(facts)


def _print_import(facts: dict[str, Any]) -> None:
    """Print what was imported: one line of figures, one a cause of dropped tokens, one a remark."""
    from ..traces.readers.account import layer_ranges

    notes, layers = facts.pop("notes"), layer_ranges(facts.pop("layer_ids"))
    lists = {"dropped": facts.pop("tokens_dropped"), "not in the file": facts.pop("tokens_missing")}
    shown = {**facts, "layers": layers}
    typer.echo(", ".join(f"{key} {value}" for key, value in shown.items() if value not in ("", None)))
    for name, causes in lists.items():
        for cause, tokens in causes.items():
            typer.echo(f"  tokens {name}: {tokens}  {cause}")
    for note in notes:
        typer.echo(f"  {note}")


def _reader_options(kind: str, given: list[str]) -> dict[str, Any]:
    """Return reader options converted to what the reader takes. Raises InputError for one that is not of its form."""
    from ..traces.readers import option_values

    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError("--option", text, "not of the form key=value", "write for instance --option top_k=8")
        if key in found:
            raise InputError("--option", text, f"{key} is given twice", "give each option once")
        found[key] = value
    return option_values(kind, found)


def trace_stats_command(
    trace: Annotated[str, typer.Argument(help="Recording, or 'bundled'.")], as_json: JsonFlag = False
) -> None:
    """Show what a recording's routing is like: loads, reuse, affinity, working sets, LRU hits.

    As text, lists by layer are left out; --json has everything.
    """
    from ..api.load import load_trace
    from ..traces.recording import RoutingTrace
    from ..traces.stats import TraceStats, load_stats, trace_stats

    recording = load_trace(trace)
    stats = trace_stats(recording) if isinstance(recording, RoutingTrace) else load_stats(recording)
    document = stats.as_json()
    if as_json:
        print_json(document)
    else:
        for key, value in document.items():
            if not isinstance(value, (list, dict)):
                typer.echo(f"{key:32} {value:.4f}" if isinstance(value, float) else f"{key:32} {value}")
            elif isinstance(value, dict):
                typer.echo(
                    f"{key:32} "
                    + "  ".join(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
                )
        if isinstance(stats, TraceStats):
            _print_caches(stats)


def _print_caches(stats: TraceStats) -> None:
    """Print what caches of every size would hit, and how well early gates guess."""
    typer.echo("LRU hit rate by experts cached per layer: emptied at each request, kept for the whole recording")
    for size, (emptied, kept) in enumerate(
        zip(stats.lru_hit_fraction_reset, stats.lru_hit_fraction_persistent, strict=True), start=1
    ):
        typer.echo(f"  {size:>4}  {emptied:.4f}  {kept:.4f}")
    for distance, recalls in enumerate(stats.guess_recall_fraction or (), start=1):
        shown = "  ".join(f"{width}: {recall:.4f}" for width, recall in enumerate(recalls, start=1))
        typer.echo(
            f"recall of guesses made {distance} layer{'s' if distance > 1 else ''} ahead, by number of guesses  {shown}"
        )


def trace_convert(
    trace: Annotated[str, typer.Argument(help="Recording, or 'bundled'.")],
    kind: Annotated[str, typer.Option("--to", help="Format to write: parquet or npz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
) -> None:
    """Write a recording as Parquet or npz."""
    from ..api.load import load_trace
    from ..traces.convert import convert

    check_outputs({"--output": output}, {"what is read": trace})
    convert(load_trace(trace), kind, output)
    typer.echo(str(output))


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(
        no_args_is_help=True, help="Recordings of expert routing: record, import, look at, convert, make up."
    )
    group.command("import")(trace_import)
    group.command("stats")(trace_stats_command)
    group.command("convert")(trace_convert)
    group.command("record")(trace_record)
    group.command("synth")(trace_synth)
    app.add_typer(group, name="trace")
