"""Fit the constants of serving engines to public reports, and judge them on rigs that were left out.

    python -m benchmarks.fits.engines [--reports FILE] [--folds 8] [--rounds 6] [--go-on] [--only NAME ... | --cores] [--skip RIGS]
                                      [--write]

Modelled: every prediction is the product's own; only its constants move. A generic engine has a value for each constant,
a backend and an engine on it a factor for a few of them, and all are drawn to their starting values (a ridge), so that an
engine with one report stays near the generic one. Steps are Gauss–Newton with weights that keep single reports from pulling
everything (a soft absolute loss). For the judgement, rigs are dealt out to folds; a fold's constants are one linear step
from the whole fit's with its rows taken out, and its rows are then predicted anew; the same without an engine's or a model's
rows is printed beside it. Uncertainties of constants are what the left-out rows of the kinds they decide were off by; on the cores each
machine counts once, and hosts of two sockets or of an unknown processor scatter more by a factor of their own.
Ignored: correlations between kinds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.base.errors import MoeplanError
from moeplan.papers.field.machine import NotExpressible, machine_of
from moeplan.papers.field.predict import speed
from moeplan.papers.field.programs import built_in
from moeplan.papers.field.rows import Report, read_reports
from moeplan.papers.field.setup import Setup, remade, set_up
from moeplan.specs.catalog import ENGINES_FOLDER
from moeplan.specs.machines.catalogue import find_gpu
from moeplan.specs.machines.engines import factor_owners, fitted_table, load_engine, unfamiliarity

Array = npt.NDArray[np.float64]

# Generic constants: starting value, and the deviation of its logarithm that it is drawn back with.
GENERIC: dict[str, tuple[float, float]] = {
    "memory_efficiency": (0.88, 0.05), "unit_bytes_per_cycle": (30.0, 0.2), "kv_efficiency": (0.75, 0.3), "graph_kernel_s": (2.6e-6, 0.4),
    "eager_kernel_s": (5e-6, 0.4), "python_kernel_s": (30e-6, 0.5), "pass_layer_s": (70e-6, 0.5), "step_s": (300e-6, 0.5),
    "dense_efficiency": (0.3, 0.4), "expert_efficiency": (0.4, 0.4), "attention_efficiency": (0.5, 0.5), "tile_tokens": (25.0, 0.5),
    "desktop_memory_share": (0.7, 0.2), "server_memory_share": (0.4, 0.25), "sockets_memory_share": (0.2, 0.25),
    "chiplet_share": (0.9, 0.15), "cpu_layer_s": (120e-6, 0.5), "cores_layer_s": (280e-6, 0.5), "cpu_step_share": (0.11, 0.3),
    "cpu_share": (0.3, 0.5), "upload_share": (0.8, 0.15), "fetch_layer_s": (375e-6, 0.2),
}  # fmt: skip
# What an engine may have of its own: constants that move together, and how far from one the factor is thought to lie.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "kernel_s": (("graph_kernel_s",), 0.2),
    "compute": (("dense_efficiency", "expert_efficiency", "attention_efficiency"), 0.25),
    "host": (("desktop_memory_share", "server_memory_share", "sockets_memory_share"), 0.2),
    "cpu_share": (("cpu_share",), 0.4),
}
# What a backend has of its own besides: kernels of attention, which reach less of bandwidth and peak on cards that few wrote them for.
OF_BACKENDS: dict[str, tuple[tuple[str, ...], float]] = {
    "kernel_s": GROUPS["kernel_s"], "compute": GROUPS["compute"], "attends": (("kv_efficiency", "attention_efficiency"), 0.25),
}  # fmt: skip
BACKENDS = ("rocm", "vulkan", "metal", "sycl")
_NOISE = 0.15
"""Two reports of one card, model and engine differ by so much (logarithm)."""
_COVER = 0.85
"""Share of a kind's left-out rows that its constants' uncertainty takes in; data sheets' and routing's come on top."""
_COVER_MACHINES, _BLIND = 0.88, ("U", "Y", "Z", "W", "N")
"""The same of experts on the cores. In every kind each machine counts once, and only those whose reports were written down before they
were predicted: they are off by more than machines that were in sight while the form was chosen, however they are left out."""
_ONLY_JUDGED = ("F02", "F05", "F06")
"""Reports that are cells of `reproduce engines` too: predicted and judged, but nothing is fitted to them."""
_LAST_KEPT_APART = {"W": 168, "N": 128}
"""Of the reports `W001` (`N001`) to this one, half of the machines are never fitted: new ones to judge by."""
# Which kind's errors a constant's uncertainty is.
JUDGED_BY: dict[str, tuple[str, ...]] = {
    "gpu-decode": (
        "memory_efficiency",
        "unit_bytes_per_cycle",
        "kv_efficiency",
        "graph_kernel_s",
        "eager_kernel_s",
        "python_kernel_s",
        "step_s",
    ),
    "gpu-prefill": ("dense_efficiency", "expert_efficiency", "attention_efficiency", "tile_tokens", "pass_layer_s"),
    "cpu-decode": (
        "desktop_memory_share",
        "server_memory_share",
        "sockets_memory_share",
        "chiplet_share",
        "cpu_layer_s",
        "cores_layer_s",
        "cpu_step_share",
    ),
    "cpu-prefill": ("cpu_share", "upload_share"),
    "cache-decode": ("fetch_layer_s",),
}


OF_CORES = (*JUDGED_BY["cpu-decode"], "cpu_share")
"""Constants of experts on the cores; slots and cards count for others."""
OF_CORES_TOO = ("host", "cpu_share")
"""Engines' factors of them."""
JUDGED = ("gpu-decode", "gpu-prefill", "cpu-decode", "cpu-prefill", "cache-decode", "cache-prefill")


