"""Fit what serving on many devices does that no single kernel shows, and judge it with whole sources left out.

    python -m benchmarks.fits.parallel [--write]

One constant: the speed that kernels and exchanges leave each other while both run on all multiprocessors. It is fitted to the
decoding figures and ratios of published clusters (LMSYS, DeepSeek, vLLM) by the least sum of squared logarithms, on a grid. Each source's
figures are then predicted with the constant fitted without it; what nine in ten of these are off by is the least width of an
interval. AIConfigurator's sample of whole servers and its tables of wide expert parallelism are never read here.
"""

from __future__ import annotations

import argparse
import json
import math
from unittest import mock

import numpy as np

from moeplan.papers.field.parallel.differences import PAIRS, run_of
from moeplan.papers.field.parallel.predict import Predicted, predict_row
from moeplan.papers.field.parallel.rows import Row, read_rows
from moeplan.sim.parallel import tiers
from moeplan.specs.machines.overlap import PARALLEL_FILE

GRID = tuple(round(0.6 + 0.01 * step, 2) for step in range(41))
FITTED_ON = ("LMSYS", "DeepSeek", "vLLM")
_HOLDS = 0.9


def source_of(row: Row) -> str:
    """Return who published a row; a ratio's runs say it."""
    pair = PAIRS.get(row.id)
    return row.source if pair is None else run_of(pair.above).source


def figures() -> list[Row]:
    """Return the rows that the constant matters for: decoding steps of clusters in two batches, and ratios of such."""
    found = []
    for row in read_rows():
        runs = [row] if row.kind != "difference" else [run_of(run) for run in _runs(row)]
        decodes = [each for each in runs if each.text("phase") == "decode" and "2" in each.text("overlap")]
        if row.group in ("serving", "difference") and decodes and source_of(row) in FITTED_ON:
            found.append(row)
    return found


def _runs(row: Row) -> list[tuple[str, object]]:
    pair = PAIRS.get(row.id)
    return [] if pair is None else [pair.above, pair.below]  # type: ignore[list-item]


def predictions(rows: list[Row]) -> dict[float, list[Predicted]]:
    """Return the predictions of rows for each value of the grid."""
    found = {}
    for value in GRID:
        with mock.patch.object(tiers, "shared_speed", lambda value=value: value):
            found[value] = [predict_row(row) for row in rows]
    return found


def best(errors: dict[float, list[float]], chosen: list[int]) -> float:
    """Return the value with the least squares of logarithms over the chosen rows."""
    return min(GRID, key=lambda value: sum(errors[value][row] ** 2 for row in chosen))


def main() -> None:
    """Fit, judge, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = figures()
    found = predictions(rows)
    errors = {
        value: [math.log(one.value / one.report.measured) if one.value else 0.0 for one in each]
        for value, each in found.items()
    }
    every = list(range(len(rows)))
    value = best(errors, every)
    print(f"shared_speed = {value}, fitted to {', '.join(row.id for row in rows)}")
    left_out: dict[str, dict[str, float]] = {}
    away: list[float] = []
    for source in FITTED_ON:
        mine = [at for at in every if source_of(rows[at]) == source]
        without = best(errors, [at for at in every if at not in mine])
        off = [errors[without][at] for at in mine]
        away += off
        median = round(float(np.median(np.abs(np.expm1(off)))), 3)
        left_out[source] = {"shared_speed": without, "n": len(mine), "median_relative_error": median}
        listed = ", ".join(f"{math.expm1(each):+.0%}" for each in off)
        print(f"without {source}: {without}; its {len(mine)} figures are off by {listed}")
    wide = round(float(np.quantile(np.expm1(np.abs(away)), _HOLDS)), 3)
    print(f"nine in ten left-out figures are within {wide:.0%}: no interval of a step is narrower")
    if given.write:
        table = {
            "shared_speed": value, "served_error": wide,
            "citation": f"fitted to {len(rows)} published figures of clusters (python -m benchmarks.fits.parallel), judged on "
            "sources left out",
            "fitted_on": [row.id for row in rows], "left_out": left_out,
        }  # fmt: skip
        PARALLEL_FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
