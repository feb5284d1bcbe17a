"""A person's own measured speeds: what they make of a machine's constants, and each beside its prediction.

Modelled: the file as a benchmark tool wrote it, on a machine named as everywhere; documents for `calibrate --from` and `validate --from`.
Ignored: how lines become predictions (`papers.field.own`), and speeds constants (`calibrate.fitting.update`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...base.errors import InputError, one_line
from ...base.text_files import read_text, write_atomic
from ...base.units import MIB
from ...reports import numbers

if TYPE_CHECKING:
    from ...papers.field.own.lines import Own

SPEED_TOOLS = ("llama-bench", "vllm-bench")
_MOST_BYTES = 64 * MIB
_HASH_DIGITS = 16
_NAME_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What the command line says of a file of speeds."""

    tool: str
    path: Path
    hardware: str | None
    model: str | None = None
    quant: str | None = None
    engine: str | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    concurrency: int | None = None
    ubatch: int | None = None


def open_speeds(named: Named) -> tuple[Own, str]:
    """Return the file's lines on their machine, and the hash of its text; raises InputError for contradictions and damage."""
    from ...calibrate.imports.llama_bench import read_llama_bench
    from ...calibrate.imports.vllm_bench import Lengths, read_vllm_bench
    from ...papers.field.own.lines import open_own
    from ...specs.models.load import load_model

    if named.hardware is None:
        raise InputError(
            "--hardware",
            "(absent)",
            "a speed is of a machine",
            "name it by its parts (moeplan machine --list gpus)",
        )
    text = read_text(named.path, "--from", _MOST_BYTES)
    model = None if named.model is None else load_model(named.model)
    if named.tool == "llama-bench":
        lines = read_llama_bench(text)
    else:
        lengths = Lengths(prompt_tokens=named.prompt_tokens, reply_tokens=named.reply_tokens, requests=named.concurrency,
                          ubatch_tokens=named.ubatch)  # fmt: skip
        lines = read_vllm_bench(text, lengths)
    own = open_own(named.tool, lines, hardware=named.hardware, model=model, quant=named.quant, engine=named.engine)
    return own, hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def learn_speeds(named: Named, output: Path) -> dict[str, Any]:
    """Return what `moeplan calibrate --from` prints, with the machine written to `output`."""
    from ...papers.field.own.lines import predict_own, update_own
    from ...specs.machines.profile import profile_to_json

    own, digest = open_speeds(named)
    if digest in own.profile.description:
        raise InputError("--from", os.fspath(named.path), f"{named.hardware} was moved by these speeds already",
                         "give others, or start from the parts")  # fmt: skip
    citation = f"{named.tool} {one_line(named.path.name, _NAME_CHARS)}, sha256 {digest}, {len(own.usable)} lines"
    update = update_own(own, citation)
    profile = dataclasses.replace(
        update.profile, name=output.stem, description=f"{own.profile.description}; moved by {citation}"
    )
    rows = []
    for one, before, after in zip(own.usable, update.before, update.after, strict=True):
        then = predict_own(one, profile)
        rows.append(_row(one) | {"before": before, "after": after, "low": then.low, "high": then.high})
    write_atomic(output, profile_to_json(profile))
    return {
        "profile": os.fspath(output), "device": {"name": own.profile.name}, "tool": named.tool, "file": named.path.name, "sha256": digest,
        "num_samples": len(rows), "num_measurements": len(rows), "fit": {}, "changed": _changed(own.profile, profile),
        "kernels": dict(update.kernels), "lines": rows,
        "median_error_before": _median_error(rows, "before"), "median_error_after": _median_error(rows, "after"),
        "chi_square": update.chi_square, "degrees_of_freedom": update.degrees_of_freedom, "widened": update.widened,
        "kept": update.kept, "warnings": _warnings(own, update.widened, update.kept),
    }  # fmt: skip