class Problem:
    """The reports, and the constants as a vector of logarithms over their deviations."""

    def __init__(self, setups: list[Setup]) -> None:
        self.setups = setups
        self.reports = [setup.report for setup in setups]
        self.matter: npt.NDArray[np.bool_] | None = None
        """Which constants move which report; None until that was seen."""
        self.kept: set[int] | None = None
        """The constants that slopes are wanted of; None: all."""
        owners = sorted({owner(setup) for setup in setups})
        self.names: list[tuple[str, str]] = [("generic", name) for name in GENERIC]
        self.names += [(f"*/{backend}", group) for backend in BACKENDS for group in OF_BACKENDS]
        self.names += [(each, group) for each in owners for group in GROUPS]

    def deviation(self, index: int) -> float:
        """Return how far a constant's logarithm is thought to lie from its starting value."""
        where, name = self.names[index]
        return GENERIC[name][1] if where == "generic" else _group(name)[1]

    def table(self, x: Array) -> dict[str, Any]:
        """Return the constants that `x` stands for, as the engines' file has them."""
        generic = {name: {"value": start, "uncertainty": 0.0} for name, (start, _) in GENERIC.items()}
        factors: dict[str, dict[str, float]] = defaultdict(dict)
        for index, (where, name) in enumerate(self.names):
            factor = math.exp(float(x[index]) * self.deviation(index))
            if where == "generic":
                generic[name]["value"] *= factor
            else:
                for each in _group(name)[0]:
                    factors[where][each] = factors[where].get(each, 1.0) * factor
        start = {name: GENERIC[name][0] for name in GROUPS["compute"][0]}
        return {"citation": "being fitted", "start": start, "generic": generic, "factors": dict(factors)}

    def machines(self, rows: npt.NDArray[np.bool_]) -> dict[str, int]:
        """Return of how many machines `rows` are, by whose factors count for them."""
        rigs: dict[str, set[str]] = defaultdict(set)
        for setup, there in zip(self.setups, rows, strict=True):
            if there:
                rigs[owner(setup)].add(setup.report.rig)
        return {name: len(found) for name, found in sorted(rigs.items())}

    def unfamiliarity(self) -> Array:
        """Return how much further off each report may be, its own machine left out, than one of an engine with very many."""
        all_of = self.machines(np.ones(len(self.setups), dtype=bool))
        found = []
        for setup, report in zip(self.setups, self.reports, strict=True):
            early = load_engine(str(setup.profile.engine and setup.profile.engine.name)).earlier(built_in(report))
            found.append(unfamiliarity(0 if early else all_of[owner(setup)] - 1))
        return np.array(found)

    def hosts(self) -> list[str]:
        """Return of what sort each report's host is: of several sockets, not known, or one known processor."""
        found = []
        for report in self.reports:
            parts = machine_of(report, None, [])[1]
            known = parts.cpu is not None or parts.unified_memory
            found.append("sockets" if parts.sockets > 1 else "one" if known else "unknown")
        return found

    def vector(self, table: Mapping[str, Any]) -> Array:
        """Return the constants of a table as a vector: where a fit goes on from."""
        found = np.zeros(len(self.names))
        for index, (where, name) in enumerate(self.names):
            if where == "generic":
                ratio = table["generic"][name]["value"] / GENERIC[name][0]
            else:
                ratio = table["factors"].get(where, {}).get(_group(name)[0][0], 1.0)
            found[index] = math.log(ratio) / self.deviation(index)
        return found

    def log_ratio(self, row: int, x: Array) -> float:
        """Return the logarithm of predicted over measured speed."""
        setup, report = self.setups[row], self.reports[row]
        measured = setup.prompt_tokens / report.measured if report.metric == "ttft_s" else report.measured
        return math.log(speed(remade(setup, self.table(x))) / measured)

    def errors(self, x: Array, rows: list[int] | None = None) -> Array:
        """Return the log ratios of some reports, all of them for None."""
        return np.array([self.log_ratio(row, x) for row in (range(len(self.reports)) if rows is None else rows)])

    def touches(self, setup: Setup, index: int) -> bool:
        """Return whether a constant can count for a report."""
        where, group = self.names[index]
        engine, _, backend = owner(setup).partition("/")
        maker = find_gpu(str(setup.report.cards[0].get("name"))).backend if setup.report.cards else None
        names = () if where == "generic" else _group(group)[0]
        return where == "generic" or any(where in factor_owners(engine, backend, maker, name) for name in names)

    def jacobian(self, x: Array, at: Array) -> Array:
        """Return how the log ratios move with each constant; `at`: what they are."""
        found = np.zeros((len(self.reports), len(x)))
        for index in range(len(x)) if self.kept is None else sorted(self.kept):
            moved = x.copy()
            moved[index] += 0.1
            for row, setup in enumerate(self.setups):
                if self.touches(setup, index) and (self.matter is None or self.matter[row, index]):
                    found[row, index] = (self.log_ratio(row, moved) - at[row]) / 0.1
        if self.matter is None:
            self.matter = found != 0
        return found


