"""Guard predictions: ask every scenario of a baseline again, set the answers beside the stored ones and what was measured.

Modelled: scenarios predicted anew by this version, over several processes, or taken from another tool's table; a verdict; a baseline
written anew with what got worse in it. Ignored: what a difference means (`judge`), and how it is shown (`show`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError, one_line
from ..base.frames import Tabular
from ..base.text_files import read_text, write_atomic
from ..base.workers import worker_pool
from .document import GIVEN, Baseline, Header, Pinned, open_baseline, to_text
from .figures import predict
from .judge import KINDS, RULES, TOLERANCE, Finding, Score, answered, judge, scores
from .pairs import read_pairs

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]
_WHY_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult(Tabular):
    """A baseline beside what is predicted now."""

    baseline: str
    findings: tuple[Finding, ...]
    scores: tuple[Score, ...]
    num_scenarios: int
    num_answered_was: int
    num_answered: int
    num_figures: int
    tolerance: float
    strict: bool
    now: Baseline = field(repr=False)
    """Every scenario as it is predicted now."""

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each kind."""
        return {kind: sum(each.kind == kind for each in self.findings) for kind in KINDS}

    @property
    def passed(self) -> bool:
        """Whether nothing is broken, regressed, unlike or drifted beyond the tolerance; when strict, whether nothing moved."""
        return not self.failing

    @property
    def failing(self) -> tuple[Finding, ...]:
        """The findings that fail the check."""
        return self.findings if self.strict else tuple(each for each in self.findings if each.fails(self.tolerance))

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan check --json` prints."""
        return {
            "baseline": self.baseline, "passed": self.passed, "strict": self.strict, "tolerance": self.tolerance,
            "counts": self.counts, "num_failing": len(self.failing),
            "num_scenarios": self.num_scenarios, "num_answered": self.num_answered, "num_answered_before": self.num_answered_was,
            "num_figures": self.num_figures, "scores": [_plain(one) for one in self.scores],
            "findings": [_plain(one) for one in self.findings],
        }  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """Return the findings as a table, one a row."""
        import pandas as pd

        return pd.DataFrame(self.table_rows(), columns=list(Finding.__slots__))

    def table_rows(self) -> list[dict[str, Any]]:
        """Return the rows: a finding each."""
        return [_plain(one) for one in self.findings]

    def table_title(self) -> str:
        """Return the verdict, as `moeplan check` prints it."""
        from .show import verdict_of

        return verdict_of(self)


def _plain(one: Finding | Score) -> dict[str, Any]:
    return {name: getattr(one, name) for name in type(one).__slots__}


def check(
    baseline: str | os.PathLike[str],
    *,
    predictions: str | os.PathLike[str] | None = None,
    tolerance: float = TOLERANCE,
    strict: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Return what is no longer as a baseline has it: broken, regressed, unlike, drifted, gained.

    baseline: a file of pinned figures, or a table (.csv, .json) of another tool's predictions beside measurements. predictions: such a
    table, with what that tool predicts now; None: this version predicts the scenarios of the baseline. tolerance: share by which a
    number without a measurement may move. strict: any figure that moved fails. jobs: processes; None: one a core. The result does not
    depend on them.

    Raises InputError for files of another kind, a baseline judged by other rules, and predictions of scenarios it does not have.
    """
    old, header = _opened(baseline)
    if header is not None and header.rules != RULES:
        rule = f"its figures are judged by other rules than this version's ({RULES})"
        raise InputError(os.fspath(baseline), header.rules, rule, "write it anew with --refresh")
    return _checked(os.fspath(baseline), old, _now(baseline, old, predictions, jobs, progress), tolerance, strict)


def _checked(name: str, old: Baseline, new: Baseline, tolerance: float, strict: bool) -> CheckResult:
    return CheckResult(
        baseline=name, findings=judge(old, new), scores=scores(old, new), num_scenarios=len(old), tolerance=tolerance, strict=strict,
        num_answered_was=sum(map(answered, old.values())), num_answered=sum(map(answered, new.values())),
        num_figures=sum(len(one.figures) for one in old.values()), now=new,
    )  # fmt: skip


def refresh(
    baseline: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    predictions: str | os.PathLike[str] | None = None,
    why: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Return what moved, having written the figures of now as a baseline to `output` (None: over the old one).

    why: the reason, without which nothing is written where something is broken or worse; it is kept in the file beside what got worse.
    Raises InputError as `check` does, and without a reason that is needed.
    """
    old: dict[str, Pinned] = {}
    if predictions is None or output is not None or os.path.exists(baseline):
        old, _ = _opened(baseline)
    new = _now(baseline, old, predictions, jobs, progress, more=True)
    found = _checked(os.fspath(baseline), old, new, TOLERANCE, strict=False)
    worse, review = found.failing, None
    if worse and not (why or "").strip():
        first = worse[0]
        where = first.scenario if first.figure is None else f"{first.scenario}  {first.figure}"
        raise InputError("--refresh", where, f"{first.kind}, and {len(worse) - 1} more that fail a check",
                         "look at them without --refresh, then say --why they are meant")  # fmt: skip
    if worse:
        from .show import lines_of

        review = {"why": one_line(why, _WHY_CHARS), "moved": lines_of(worse)}
    write_atomic(output or baseline, to_text(new, Header(rules=RULES, review=review)))
    return found


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Pinned], Header | None]:
    """Return the scenarios of a baseline and its header; None of a table of another tool."""
    if os.fspath(path).lower().endswith(".csv"):
        return read_pairs(path, "--baseline"), None
    start = read_text(path, "--baseline", 2**26).lstrip()
    if start[:1] == "[" or (start[:1] == "{" and '"pairs"' in start[:200] and '"format_version"' not in start[:200]):
        return read_pairs(path, "--baseline"), None
    return open_baseline(path)


def _now(
    path: str | os.PathLike[str],
    old: Baseline,
    predictions: str | os.PathLike[str] | None,
    jobs: int | None,
    progress: Progress | None,
    *,
    more: bool = False,
) -> dict[str, Pinned]:
    """Return the scenarios of a baseline as they are predicted now; with `more`, also those that a table has besides."""
    name = os.fspath(path)
    others = [each for each in old.values() if each.scenario.command == GIVEN]
    if predictions is None:
        if others:
            rule = "its figures are of another tool, which this one cannot ask"
            raise InputError(name, others[0].scenario.name, rule, "give what the tool says now with --predictions FILE")
        return predict_all(list(old.values()), Path(name).parent, jobs, progress)
    found = read_pairs(predictions, "--predictions")
    ours = next((each for each in old.values() if each.scenario.command != GIVEN), None)
    if ours is not None:
        rule = f"{name} has scenarios that are predicted here ({ours.scenario.name})"
        raise InputError("--predictions", os.fspath(predictions), rule, "leave it out")
    new = sorted(set(found) - set(old))
    if new and not more:
        raise InputError(
            "--predictions", new[0], f"no scenario of {name}; {len(new)} like it", "add them with --refresh"
        )
    return found


def predict_all(
    asked: Sequence[Pinned], folder: Path, jobs: int | None = None, progress: Progress | None = None
) -> dict[str, Pinned]:
    """Return scenarios with what is said of them now, by name; one that stops with an error is kept with it."""
    report = progress or (lambda done, total, note: None)
    found: dict[str, Pinned] = {}

    def add(one: Pinned) -> None:
        found[one.scenario.name] = one
        report(len(found), len(asked), one.scenario.name)

    # One here, so that what must be compiled first is compiled once, not in every process.
    queue = sorted(asked, key=lambda each: each.scenario.command == "simulate")
    count = min(jobs or len(os.sched_getaffinity(0)), len(queue))
    while queue and (count <= 1 or not found):
        add(_predicted(queue.pop(), folder))
    if queue:
        with worker_pool(count) as pool:
            # The long ones first, so that no process waits for a last one of them.
            for done in as_completed([pool.submit(_predicted, each, folder) for each in queue]):
                add(done.result())
    return {each.scenario.name: found[each.scenario.name] for each in asked}


def _predicted(asked: Pinned, folder: Path) -> Pinned:
    """Return a scenario with what is said of it now, beside what is known to be measured; a mistake is said in its place."""
    try:
        found = predict(asked.scenario, folder)
    except InputError:  # the baseline itself is wrong
        raise
    except Exception as error:  # noqa: BLE001 (a mistake in one scenario is a finding, and the others are still asked)
        return Pinned(scenario=asked.scenario, figures={"failed": one_line(f"{type(error).__name__}: {error}", _WHY_CHARS)},
                      measured=asked.measured, data=asked.data)  # fmt: skip
    return found if found.measured else dataclasses.replace(found, measured=asked.measured)
