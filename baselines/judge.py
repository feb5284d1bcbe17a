"""What a difference between two sets of pinned scenarios means: broken, regressed, gained, or drifted.

    broken     it was answered, and is refused, fails or is no number now
    regressed  a figure that was measured: its error grew by 2 points or more and by a tenth or more of what it was; or its interval no
               longer holds the measurement
    gain       the same the other way round, and what was not answered and is now
    drift      any other figure that moved: nothing measured says whether for better or worse, or it is too little to say; a number without
               a measurement that moved by more than the tolerance fails all the same
    unlike     the scenario is about other data, or asked otherwise, than the stored one: its figures are not compared

Modelled: errors relative to what was measured; where repetitions of a measurement are known, from their nearer end, so that what lies
within its noise is no error. Ignored: whether a drift is meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .compare import ASKED, compare
from .document import GIVEN, Baseline, Figure, Measured, Pinned
from .figures import fingerprint

BROKEN, REGRESSED, UNLIKE, DRIFT, GAIN = "broken", "regressed", "unlike", "drift", "gain"
KINDS = (BROKEN, REGRESSED, UNLIKE, DRIFT, GAIN)
FAILING = frozenset({BROKEN, REGRESSED, UNLIKE})
TOLERANCE = 0.05
"""A number that nothing measured stands beside may move by this share."""
POINTS, SHARE = 0.02, 0.1
"""An error that grew by less than either has not grown."""
RULES = fingerprint({"error": "|predicted / measured - 1|, from the nearer end of the repetitions", "points": POINTS, "share": SHARE,
                     "interval": "held before and not now", "kinds": KINDS})  # fmt: skip
_SCORES = "scores."
_REFUSED, _FAILED = "refused", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure, or a whole scenario, that is not as it was."""

    kind: str
    scenario: str
    figure: str | None
    """None: the whole scenario."""
    was: Figure = None
    now: Figure = None
    measured: float | None = None
    error_was: float | None = None
    error_now: float | None = None
    """Shares of what was measured."""
    why: str = ""
    """In words, where the numbers do not say it."""
    summed: bool = False
    """Whether measured figures have said it already: this is an end of one's interval, or a score over them."""

    @property
    def moved(self) -> float | None:
        """How far the figure moved, as a share of what it was; endless from nought, None where it is not two numbers."""
        was, now = _number(self.was), _number(self.now)
        if was is None or now is None:
            return None
        return abs(now / was - 1) if was else math.inf if now else 0.0

    def fails(self, tolerance: float) -> bool:
        """Return whether this alone fails a check."""
        if self.kind == DRIFT and self.measured is None:
            return not self.summed and (self.moved or 0.0) > tolerance
        return self.kind in FAILING


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The errors of a group of scenarios, before and now, and of how many figures that could be predicted."""

    group: str
    num_measured: int
    num_was: int
    num_now: int
    median_error_was: float | None
    median_error_now: float | None
    held_was: float | None
    held_now: float | None
    """Share of the intervals, where figures have one, that hold the measurement."""


def judge(old: Baseline, new: Baseline) -> tuple[Finding, ...]:
    """Return everything that is not as it was, the worst kind first, then by scenario and figure."""
    found = [each for name in sorted(old) for each in _judged(name, old[name], new.get(name))]
    return tuple(sorted(found, key=lambda each: KINDS.index(each.kind)))


def _judged(name: str, old: Pinned, new: Pinned | None) -> Iterator[Finding]:
    if new is None:
        yield Finding(kind=BROKEN, scenario=name, figure=None, why="it is no longer predicted")
        return
    if not old.figures:
        yield Finding(kind=GAIN, scenario=name, figure=None, why="it had no figures yet")
        return
    was, now = answered(old), answered(new)
    if was and not now:
        yield Finding(kind=BROKEN, scenario=name, figure=None, why=_refusal(new))
        return
    if now and not was:
        yield Finding(kind=GAIN, scenario=name, figure=None, why=f"answered now, before: {_refusal(old)}")
        return
    apart = _unlike(old, new)
    if apart:
        yield Finding(kind=UNLIKE, scenario=name, figure=None, why=apart)
        return
    for each in compare({name: old}, {name: new}):
        if each.figure is not None and each.kind != ASKED:
            yield _figure(name, each.figure, old, new)


def answered(pinned: Pinned) -> bool:
    """Return whether a scenario was answered with figures."""
    if pinned.scenario.command == GIVEN:
        return _number(pinned.figures.get("predicted")) is not None
    return not {_REFUSED, _FAILED} & set(pinned.figures)


def _refusal(pinned: Pinned) -> str:
    if pinned.scenario.command == GIVEN:
        return "no prediction"
    return str(pinned.figures.get(_FAILED) or f"refused ({pinned.figures.get(_REFUSED)})")


def _unlike(old: Pinned, new: Pinned) -> str:
    if (old.scenario.command, old.scenario.options) != (new.scenario.command, new.scenario.options):
        return "it is asked otherwise than the stored one"
    if old.data not in (None, new.data) or old.measured != new.measured:
        return "its data (recording, model, or what was measured) are not those of the stored one"
    return ""


def _figure(scenario: str, figure: str, old: Pinned, new: Pinned) -> Finding:
    was, now = old.figures.get(figure), new.figures.get(figure)
    gone = _number(was) is not None and _number(now) is None
    measured = old.measured.get(figure)
    if gone or measured is None:
        return Finding(kind=BROKEN if gone else DRIFT, scenario=scenario, figure=figure, was=was, now=now,
                       measured=None if measured is None else measured.value, why="it is no number any more" if gone else "",
                       summed=figure.startswith(_SCORES) or figure in _ends(old))  # fmt: skip
    before, after = error(was, measured), error(now, measured)
    held = holds(old.figures, figure, measured), holds(new.figures, figure, measured)
    kind, why = DRIFT, ""
    if before is None:
        kind, why = GAIN, "it was not predicted before"
    elif after is not None and _grew(before, after):
        kind = REGRESSED
    elif after is not None and held == (True, False) and after > before:
        kind, why = REGRESSED, "its interval no longer holds what was measured"
    elif after is not None and _grew(after, before):
        kind = GAIN
    return Finding(kind=kind, scenario=scenario, figure=figure, was=was, now=now, measured=measured.value, error_was=before,
                   error_now=after, why=why)  # fmt: skip


def _ends(pinned: Pinned) -> set[str]:
    """Return the figures that are ends of a measured figure's interval."""
    return {end for figure in pinned.measured for end in interval_names(figure)}