def _group(name: str) -> tuple[tuple[str, ...], float]:
    """Return which constants a factor moves, and how far from one it is thought to lie."""
    return GROUPS.get(name) or OF_BACKENDS[name]


def is_kept_apart(report: Report) -> bool:
    """Return whether a report is of a machine that no constant is ever fitted to: chosen by a hash of its name."""
    number = re.fullmatch(r"([A-Z])([0-9]{3})", report.id)
    if number is None or int(number[2]) > _LAST_KEPT_APART.get(number[1], 0):
        return False
    return hashlib.sha256(report.rig.encode()).digest()[0] % 2 == 0


def owner(setup: Setup) -> str:
    """Return whose factors count for a report: its engine's on its backend."""
    engine = setup.profile.engine
    assert engine is not None
    return f"{engine.name}/{engine.backend}"


def solve(jacobian: Array, at: Array, x: Array, rows: npt.NDArray[np.bool_]) -> Array:
    """Return the constants that fit `rows` best if errors were linear: weighted, and drawn to the starting values."""
    scaled = at / _NOISE
    weight = np.where(rows, 1.0 / np.sqrt(1.0 + (scaled / 1.5) ** 2), 0.0)
    weighted = jacobian * (weight / _NOISE**2)[:, None]
    left = jacobian.T @ weighted + np.eye(len(x))
    right = weighted.T @ (jacobian @ x - at)
    return np.linalg.solve(left, right)


