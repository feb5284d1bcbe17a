"""How well public reports of machines are predicted that the constants have not seen: `python -m benchmarks.field_left_out [--json]`.

    python -m benchmarks.field_left_out [--reports FILE] [--folds 8] [--only NAME ... | --cores] [--json] [--rows]

Whole machines are dealt out to folds. A fold's constants are one linear step from the bundled ones with its rows taken out of the fit
(`fits.engines`); its rows are predicted anew, with intervals, and scored as `moeplan reproduce field` scores. Machines of several cards
have no part in the fit, nor have those kept apart for good. With --only, no constant but those named is taken anew, on the reports of the
kinds that judge them (seconds, for `fetch_layer_s`); with --cores, none but those of experts on the cores, with each engine's factors.
Uncertainties are the bundled ones, which come from such errors of all machines together (a fold's own rows have a small part in them),
wider where few other machines' reports are of the same engine. Minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.fits.engines import (
    _ONLY_JUDGED,
    GENERIC,
    JUDGED_BY,
    OF_CORES,
    OF_CORES_TOO,
    Problem,
    is_kept_apart,
    solve,
)

from moeplan.base.errors import MoeplanError
from moeplan.papers.field.machine import NotExpressible
from moeplan.papers.field.predict import Predicted, predict_setup, speed
from moeplan.papers.field.rows import Report, read_reports
from moeplan.papers.field.scores import KINDS, cuts, score
from moeplan.papers.field.setup import remade, set_up
from moeplan.specs.machines.engines import fitted_table

FOLDS = 8
_COLUMNS = (
    ("median", "median_relative_error"), ("p90", "p90_relative_error"), ("bias", "bias"), ("held", "coverage"),
    ("half-width", "median_half_width"), ("tau", "kendall_tau"),
)  # fmt: skip


def main() -> None:
    """Print the scores of machines left out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--reports")
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(GENERIC))
    parser.add_argument("--cores", action="store_true", help="the constants of experts on the cores, on their reports")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", action="store_true", help="every row too")
    given = parser.parse_args()
    only, groups = (OF_CORES, OF_CORES_TOO) if given.cores else (tuple(given.only), ())
    rows = left_out(read_reports(given.reports), given.folds, only, groups)
    found = scores(rows)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    if given.rows:
        for row in sorted(rows, key=lambda one: one.report.kind):
            assert row.value is not None and row.low is not None and row.high is not None
            held = "" if row.low <= row.report.measured <= row.high else "  not held"
            print(f"{row.report.id:8} {row.report.kind:14} measured {row.report.measured:9.2f}  predicted {row.value:9.2f} "
                  f"[{row.low:9.2f}, {row.high:9.2f}]  {row.bound:8} {row.report.rig}{held}")  # fmt: skip


def left_out(
    reports: Sequence[Report], folds: int, only: Sequence[str] = (), groups: Sequence[str] = ()
) -> list[Predicted]:
    """Return the reports that can be predicted, each under constants that were fitted without its machine's fold.

    only: the constants that are fitted, on the reports of the kinds that judge them, with engines' factors called `groups`; empty: all, on
    all.
    """
    fitted, others = [], []
    places = {kind.split("-")[0] for kind, names in JUDGED_BY.items() if set(names) & set(only)}
    for report in reports:
        if report.reason is None and only and report.kind.split("-")[0] not in places:
            continue
        try:
            setup = set_up(report)
            speed(setup)
        except (NotExpressible, MoeplanError) as error:
            print(f"not predicted: {report.id}: {error}", file=sys.stderr)
            continue
        (others if report.num_gpus > 1 or is_kept_apart(report) else fitted).append(setup)
    problem = Problem(fitted)
    if only:
        kept = {"generic": only}
        problem.kept = {index for index, (where, name) in enumerate(problem.names) if name in kept.get(where, groups)}
    columns = list(range(len(problem.names))) if problem.kept is None else sorted(problem.kept)
    x = problem.vector(fitted_table())
    at = problem.errors(x)
    print("slopes of every row by every constant", file=sys.stderr, flush=True)
    jacobian = problem.jacobian(x, at)
    names = sorted({setup.report.rig for setup in fitted})
    every = np.array([setup.report.id not in _ONLY_JUDGED for setup in fitted])
    found: dict[str, Predicted] = {}
    for number in range(folds):
        out = [row for row, setup in enumerate(fitted) if names.index(setup.report.rig) % folds == number]
        if not out:
            continue
        rows = every.copy()
        rows[out] = False
        moved = x.copy()
        moved[columns] = solve(jacobian[:, columns], at, x[columns], rows)
        table = problem.table(moved)
        for name, constant in table["generic"].items():
            constant["uncertainty"] = fitted_table()["generic"][name]["uncertainty"]
        table["architectures"] = fitted_table()["architectures"]
        table["machines"] = problem.machines(rows)
        for row in out:
            found[fitted[row].report.id] = predict_setup(remade(fitted[row], table))
        print(f"fold {number + 1} of {folds}", file=sys.stderr, flush=True)
    for setup in others:
        found[setup.report.id] = predict_setup(setup)
    return [found[report.id] for report in reports if report.id in found]


def scores(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Return the scores by kind (one card, or none) and by cut."""
    single = [row for row in rows if row.report.num_gpus <= 1]
    kinds = {kind: score([row for row in single if row.report.kind == kind]) for kind in KINDS}
    others = {name: score([row for row in rows if holds(row.report)]) for name, holds in cuts().items()}
    known = {row.report.rig for row in single if not is_kept_apart(row.report)}
    others["never fitted"] = score([row for row in rows if is_kept_apart(row.report) and row.report.rig not in known])
    return {"kinds": kinds, "cuts": others, "all": score(rows)}


def show(found: dict[str, Any]) -> None:
    """Print scores as a table."""
    print(f"{'':22} rows  " + "  ".join(f"{name:>10}" for name, _ in _COLUMNS))
    for name, row in (*found["kinds"].items(), *found["cuts"].items(), ("all", found["all"])):
        values = "  ".join(f"{'' if row[key] is None else format(row[key], '.3f'):>10}" for _, key in _COLUMNS)
        print(f"{name:22} {row['n']:4}  {values}")


if __name__ == "__main__":
    main()