def _grew(before: float, after: float) -> bool:
    return after - before >= POINTS and after >= before * (1 + SHARE)


def error(predicted: Figure, measured: Measured) -> float | None:
    """Return how far a prediction is off, as a share of what was measured; None where nothing was predicted."""
    number = _number(predicted)
    if number is None:
        return None
    off = abs(number - measured.value)
    if measured.low is not None and measured.high is not None:
        low, high = min(measured.low, measured.value), max(measured.high, measured.value)
        off = max(low - number, number - high, 0.0)
    return off / abs(measured.value)


def holds(figures: Mapping[str, Figure], figure: str, measured: Measured) -> bool | None:
    """Return whether the predicted interval of a figure holds the measurement; None where it has none."""
    ends = [_number(figures.get(name)) for name in interval_names(figure)]
    return None if ends[0] is None or ends[1] is None else ends[0] <= measured.value <= ends[1]


def interval_names(figure: str) -> tuple[str, str]:
    """Return the names of the figures that are the ends of a figure's interval."""
    rest, _, last = figure.rpartition(".")
    start = f"{rest}." if last == "predicted" and rest else "" if last == "predicted" else f"{figure}_interval."
    return f"{start}low", f"{start}high"


def _number(value: Figure) -> float | None:
    return None if value is None or isinstance(value, (bool, str)) or not math.isfinite(value) else float(value)


# --- scores ------------------------------------------------------------------------------------------------------------


def scores(old: Baseline, new: Baseline) -> tuple[Score, ...]:
    """Return the errors before and now: of every scenario with measurements; another tool's scenarios, a figure each, are one group."""
    groups: dict[str, list[str]] = {}
    for name in sorted(old):
        if old[name].measured:
            groups.setdefault(name if old[name].scenario.command != GIVEN else "all", []).append(name)
    return tuple(_score(group, [(old[name], new.get(name)) for name in names]) for group, names in groups.items())


def _score(group: str, pairs: list[tuple[Pinned, Pinned | None]]) -> Score:
    rows = [(old, new, figure, measured) for old, new in pairs for figure, measured in old.measured.items()]
    empty: Mapping[str, Figure] = {}
    was = [error(old.figures.get(figure), measured) for old, _, figure, measured in rows]
    now = [error((empty if new is None else new.figures).get(figure), measured) for _, new, figure, measured in rows]
    held_was = [holds(old.figures, figure, measured) for old, _, figure, measured in rows]
    held_now = [holds(empty if new is None else new.figures, figure, measured) for _, new, figure, measured in rows]
    return Score(
        group=group, num_measured=len(rows), num_was=sum(one is not None for one in was), num_now=sum(one is not None for one in now),
        median_error_was=_median(was), median_error_now=_median(now), held_was=_share(held_was), held_now=_share(held_now),
    )  # fmt: skip


def _median(errors: list[float | None]) -> float | None:
    known = sorted(one for one in errors if one is not None)
    middle = len(known) // 2
    return None if not known else known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


def _share(held: list[bool | None]) -> float | None:
    known = [one for one in held if one is not None]
    return sum(known) / len(known) if known else None
