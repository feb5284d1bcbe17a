"""How much two of a machine's own lines help: `python -m benchmarks.learning [--left-out] [--json]`.

Of every machine with four or more public reports, two are given to the update that `moeplan calibrate --from llama-bench` makes, and
the others are predicted before and after. Which two is chosen without their speeds: those that leave the others least uncertain. Beside
it stand the mean over all pairs (to first order) and how many of the others the intervals hold. The bundled constants have seen these
machines; with --left-out each starts from constants that were fitted without it, as a new machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.base.errors import MoeplanError
from moeplan.calibrate.fitting.adjust import movable, moved, with_constants
from moeplan.calibrate.fitting.update import Measured, beliefs, linear, untold, updated
from moeplan.papers.field.machine import NotExpressible
from moeplan.papers.field.predict import predict_setup, speed
from moeplan.papers.field.rows import Report, read_reports
from moeplan.papers.field.setup import Setup, set_up
from moeplan.specs.machines.engines import fitted_table
from moeplan.specs.machines.profile import Profile

LEAST_ROWS = 4
_PHASES = ("decode", "prompt")
_SAME = 1e-3
"""Two median errors that differ by less than that share are the same."""
Array = npt.NDArray[np.float64]


def main() -> None:
    """Print what two lines do for each machine."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--reports")
    parser.add_argument(
        "--left-out", action="store_true", help="refit the constants without each machine first (minutes)"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rigs: dict[str, list[Report]] = defaultdict(list)
    for report in usable(read_reports(given.reports)):
        rigs[report.rig].append(report)
    rigs = {rig: reports for rig, reports in rigs.items() if len(reports) >= LEAST_ROWS}
    tables = _left_out_tables(given.reports, rigs) if given.left_out else {}
    found = []
    for rig, reports in rigs.items():
        found.append(learn(rig, [set_up(report, tables.get(rig)) for report in reports]))
        print(f"{rig}: done", file=sys.stderr, flush=True)
    document = summary(found)
    print(json.dumps(document, indent=1)) if given.json else _print(document)


def usable(reports: Sequence[Report]) -> list[Report]:
    """Return the reports that can be predicted."""
    found = []
    for report in reports:
        if report.num_gpus > 1:
            continue  # a profile of several cards is not learned
        try:
            speed(set_up(report))
        except (NotExpressible, MoeplanError):
            continue
        found.append(report)
    return found


def learn(rig: str, setups: Sequence[Setup]) -> dict[str, Any]:
    """Return what two of a machine's rows do for the others."""
    # Rows of one machine may be of the card and of the cores alone: constants go by their names.
    base = next((setup.profile for setup in setups if setup.profile.device.kind == "gpu"), setups[0].profile)
    predict = [_on(base, setup) for setup in setups]
    speeds = [_speed(setup) for setup in setups]
    rows = [
        Measured(tokens_per_s=value, relative_deviation=0.0, predict=each)
        for value, each in zip(speeds, predict, strict=True)
    ]
    before, slopes = linear(base, rows)
    choice = movable(base)
    prior, others = beliefs(choice)
    noise = (np.abs(slopes) @ others) ** 2
    off = before - np.log(speeds)
    pairs = list(itertools.combinations(range(len(rows)), 2))
    chosen = min(pairs, key=lambda pair: (round(_left(prior, slopes, noise, pair), 9), pair))
    update = updated(base, [rows[row] for row in chosen], "two of its rows")
    rest = [row for row in range(len(rows)) if row not in chosen]
    after = np.array([predict[row](update.profile) for row in rest])
    measured = np.array([speeds[row] for row in rest])
    told = [untold(choice, slopes[list(pair)], -off[list(pair)]) is None for pair in pairs]
    first = [_linear_errors(prior, slopes, noise, off, pair, told=yes) for pair, yes in zip(pairs, told, strict=True)]
    held, widths = _intervals(base, update.profile, [setups[row] for row in rest], measured)
    return {
        "rig": rig, "rows": len(rows), "given": [setups[row].report.id for row in chosen],
        "median_error_before": float(np.median(np.abs(np.expm1(off[rest])))),
        "median_error_after": float(np.median(np.abs(after / measured - 1))),
        "pairs_before": statistics.mean(one for one, _ in first), "pairs_after": statistics.mean(other for _, other in first),
        "kept": update.kept, "pairs_kept": 1 - statistics.mean(told), "coverage_after": held, "half_width_after": widths,
        "log_errors": {
            phase: [float(one) for one, setup in zip(off, setups, strict=True) if _phase(setup) == phase] for phase in _PHASES
        },
    }  # fmt: skip


def common_share(groups: Sequence[Sequence[float]]) -> float | None:
    """Return how much of the variance of errors is common to a machine's lines: between machines over all, by analysis of variance.

    groups: logarithms of predicted over measured, of each machine; None where no machine has two. No update can gain more than this share.
    """
    several = [np.asarray(each) for each in groups if len(each) > 1]
    count, size = len(several), sum(len(each) for each in several)
    if count < 2:
        return None
    whole = np.concatenate(several).mean()
    within = sum(float(((each - each.mean()) ** 2).sum()) for each in several) / (size - count)
    spread = sum(len(each) * float(each.mean() - whole) ** 2 for each in several) / (count - 1)
    usual = (size - sum(len(each) ** 2 for each in several) / size) / (count - 1)
    between = max(0.0, (spread - within) / usual)
    return between / (between + within) if between + within > 0 else None


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the machines, those that two rows help most first, and how many are halved."""
    rows = sorted(found, key=lambda one: one["median_error_after"] / one["median_error_before"])
    return {
        "machines": rows,
        "halved": sum(one["median_error_after"] <= one["median_error_before"] / 2 for one in rows),
        "halved_mean_over_pairs": sum(one["pairs_after"] <= one["pairs_before"] / 2 for one in rows),
        "better": sum(one["median_error_after"] < one["median_error_before"] * (1 - _SAME) for one in rows),
        "worse": sum(one["median_error_after"] > one["median_error_before"] * (1 + _SAME) for one in rows),
        "untold": sum(one["kept"] is not None for one in rows),
        "median_before": statistics.median(one["median_error_before"] for one in rows),
        "median_after": statistics.median(one["median_error_after"] for one in rows),
        "coverage_after": statistics.mean(one["coverage_after"] for one in rows),
        "common_share": {phase: common_share([one["log_errors"][phase] for one in rows]) for phase in _PHASES},
    }


def _phase(setup: Setup) -> str:
    return _PHASES[0] if setup.report.metric == "decode_tokens_per_s" else _PHASES[1]


def _speed(setup: Setup) -> float:
    report = setup.report
    return setup.prompt_tokens / report.measured if report.metric == "ttft_s" else report.measured


def _on(base: Profile, setup: Setup) -> Callable[[Profile], float]:
    """Return a row's speed as a function of a machine that `base` became: its own constants move as those of `base` did."""
    known = dict(base.constants())

    def predict(profile: Profile) -> float:
        return speed(dataclasses.replace(setup, profile=_moved_alike(known, profile, setup.profile)))

    return predict


def _moved_alike(known: Mapping[str, Any], profile: Profile, own: Profile) -> Profile:
    factors = {
        name: constant.value / known[name].value
        for name, constant in profile.constants()
        if name in known and known[name].value > 0 and constant.value != known[name].value
    }
    if own.device.kind == "cpu":  # the cores' rates stand for the device's
        alike = {
            "host.cpu.memory_bytes_per_s": "device.memory_bytes_per_s",
            "host.cpu.flops_per_s": "device.peak_flops_per_s.float16",
        }
        for name, other in alike.items():
            factors |= {other: factors[name]} if name in factors else {}
    return moved(own, factors)


def _left(prior: Array, slopes: Array, noise: Array, pair: tuple[int, int]) -> float:
    """Return how uncertain the other rows are, in the median, once those of `pair` are known."""
    given = slopes[list(pair)]
    seen = given @ prior @ given.T + np.diag(noise[list(pair)])
    left = prior - prior @ given.T @ np.linalg.solve(seen, given @ prior)
    others = np.delete(slopes, pair, axis=0)
    return float(np.median(np.einsum("ri,ij,rj->r", others, left, others)))


def _linear_errors(
    prior: Array, slopes: Array, noise: Array, off: Array, pair: tuple[int, int], *, told: bool
) -> tuple[float, float]:
    """Return the median error of the other rows before and after `pair` is known, to first order; told: whether it says anything."""
    given = slopes[list(pair)]
    seen = given @ prior @ given.T + np.diag(noise[list(pair)])
    now = off - slopes @ (prior @ given.T @ np.linalg.solve(seen, off[list(pair)])) * told
    before, after = (np.median(np.abs(np.expm1(np.delete(each, pair)))) for each in (off, now))
    return float(before), float(after)


def _intervals(base: Profile, profile: Profile, setups: Sequence[Setup], measured: Array) -> tuple[float, float]:
    """Return the share of rows that their intervals hold on the moved machine, and the median half-width."""
    known, beliefs = dict(base.constants()), dict(profile.constants())
    held, widths = [], []
    for setup, value in zip(setups, measured, strict=True):
        own = _moved_alike(known, profile, setup.profile)
        sure = {name: dataclasses.replace(constant, relative_uncertainty=beliefs[name].relative_uncertainty)
                for name, constant in own.constants() if name in beliefs and beliefs[name] != known.get(name)}  # fmt: skip
        found = predict_setup(dataclasses.replace(setup, profile=with_constants(own, sure)))
        low, high = sorted(_tokens(setup, end) for end in (found.low, found.high))
        held.append(float(low <= value <= high))
        widths.append((high - low) / 2 / float(_tokens(setup, found.value)))
    return statistics.mean(held), statistics.median(widths)


def _tokens(setup: Setup, value: float | None) -> float:
    """Return a figure as tokens a second."""
    assert value is not None
    return setup.prompt_tokens / value if setup.report.metric == "ttft_s" else value


def _left_out_tables(path: str | None, rigs: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return constants that were fitted without each machine, to first order from the bundled ones."""
    from benchmarks.fits.engines import Problem, solve

    setups = [set_up(report) for report in usable(read_reports(path))]
    problem = Problem(setups)
    x = problem.vector(fitted_table())
    at = problem.errors(x)
    jacobian = problem.jacobian(x, at)
    found = {}
    for rig in rigs:
        rows = np.array([setup.report.rig != rig for setup in setups])
        table = problem.table(solve(jacobian, at, x, rows))
        for name, row in table["generic"].items():
            row["uncertainty"] = fitted_table()["generic"][name]["uncertainty"]
        table["architectures"], table["machines"] = fitted_table()["architectures"], problem.machines(rows)
        found[rig] = table
    return found


def _print(document: Mapping[str, Any]) -> None:
    for one in document["machines"]:
        ratio = one["median_error_after"] / one["median_error_before"]
        print(f"{one['rig']:40} {one['rows']:3} rows, given {' '.join(one['given']):12} the others {one['median_error_before']:6.1%} -> "
              f"{one['median_error_after']:6.1%} (x {ratio:.2f}); all pairs {one['pairs_before']:6.1%} -> {one['pairs_after']:6.1%}; "
              f"intervals hold {one['coverage_after']:.0%}, half-width {one['half_width_after']:.0%}")  # fmt: skip
    print(f"{len(document['machines'])} machines: halved {document['halved']}, mean over pairs {document['halved_mean_over_pairs']}, "
          f"better {document['better']}, worse {document['worse']}, constants kept {document['untold']}; "
          f"median error {document['median_before']:.1%} -> {document['median_after']:.1%}, "
          f"intervals hold {document['coverage_after']:.0%}")  # fmt: skip
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in document["common_share"].items() if share is not None)
    print(f"of the variance of errors, common to a machine's lines: {shares}")


if __name__ == "__main__":
    main()