def compare_speeds(named: Named) -> dict[str, Any]:
    """Return what `moeplan validate --from` prints: every line beside its prediction, nothing run."""
    from ...papers.field.own.lines import predict_own

    own, digest = open_speeds(named)
    rows = []
    for one in own.lines:
        row = _row(one)
        if one.reason is None:
            found = predict_own(one, own.profile)
            row |= {
                "predicted": found.value, "low": found.low, "high": found.high, "inside": found.low <= one.line.tokens_per_s <= found.high,
                "relative_error": found.value / one.line.tokens_per_s - 1, "bound": found.bound,
            }  # fmt: skip
        else:
            row |= dict.fromkeys(("predicted", "low", "high", "inside", "relative_error", "bound"))
        rows.append(row | {"reason": one.reason})
    known = [row for row in rows if row["predicted"] is not None]
    return {
        "tool": named.tool, "file": named.path.name, "sha256": digest, "machine": own.profile.description, "rows": rows,
        "num_lines": len(rows), "num_predicted": len(known), "median_relative_error": _median_error(known, "predicted"),
        "coverage": sum(row["inside"] for row in known) / len(known), "warnings": own.warnings,
    }  # fmt: skip


def print_learned(document: dict[str, Any]) -> None:
    """Print what measured speeds made of a machine."""
    typer.echo(f"{document['device']['name']}: {document['num_samples']} speeds of {document['tool']}")
    for row in document["lines"]:
        measured, before, after, low, high = (
            numbers.significant(row[name]) for name in ("measured", "before", "after", "low", "high")
        )
        head = f"  {row['model']} {row['test']:20} measured {measured}"
        typer.echo(f"{head}, predicted {before} before, {after} after ({low} to {high}) tokens/s")
    for name, change in document["changed"].items():
        typer.echo(f"  {name:36} {numbers.constant(name, change['after'])} ± {change['after_uncertainty']:.0%}, was "
                   f"{numbers.constant(name, change['before'])} ± {change['before_uncertainty']:.0%}")  # fmt: skip
    for name, factor in document["kernels"].items():
        typer.echo(f"  {name:36} {factor:.2f} times as long as measured elsewhere")
    for warning in document["warnings"]:
        typer.echo(f"  note      {warning}")
    typer.echo(
        f"median error of these lines {document['median_error_before']:.1%} before, {document['median_error_after']:.1%} after"
    )
    typer.echo(f"written to {document['profile']}: use it with --hardware {document['profile']}")


def print_compared(document: dict[str, Any]) -> None:
    """Print each line beside its prediction."""
    typer.echo(f"{document['machine']}")
    for row in document["rows"]:
        head = f"  {row['where']:10} {row['model']} {row['test']:20} measured {numbers.significant(row['measured']):>8}"
        if row["predicted"] is None:
            typer.echo(f"{head}, not predicted: {row['reason']}")
            continue
        between = f"{numbers.significant(row['low'])} to {numbers.significant(row['high'])}"
        held = "" if row["inside"] else ", outside"
        typer.echo(f"{head}, predicted {numbers.significant(row['predicted']):>8} ({between}{held}) tokens/s "
                   f"{row['relative_error']:+6.1%}, {row['bound']} binds")  # fmt: skip
    typer.echo(f"{document['num_predicted']} of {document['num_lines']} lines predicted: error median "
               f"{document['median_relative_error']:.1%}, intervals hold {document['coverage']:.0%}")  # fmt: skip


def _row(one: Any) -> dict[str, Any]:
    from ...papers.field.own.lines import described

    return {"where": one.line.where, "test": one.line.test, "measured": one.line.tokens_per_s} | described(one)


def _median_error(rows: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(abs(row[key] / row["measured"] - 1) for row in rows))


def _changed(base: Any, profile: Any) -> dict[str, Any]:
    before = dict(base.constants())
    return {
        name: {
            "before": before[name].value, "after": constant.value, "before_uncertainty": before[name].relative_uncertainty,
            "after_uncertainty": constant.relative_uncertainty, "source": constant.source,
        }
        for name, constant in profile.constants()
        if before[name] != constant
    }  # fmt: skip


_KEPT = {
    "within": "these speeds are off by no more than speeds of one machine differ among themselves: its constants stay",
    "apart": "these speeds are off opposite ways, which no such machine explains: its constants stay; measure further lines",
}


def _warnings(own: Own, widened: float, kept: str | None) -> list[str]:
    found = [*own.warnings, *([] if kept is None else [_KEPT[kept]])]
    if widened > 1:
        times = f"everything is taken as {widened:.1f} times as uncertain"
        found.append(
            f"these speeds contradict each other, or what any such machine does, by more than their errors: {times}"
        )
    return found
