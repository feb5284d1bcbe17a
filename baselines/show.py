"""What `moeplan check` says: a few lines of text, or Markdown for a pull request.

Modelled: findings that have no measurement, of which one changed constant makes hundreds, as one line a scenario; the rest one by one.
Ignored: JSON, which has all of them.
"""

from __future__ import annotations

import math
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
    lines = [verdict_of(result), ""]
    rows = [_TITLES, *_score_rows(result.scores)]
    if len(rows) > 1:
        widths = [max(len(row[at]) for row in rows) for at in range(len(_TITLES))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append("")
    for title, found in _parts(result):
        lines.append(f"{title}")
        lines += [f"  {line}" for line in _cut(lines_of(found))]
    return "\n".join(lines).rstrip()


def markdown_of(result: CheckResult) -> str:
    """Return the same as Markdown, for a comment on a pull request or a job's summary."""
    lines = [f"### moeplan check: {'passed' if result.passed else 'failed'}", "", verdict_of(result), ""]
    rows = list(_score_rows(result.scores))
    if rows:
        lines += [_row(_TITLES), _row(["---"] * len(_TITLES)), *(_row(row) for row in rows), ""]
    for title, found in _parts(result):
        kind, _, rest = title.partition(":")
        lines += [f"**{kind}**:{rest}", ""]
        lines += [f"- {line}" for line in _cut([_escaped(line) for line in lines_of(found)])] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _parts(result: CheckResult) -> Iterator[tuple[str, list[Finding]]]:
    """Return the findings by kind, with a title; those of a drift beyond the tolerance before the others."""
    for kind in KINDS:
        found = [each for each in result.findings if each.kind == kind]
        if kind == DRIFT:
            beyond = [each for each in found if each.fails(result.tolerance)]
            found = [each for each in found if not each.fails(result.tolerance)]
            if beyond:
                yield (
                    f"{kind}: {len(beyond):,} moved by more than {result.tolerance:.0%}, with no measurement beside them",
                    beyond,
                )
        if found:
            yield f"{kind}: {len(found):,} {_MEANS[kind]}", found


def verdict_of(result: CheckResult) -> str:
    """Return whether a check passed, and over how much, in a line."""
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


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """Return findings in lines: figures without a measurement together, a scenario a line, the rest one by one."""
    plain: dict[str, list[Finding]] = {}
    lines = []
    for each in findings:
        if each.figure is not None and each.measured is None:
            plain.setdefault(each.scenario, []).append(each)
        else:
            lines.append(line_of(each))
    for scenario, group in plain.items():
        most = max(group, key=lambda each: each.moved or 0.0)
        more = f"{len(group):,} figures, most " if len(group) > 1 else ""
        lines.append(f"{scenario}: {more}{most.figure} {_shown(most.was)} → {_shown(most.now)}{_moved(most)}")
    return lines


def _cut(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return list(lines) if rest <= 1 else [*lines[:_MOST_LINES], f"… and {rest:,} more (--json has all)"]


def _moved(found: Finding) -> str:
    if found.moved is None or found.moved == math.inf or not isinstance(found.was, (int, float)):
        return ""
    return f" ({float(found.now or 0) / found.was - 1:+.2%})" if found.was else ""


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
