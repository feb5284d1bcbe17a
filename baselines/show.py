"""What `moeplan check` says: a few lines of text, or Markdown for a pull request.

Modelled: findings that have no measurement, of which one changed constant makes hundreds, as one line a scenario; the rest one by one.
Ignored: JSON, which has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .document import Figure
from .judge import BROKEN, DRIFT, GAIN, KINDS, REGRESSED, UNLIKE, Finding, Score

if TYPE_CHECKING:
    from .check import CheckResult

_MOST_LINES = 40
"""Lines of one kind; JSON has all."""
_MEANS = {
    BROKEN: "answered before, not now",
    REGRESSED: "further from what was measured",
    UNLIKE: "about other data than the stored figures",
    DRIFT: "moved; nothing measured says whether for better or worse, or too little to say",
    GAIN: "nearer to what was measured, or answered now",
}
_TITLES = ("scenarios with measurements", "measured", "predicted", "median error", "intervals that hold")


def line_of(found: Finding) -> str:
    """Return one finding in a line: where, measured, was, is."""
    where = found.scenario if found.figure is None else f"{found.scenario}  {found.figure}"
    parts = []
    if found.measured is not None:
        parts.append(f"measured {_shown(found.measured)}")
    if found.figure is not None:
        parts.append(f"{_shown(found.was)}{_off(found.error_was)} → {_shown(found.now)}{_off(found.error_now)}")
    if found.why:
        parts.append(found.why)
    return f"{where}: {'; '.join(parts)}"


def text_of(result: CheckResult) -> str:
    """Return what is printed."""
    lines = [_verdict(result), ""]
    rows = [_TITLES, *_score_rows(result.scores)]
    if len(rows) > 1:
        widths = [max(len(row[at]) for row in rows) for at in range(len(_TITLES))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append("")
    for kind in KINDS:
        shown = list(_lines(result, kind))
        if shown:
            lines.append(f"{kind}: {result.counts[kind]:,} {_MEANS[kind]}")
            lines += [f"  {line}" for line in _cut(shown)]
    return "\n".join(lines).rstrip()


def markdown_of(result: CheckResult) -> str:
    """Return the same as Markdown, for a comment on a pull request or a job's summary."""
    lines = [f"### moeplan check: {'passed' if result.passed else 'failed'}", "", _verdict(result), ""]
    rows = list(_score_rows(result.scores))
    if rows:
        lines += [_row(_TITLES), _row(["---"] * len(_TITLES)), *(_row(row) for row in rows), ""]
    for kind in KINDS:
        shown = list(_lines(result, kind))
        if shown:
            lines += [f"**{kind}**: {result.counts[kind]:,} {_MEANS[kind]}", ""]
            lines += [f"- {line}" for line in _cut([_escaped(line) for line in shown])] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(result: CheckResult) -> str:
    counts = (
        ", ".join(f"{count:,} {kind}" for kind, count in result.counts.items() if count) or "every figure as it was"
    )
    coverage = f"{result.num_answered} of {result.num_scenarios} scenarios answered ({result.num_answered_was} before)"
    strict = ", strict: no figure may move" if result.strict else ""
    return f"{result.baseline}: {'passed' if result.passed else 'FAILED'}{strict}; {coverage}, {result.num_figures:,} figures; {counts}"


def _score_rows(scores: Sequence[Score]) -> Iterator[tuple[str, ...]]:
    for one in scores:
        errors = _change(_percent(one.median_error_was), _percent(one.median_error_now))
        held = _change(_percent(one.held_was), _percent(one.held_now))
        yield one.group, f"{one.num_measured:,}", _change(f"{one.num_was:,}", f"{one.num_now:,}"), errors, held


def _lines(result: CheckResult, kind: str) -> Iterator[str]:
    """Return the lines of one kind: figures without a measurement together, by scenario."""
    plain: dict[str, list[Finding]] = {}
    for each in result.findings:
        if each.kind != kind:
            continue
        if each.figure is not None and each.error_now is None and each.measured is None:
            plain.setdefault(each.scenario, []).append(each)
        else:
            yield line_of(each)
    for scenario, group in plain.items():
        if len(group) == 1:
            yield line_of(group[0])
        else:
            most = max(group, key=_size)
            yield f"{scenario}: {len(group):,} figures, most {most.figure}, {_shown(most.was)} → {_shown(most.now)}{_moved(most)}"


def _cut(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return list(lines) if rest <= 1 else [*lines[:_MOST_LINES], f"… and {rest:,} more (--json has all)"]


def _numbers(found: Finding) -> tuple[float, float] | None:
    was, now = found.was, found.now
    if isinstance(was, (int, float)) and isinstance(now, (int, float)) and was and not isinstance(was, bool):
        return float(was), float(now)
    return None


def _size(found: Finding) -> float:
    pair = _numbers(found)
    return 0.0 if pair is None else abs(pair[1] / pair[0] - 1)


def _moved(found: Finding) -> str:
    pair = _numbers(found)
    return "" if pair is None else f" ({pair[1] / pair[0] - 1:+.2%})"


def _shown(value: Figure) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _off(share: float | None) -> str:
    return "" if share is None else f" ({share:.1%} off)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _change(was: str, now: str) -> str:
    return now if was == now else f"{was} → {now}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "|*_`<>[]" else letter for letter in text)