def main() -> None:
    """Fit, judge, print, and write the constants where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--reports")
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--go-on", action="store_true", help="start from the bundled constants")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cores", action="store_true", help="from the bundled constants, fit those of the cores alone")
    parser.add_argument("--skip", help="leave out the reports of machines whose names match")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(GENERIC),
        help="from the bundled constants, fit these to the kinds that judge them",
    )
    given = parser.parse_args()
    usable = []
    for report in read_reports(given.reports):
        try:
            skipped = given.skip is not None and re.fullmatch(given.skip, report.rig)
            if report.num_gpus > 1 or is_kept_apart(report) or skipped:
                continue  # several cards have constants of their own, which are published ones: judged, never fitted
            setup = set_up(report)
            speed(setup)
            usable.append(setup)
        except (NotExpressible, MoeplanError) as error:
            print(f"left out: {report.id}: {error}", file=sys.stderr)
    if given.only or given.cores:
        _fit_in_part(usable, given)
        return
    problem = Problem(usable)
    x = problem.vector(fitted_table()) if given.go_on else np.zeros(len(problem.names))
    every = np.array([setup.report.id not in _ONLY_JUDGED for setup in usable])
    for number in range(given.rounds):
        at = problem.errors(x)
        print(f"round {number}: median |error| {np.median(np.abs(np.expm1(at))):.3f}", file=sys.stderr, flush=True)
        jacobian = problem.jacobian(x, at)
        step = solve(jacobian, at, x, every) - x
        x = x + np.clip(step, -1.0, 1.0)
    at = problem.errors(x)
    jacobian = problem.jacobian(x, at)
    print(f"{len(x)} constants and factors, worth {free_parameters(jacobian, at):.0f} free ones")
    judged = judge(problem, jacobian, at, x, [setup.report.rig for setup in usable], given.folds)
    report_scores(problem.reports, at, judged)
    others = {
        "engine": [owner(setup) for setup in usable],
        "model": [str(setup.report.row["model"]) for setup in usable],
    }
    for what, groups in others.items():
        ratios = judge(problem, jacobian, at, x, groups, len(set(groups)))
        for kind in JUDGED:
            mine = [row for row, report in enumerate(problem.reports) if report.kind == kind]
            print(f"{what}s left out: {kind:14} median {np.median(np.abs(np.expm1(ratios[mine]))):.3f}")
    table = with_uncertainty(problem, x, judged)
    if given.write:
        (ENGINES_FOLDER / "fitted.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        fitted_table.cache_clear()


def _fit_in_part(setups: list[Setup], given: argparse.Namespace) -> None:
    """Fit and judge some constants on the reports of the kinds that judge them, all others as bundled; write them where asked."""
    only, groups = (OF_CORES, OF_CORES_TOO) if given.cores else (tuple(given.only), ())
    judging = [kind for kind, names in JUDGED_BY.items() if set(names) & set(only)]
    places = {kind.split("-", 1)[0] for kind in judging}
    problem = Problem([setup for setup in setups if setup.report.kind.split("-", 1)[0] in places])
    problem.kept = {
        index for index, name in enumerate(problem.names) if name[1] in (only if name[0] == "generic" else groups)
    }
    columns = sorted(problem.kept)
    x, every = problem.vector(fitted_table()), np.array([one.id not in _ONLY_JUDGED for one in problem.reports])

    def fitted(rows: npt.NDArray[np.bool_]) -> Array:
        found = x.copy()
        found[columns] = solve(jacobian[:, columns], at, x[columns], rows)
        return found

    for _ in range(given.rounds):
        at = problem.errors(x)
        jacobian = problem.jacobian(x, at)
        x = x + np.clip(fitted(every) - x, -1.0, 1.0)
    at = problem.errors(x)
    jacobian = problem.jacobian(x, at)
    judged, rigs = np.zeros(len(at)), [one.rig for one in problem.reports]
    for rig in sorted(set(rigs)):
        out = [row for row, one in enumerate(rigs) if one == rig]
        rows = every.copy()
        rows[out] = False
        judged[out] = problem.errors(fitted(rows), out)
    report_scores(problem.reports, at, judged)
    new, table = with_uncertainty(problem, x, judged), json.loads(json.dumps(dict(fitted_table())))
    for name in only:
        table["generic"][name] = new["generic"][name]
    for group in groups:
        for where in sorted({owner(setup) for setup in problem.setups}):
            mine = new["factors"].get(where, {})
            table["factors"].setdefault(where, {})
            for name in GROUPS[group][0]:
                table["factors"][where].pop(name, None)
                table["factors"][where] |= {name: mine[name]} if name in mine else {}
    table["machines"] |= {
        where: count for where, count in new["machines"].items() if count > table["machines"].get(where, 0)
    }
    table["scatter"] = new.get("scatter", table.get("scatter", {}))
    table["left_out"] |= {kind: row for kind, row in new["left_out"].items() if kind in judging}
    print(json.dumps({name: table["generic"][name] for name in only} | {"scatter": table["scatter"]}))
    if given.write:
        (ENGINES_FOLDER / "fitted.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        fitted_table.cache_clear()


def free_parameters(jacobian: Array, at: Array) -> float:
    """Return how many unconstrained parameters the drawn-back ones are worth: the trace of what the data decide."""
    weight = 1.0 / np.sqrt(1.0 + (at / _NOISE / 1.5) ** 2) / _NOISE**2
    data = jacobian.T @ (jacobian * weight[:, None])
    return float(np.trace(np.linalg.solve(data + np.eye(len(data)), data)))


def judge(problem: Problem, jacobian: Array, at: Array, x: Array, groups: list[str], folds: int) -> Array:
    """Return each report's log ratio under constants fitted without its group's fold."""
    names = sorted(set(groups))
    found = np.zeros(len(at))
    for number in range(folds):
        out = [row for row, group in enumerate(groups) if names.index(group) % folds == number]
        if not out:
            continue
        rows = np.array([report.id not in _ONLY_JUDGED for report in problem.reports])
        rows[out] = False
        found[out] = problem.errors(solve(jacobian, at, x, rows), out)
    return found


def report_scores(reports: list[Report], fitted: Array, judged: Array) -> None:
    """Print errors by kind, of the fit and of rigs left out."""
    for kind in JUDGED:
        mine = np.array([report.kind == kind for report in reports])
        if not mine.any():
            continue
        ratio, inside = np.exp(judged[mine]), np.exp(fitted[mine])
        error = np.abs(ratio - 1)
        print(f"{kind:14} n {mine.sum():3}  rigs left out: median {np.median(error):.3f}  p90 {np.quantile(error, 0.9):.2f}  "
              f"bias {np.median(ratio):.2f}   in the fit: median {np.median(np.abs(inside - 1)):.3f}")  # fmt: skip
        worst = sorted(np.flatnonzero(mine), key=lambda row: -abs(judged[row]))[:8]
        spread = ", ".join(
            f"{q:.0%}: {np.expm1(np.quantile(np.abs(judged[mine]), q)):.2f}"
            for q in (0.5, 0.7, 0.8, 0.84, 0.87, 0.9, 0.95)
        )
        print(f"    off by, at quantile {spread}")
        print("    " + ", ".join(f"{reports[row].id} {math.exp(judged[row]):.2f}" for row in worst))


def _votes(problem: Problem, rows: list[int]) -> Array:
    """Return the weights of reports with which each machine counts once: an unseen machine is not as the best-known ones are."""
    rigs = [problem.reports[row].rig for row in rows]
    return np.array([1.0 / rigs.count(rig) for rig in rigs])


def _quantile(values: Array, weights: Array, share: float) -> float:
    """Return the value below which `share` of the weight lies."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(share * weights.sum(), reached, values[order]))


