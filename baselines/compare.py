"""Two sets of pinned figures side by side: what changed, what is gone, what is new.

Modelled: every difference, exactly; the file's rounding is the only tolerance. Ignored: whether a difference is good or bad.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .document import Baseline, Figure

CHANGED, GONE, NEW, ASKED = "changed", "gone", "new", "asked otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One figure, or a whole scenario, that is not as it was."""

    scenario: str
    figure: str | None
    """None: the whole scenario."""
    kind: str
    """changed, gone, new, or asked otherwise: the scenario has other options than it had."""
    old: Figure = None
    new: Figure = None

    @property
    def relative_change(self) -> float | None:
        """New over old, less one; None where there are no two numbers or the old one is 0."""
        numbers = [
            value for value in (self.old, self.new) if isinstance(value, (int, float)) and type(value) is not bool
        ]
        return numbers[1] / numbers[0] - 1 if len(numbers) == 2 and numbers[0] else None

    def words(self) -> str:
        """Return the difference in one line: scenario, figure, old → new, relative change."""
        where = self.scenario if self.figure is None else f"{self.scenario}  {self.figure}"
        if self.kind == NEW:
            return f"{where}: new" if self.figure is None else f"{where}: new, {_shown(self.new)}"
        if self.kind == GONE:
            return f"{where}: gone" if self.figure is None else f"{where}: gone, was {_shown(self.old)}"
        change = self.relative_change
        share = "" if change is None else f" ({change:+.3g} of it)" if abs(change) < 1e-4 else f" ({change:+.2%})"
        label = "" if self.kind == CHANGED else f"{self.kind}: "
        return f"{where}: {label}{_shown(self.old)} → {_shown(self.new)}{share}"


def compare(old: Baseline, new: Baseline) -> tuple[Difference, ...]:
    """Return every difference between two sets of pinned scenarios, sorted by scenario and figure."""
    return tuple(_differences(old, new))


def _differences(old: Baseline, new: Baseline) -> Iterator[Difference]:
    for name in sorted({*old, *new}):
        if name not in new:
            yield Difference(scenario=name, figure=None, kind=GONE)
        elif name not in old:
            yield Difference(scenario=name, figure=None, kind=NEW)
        else:
            before, after = old[name], new[name]
            asked = [_question(pin.scenario.command, pin.scenario.options) for pin in (before, after)]
            if asked[0] != asked[1]:
                yield Difference(scenario=name, figure=None, kind=ASKED, old=asked[0], new=asked[1])
            yield from _figures(name, before.figures, after.figures)


def _figures(scenario: str, old: Mapping[str, Figure], new: Mapping[str, Figure]) -> Iterator[Difference]:
    for figure in sorted({*old, *new}):
        if figure not in new:
            yield Difference(scenario=scenario, figure=figure, kind=GONE, old=old[figure])
        elif figure not in old:
            yield Difference(scenario=scenario, figure=figure, kind=NEW, new=new[figure])
        elif _other(old[figure], new[figure]):
            yield Difference(scenario=scenario, figure=figure, kind=CHANGED, old=old[figure], new=new[figure])


def _other(old: Figure, new: Figure) -> bool:
    """Return whether two values differ; true is not 1."""
    return old != new or isinstance(old, bool) != isinstance(new, bool)


def _question(command: str, options: Mapping[str, Any]) -> str:
    return f"{command} {json.dumps(options, sort_keys=True)}"


def _shown(value: Figure) -> str:
    return json.dumps(value, ensure_ascii=False)
