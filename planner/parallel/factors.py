"""What each decision is worth, alone and together: one baseline, one workload, every combination, parts that add up.

Modelled: four factors, each off (as in plain expert parallelism) or on: where experts sit, how many copies they have, which all-to-all
carries tokens, what overlaps; a fifth where the plan also divides the model or chooses kernels otherwise. All combinations are
predicted. A factor's *share* is its Shapley value: the mean, over all orders in which factors can be switched on, of what it saves
then. Shares add up to the whole. What it saves *alone* and *last* stand beside it; what alone ones leave of the whole is the
*interaction*. Ignored: what moving there costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...base.errors import InputError, UnknownName
from ...sim.parallel.simulate import EpPrediction
from ...specs.schedules.parallel import ALL_TO_ALLS, PLACEMENTS, ExpertParallelSchedule
from .difference import Gain, gain
from .evidence import REPORT
from .search import EpSearch, describe

PLACEMENT, REPLICAS, EXCHANGE, OVERLAP, REST = "placement", "replicas", "all-to-all", "overlap", "division and kernels"
FACTORS = (PLACEMENT, REPLICAS, EXCHANGE, OVERLAP)
TWO_BATCH = "two-batch"
# Multiprocessors of 132 that DeepEP's normal kernels take (`Buffer.num_sms`); its low-latency kernels take none while tokens travel.
NORMAL_SM_FRACTION = 20 / 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What the factors are when they are on."""

    placement: str
    replicas: int
    exchange: str
    overlap: ExpertParallelSchedule
    """Whose pipeline is taken."""
    whole: ExpertParallelSchedule
    """Whose other options are taken: how copies are chosen, and what no factor says."""

    def words(self, name: str) -> str:
        """Return what a factor becomes, in a few words."""
        pipeline = self.overlap.pipeline
        batches = f"{pipeline.micro_batches} batches in alternation"
        groups = f"{pipeline.num_groups} {pipeline.split} groups"
        return {
            PLACEMENT: self.placement, REPLICAS: f"{self.replicas} copies", EXCHANGE: self.exchange,
            OVERLAP: batches if pipeline.micro_batches > 1 else groups if self.overlap.num_groups > 1 else "as it is",
            REST: _rest_words(self.whole),
        }[name]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorRow:
    """One factor."""

    name: str
    off: str
    on: str
    alone: Gain
    """Switched on in the baseline."""
    last: Gain
    """Switched on when all others are."""
    share: Gain
    """Its part of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorTable:
    """All of them."""

    baseline: EpPrediction
    rows: tuple[FactorRow, ...]
    whole: Gain
    interaction: Gain
    """The whole less what the factors save alone."""
    fixed: Mapping[str, str]
    """Factors that the engine which is planned for decides itself, and what it does: no rows of the table."""
    combinations: tuple[tuple[tuple[str, ...], EpPrediction, int], ...]
    """Factors that are on, the prediction, and the bytes that are missing on each rank (0 where it fits)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values, as plan.json holds it."""
        return {
            "baseline": {
                "name": self.baseline.schedule.name, "description": describe(self.baseline.schedule), "step_s": self.baseline.step_s,
            },
            "rows": [
                {"factor": row.name, "off": row.off, "on": row.on, "alone": row.alone.to_dict(), "last": row.last.to_dict(),
                 "share": row.share.to_dict()}
                for row in self.rows
            ],
            "whole": self.whole.to_dict(), "interaction": self.interaction.to_dict(), "fixed": dict(self.fixed),
            "combinations": [
                {"on": list(names), "step_s": one.step_s, "relative_uncertainty": one.relative_uncertainty,
                 "max_over_mean_load": one.max_over_mean_load, "missing_bytes": missing}
                for names, one, missing in self.combinations
            ],
        }  # fmt: skip


def levels_of(
    best: ExpertParallelSchedule,
    base: ExpertParallelSchedule,
    asked: Mapping[str, str],
    *,
    replicas: int,
    prefill: bool,
    nodes: int,
    fixed_exchange: bool = False,
) -> Levels:
    """Return the levels of the factors: those asked for, else the best's where it has any, else what engines commonly do.

    asked: values by factor. replicas: copies where neither says. fixed_exchange: an engine is named, which chooses its exchange itself.
    Raises UnknownName or InputError for a value that a factor cannot have.
    """
    for name in asked:
        if name not in FACTORS:
            raise UnknownName("--factor", name, FACTORS)
    policy = asked.get(PLACEMENT) or (
        best.placement.policy if best.placement.policy != base.placement.policy else "eplb"
    )
    if policy not in PLACEMENTS:
        raise UnknownName(f"--factor {PLACEMENT}", policy, PLACEMENTS)
    usual = "hierarchical" if nodes > 1 and base.all_to_all.kind != "hierarchical" else "all-choices"
    if not prefill and base.all_to_all.kind != "all-choices":
        usual = "all-choices"
    if fixed_exchange and EXCHANGE not in asked:
        usual = base.all_to_all.kind
    kind = asked.get(EXCHANGE) or (best.all_to_all.kind if best.all_to_all.kind != base.all_to_all.kind else usual)
    if kind not in ALL_TO_ALLS:
        raise UnknownName(f"--factor {EXCHANGE}", kind, ALL_TO_ALLS)
    count = asked.get(REPLICAS)
    if count is not None and not (count.isascii() and count.isdigit() and len(count) < 7):
        raise InputError(
            f"--factor {REPLICAS}", count, "not a count of slots", "write for instance --factor replicas=32"
        )
    overlap = best if best.overlaps and OVERLAP not in asked else base.with_options(pipeline__micro_batches=2)
    if OVERLAP in asked:
        overlap = _overlap(asked[OVERLAP], base)
    copies = int(count) if count is not None else best.placement.num_redundant or replicas
    return Levels(placement=policy, replicas=copies, exchange=kind, overlap=overlap, whole=best)


def check_told(
    search: EpSearch, base: ExpertParallelSchedule, levels: Levels, asked: Mapping[str, str], engine: str
) -> None:
    """Return nothing; raises InputError for a level that was asked for and that the engine which is planned for does not run."""
    for name, value in asked.items():
        wanted = combined(search, base, levels, (PLACEMENT, REPLICAS) if name == REPLICAS else (name,))
        told = search.told(wanted)
        if told is None or _level(name, told) != _level(name, wanted):
            does = "no such schedule" if told is None else f"{_words(_level(name, told))} instead"
            raise InputError(
                f"--factor {name}", value, f"{engine} runs {does}", "name another level, or leave out --for"
            )


def fixed_by(
    search: EpSearch, base: ExpertParallelSchedule, levels: Levels, asked: Mapping[str, str]
) -> dict[str, str]:
    """Return the factors that the engine which is planned for does not let one change, and what it does; none where no engine is named."""
    found = {}
    for name in (EXCHANGE, OVERLAP) if search.engine_runs is not None else ():
        told = search.told(combined(search, base, levels, (name,)))
        if name not in asked and (told is None or _level(name, told) == _level(name, base)):
            found[name] = _words(_level(name, base))
    return found


def _level(name: str, schedule: ExpertParallelSchedule) -> tuple[object, ...]:
    """Return what of a schedule a factor decides."""
    placement, pipeline = schedule.placement, schedule.pipeline
    return {
        PLACEMENT: (placement.policy,), REPLICAS: (placement.num_redundant,), EXCHANGE: (schedule.all_to_all.kind,),
        OVERLAP: (pipeline.split, schedule.num_groups, pipeline.micro_batches),
    }[name]  # fmt: skip


def _words(level: tuple[object, ...]) -> str:
    """Return the level of a factor in words."""
    if len(level) == 1:
        return str(level[0])
    split, groups, batches = level
    return (
        f"{batches} batches in alternation"
        if batches != 1
        else "no overlap"
        if split == "none"
        else f"{split}-{groups}"
    )


def _overlap(text: str, base: ExpertParallelSchedule) -> ExpertParallelSchedule:
    """Return a schedule that overlaps as named: two-batch, or expert-N or token-N groups."""
    if text == TWO_BATCH:
        return base.with_options(pipeline__micro_batches=2)
    split, _, count = text.partition("-")
    if split in ("expert", "token") and count.isascii() and count.isdigit() and 1 < int(count[:4]) <= 256:
        return base.with_options(pipeline__split=split, pipeline__num_groups=int(count[:4]))
    raise InputError(f"--factor {OVERLAP}", text, "not a way to overlap", "write two-batch, expert-4 or token-2")


def combined(
    search: EpSearch, base: ExpertParallelSchedule, levels: Levels, on: Sequence[str]
) -> ExpertParallelSchedule:
    """Return plain expert parallelism with some factors switched on."""
    changes: dict[str, Any] = {}
    whole = levels.whole
    if REST in on:
        changes |= {"parallel__attention": whole.parallel.attention, "parallel__experts": whole.parallel.experts,
                    "kernel__choice": whole.kernel.choice}  # fmt: skip
    if PLACEMENT in on:
        changes["placement__policy"] = levels.placement
    if REPLICAS in on:
        changes["placement__num_redundant"] = levels.replicas
        changes |= {"replica__choice": whole.replica.choice, "replica__load_cap": whole.replica.load_cap,
                    "replica__seed": whole.replica.seed}  # fmt: skip
    if EXCHANGE in on:
        changes["all_to_all__kind"] = levels.exchange
        if levels.exchange == whole.all_to_all.kind:
            changes["all_to_all__tiers"] = whole.all_to_all.tiers
    kind = changes.get("all_to_all__kind", base.all_to_all.kind)
    if OVERLAP in on:
        pipeline = levels.overlap.pipeline
        quiet = kind == "all-choices" and not search.simulation.prefill
        changes |= {
            "pipeline__split": pipeline.split, "pipeline__num_groups": pipeline.num_groups,
            "pipeline__micro_batches": pipeline.micro_batches,
            "pipeline__all_to_all_sm_fraction": 0.0 if quiet else pipeline.all_to_all_sm_fraction or NORMAL_SM_FRACTION,
        }  # fmt: skip
        if pipeline.split == "expert":
            slots = (
                search.placements.num_slots(changes.get("placement__num_redundant", 0)) // search.simulation.num_ranks
            )
            changes["pipeline__num_groups"] = min(pipeline.num_groups, slots)
    name = " + ".join(on) if on else base.name
    if "replica__choice" in changes and changes["replica__choice"] == "planned" and PLACEMENT not in on:
        changes["replica__choice"] = "nearest"  # there is no plan for the plain order
    return base.with_options(name=name, **changes)


def factor_table(
    search: EpSearch, base: ExpertParallelSchedule, levels: Levels, fixed: Mapping[str, str] | None = None
) -> FactorTable:
    """Return what the factors are worth on the reported steps; combinations that do not fit are predicted all the same, and say so.

    fixed: factors that are left out, as `fixed_by` names them.
    """
    free = tuple(name for name in FACTORS if name not in (fixed or {}))
    names: tuple[str, ...] = free
    if _rest(levels.whole) != _rest(base):
        try:
            for on in _subsets((*free, REST)):
                combined(search, base, levels, on)
            names = (*free, REST)
        except InputError:  # the best's division excludes some of them: it is then outside the table
            names = free
    found: dict[frozenset[str], EpPrediction] = {}
    missing: dict[frozenset[str], int] = {}
    for on in _subsets(names):
        schedule = combined(search, base, levels, on)
        key = frozenset(on)
        found[key] = search.predict(schedule, REPORT, parts=True, check_memory=False)
        load = search.evidence.loads(REPORT, search.placements.candidate(schedule), schedule)[0]
        missing[key] = max(0, search.simulation.rank_bytes(schedule, load) - search.simulation.budget_bytes)
    wrong, exact = search.simulation.uncertainties(), search.evidence.exact
    nothing, everything = frozenset[str](), frozenset(names)
    of_s = found[nothing].step_s

    def saved(terms: Sequence[tuple[float, frozenset[str]]]) -> Gain:
        return gain([(weight, found[key]) for weight, key in terms if weight], wrong, of_s=of_s, exact=exact)

    rows = []
    for name in names:
        others = [frozenset(on) for on in _subsets(tuple(each for each in names if each != name))]
        weights = [
            math.factorial(len(on)) * math.factorial(len(others[-1]) - len(on)) / math.factorial(len(names))
            for on in others
        ]
        share = [
            term for weight, on in zip(weights, others, strict=True) for term in ((weight, on), (-weight, on | {name}))
        ]
        rows.append(FactorRow(
            name=name, off=_off(base, name), on=levels.words(name), share=saved(share),
            alone=saved([(1, nothing), (-1, frozenset({name}))]), last=saved([(1, everything - {name}), (-1, everything)]),
        ))  # fmt: skip
    alone: list[tuple[float, frozenset[str]]] = [
        term for name in names for term in ((-1.0, nothing), (1.0, frozenset({name})))
    ]
    return FactorTable(
        baseline=found[nothing], rows=tuple(rows), fixed=fixed or {}, whole=saved([(1, nothing), (-1, everything)]),
        interaction=saved([(1, nothing), (-1, everything), *alone]),
        combinations=tuple((on, found[frozenset(on)], missing[frozenset(on)]) for on in _subsets(names)),
    )  # fmt: skip


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return all subsets, the smallest first, each in order."""
    return [each for size in range(len(names) + 1) for each in itertools.combinations(names, size)]


def _rest(schedule: ExpertParallelSchedule) -> tuple[object, ...]:
    return schedule.parallel, replace(schedule.kernel, bits="16")


def _rest_words(schedule: ExpertParallelSchedule) -> str:
    plain = schedule.parallel == ExpertParallelSchedule().parallel
    divided = "" if plain else f"{schedule.parallel.attention} attention, {schedule.parallel.experts} experts, "
    return f"{divided}{schedule.kernel.choice} kernels"


def _off(base: ExpertParallelSchedule, name: str) -> str:
    return {
        PLACEMENT: base.placement.policy, REPLICAS: "none", EXCHANGE: base.all_to_all.kind, OVERLAP: "none",
        REST: _rest_words(base),
    }[name]  # fmt: skip