def _typical(problem: Problem, errors: Array, rows: list[int]) -> float:
    """Return the root mean square error of some reports, each machine counting once, what is far beyond the others as three times that."""
    weights = _votes(problem, rows)
    most = 3 * _quantile(errors[rows], weights, 2 / 3)
    return math.sqrt(float(np.average(np.minimum(errors[rows], most) ** 2, weights=weights)))


def architectures(problem: Problem) -> set[str]:
    """Return the generations of cards that reports are of."""
    found = {find_gpu(str(report.cards[0].get("name"))).architecture for report in problem.reports if report.cards}
    return {name for name in found if name is not None}


def with_uncertainty(problem: Problem, x: Array, judged: Array) -> dict[str, Any]:
    """Return the constants with uncertainties: the error that nine in ten left-out rows of their kind stay within."""
    table = problem.table(x)
    table["machines"] = problem.machines(np.ones(len(judged), dtype=bool))
    familiar = np.abs(judged) / problem.unfamiliarity()
    hosts, scattered = problem.hosts(), np.ones(len(judged))
    of_cores = np.array([report.kind == "cpu-decode" for report in problem.reports])
    if of_cores.any():
        table["scatter"] = {}
        base = _typical(problem, familiar, [row for row in np.flatnonzero(of_cores) if hosts[row] == "one"])
        for sort in ("sockets", "unknown"):
            rows = [row for row in np.flatnonzero(of_cores) if hosts[row] == sort]
            factor = max(1.0, _typical(problem, familiar, rows) / base) if rows else 1.0
            table["scatter"][sort] = round(factor, 2)
            scattered[rows] = factor
        prompts = [
            report.kind == "cpu-prefill" and hosts[row] == "unknown" for row, report in enumerate(problem.reports)
        ]
        scattered[prompts] = table["scatter"]["unknown"]  # cores and slot of a box that nobody describes
    for kind, names in JUDGED_BY.items():
        mine = [int(row) for row, report in enumerate(problem.reports) if report.kind == kind]
        if not mine:
            continue
        mine = [row for row in mine if problem.reports[row].id.startswith(_BLIND)] or mine
        weights, cover = _votes(problem, mine), _COVER_MACHINES if kind.startswith("cpu") else _COVER
        wide = float(np.expm1(_quantile((familiar / scattered)[mine], weights, cover)))
        for name in names:
            table["generic"][name]["uncertainty"] = round(wide, 3)
    for row in table["generic"].values():
        row["value"] = float(f"{row['value']:.4g}")
    table["factors"] = {
        where: {name: round(factor, 3) for name, factor in found.items() if abs(factor - 1) > 0.005}
        for where, found in sorted(table["factors"].items())
    }
    table["architectures"] = sorted(architectures(problem))
    table["left_out"] = {}
    for kind in JUDGED:
        errors = [abs(math.expm1(judged[row])) for row, report in enumerate(problem.reports) if report.kind == kind]
        if errors:
            median, worse = (round(float(np.quantile(errors, share)), 3) for share in (0.5, 0.9))
            table["left_out"][kind] = {"n": len(errors), "median_relative_error": median, "p90_relative_error": worse}
    table["citation"] = (
        f"fitted on {len(problem.reports)} public reports (python -m benchmarks.fits.engines), judged on rigs left out"
    )
    return table


if __name__ == "__main__":
    main()
