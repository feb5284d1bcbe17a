"""GRACE-MoE (arXiv 2509.25041): what each of its ingredients changes against Occult, on two nodes of two A100.

Modelled: OLMoE, DeepSeek-V2-Lite and Qwen3-30B-A3B, the paper's ladder (Occult, whose groups know devices but not nodes, with a
token once per rank; hierarchical exchange; affinity grouping with controlled sizes; one copy or as many as loads ask for,
drawn by weight; nearest copies first),
NVLink inside a node and 25 Gb/s between nodes, shared by a node's ranks, in and out together (the published exchange times
follow total traffic). A GPU is idle while it waits for the one with most rows and, in a flat exchange, for the one with most bytes of
its own between nodes: published, idle time after the first rung follows the deviation of load (1.90 and 1.48 times it, where the
deviation is 1.90 and 1.39 times), and the first rung, which moves no rows, halves it. A step takes its exchanges, its idle time
and the rest; the rest is OLMoE's published one, as a multiple of its exchanges after grouping.

The paper's routing is not public: tokens are drawn here from topics, each of which prefers a cluster of as many experts as a token
chooses. Three constants are fitted: how strongly tokens keep to their topic (to the cross-node traffic after grouping), how unevenly
experts are used (to the load deviation after grouping) and how far use drifts between profiling and serving (to the load deviation
after copying). How much longer a straggler takes than its expert kernels on the profile follows from OLMoE's published idle time, as
a multiple of its exchanges after grouping. A recording can take the draws' place. Ignored: what each model's rest is, and the
overlap of routing decisions with communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.units import GIGA, NS_PER_S
from ..planner.parallel.evidence import topology_of
from ..planner.placement.affinity import co_activation
from ..planner.placement.comparison import Candidate
from ..planner.placement.grace import GracePlan, grace_plan, node_clusters, node_groups, rank_groups
from ..planner.placement.occult import uniform_groups
from ..planner.placement.placement import Placement, from_rank_lists
from ..planner.placement.replica_choice import StaticChoice
from ..planner.placement.splits import StepTokens, source_ranks
from ..sim.parallel.program import INTER, INTRA, OP_EXPERT
from ..sim.parallel.simulate import ParallelSimulation
from ..sim.parallel.tiers import EpConstants, Tier
from ..sim.parallel.traffic import count_step
from ..specs.machines.profile_file import load_hardware
from ..specs.models import ModelSpec
from ..specs.models.load import load_model
from ..specs.schedules.parallel import ExpertParallelSchedule
from .cells import CHECKED, FITTED, PREDICTED, Cell, FittedConstant, Reproduction
from .published.grace_moe import (
    CITATION,
    GROUP_NOTES,
    GROUPED,
    GROUPINGS,
    INGREDIENTS,
    MODELS,
    NEAREST,
    NOTES,
    SPEEDUP_NOTE,
    SPEEDUPS,
    STEP_NOTES,
    STEPS,
    TABLE,
)

# The experts of every rank, layer by layer.
Groups = Sequence[Sequence[Sequence[int]]]
_NODES, _RANKS = 2, 4
# Batch 256 with prompts of 128: tokens of a step are divided over ranks; fewer are drawn, traffic is proportional.
_CONTEXT, _TOKENS, _LAYERS = 128, 8192, 4
_NETWORK_BITS_PER_S = 25 * GIGA
_NETWORK_LATENCY_S, _LINK_LATENCY_S = 20e-6, 5e-6
_VALUE_BYTES = 2
# The paper's ratio of group sizes (OLMoE), taken for all models.
_RATIO = 0.15
_CONTROLLED = "sizes by 0.15"
_OLMOE_EXCHANGE, _OLMOE_IDLE, _OLMOE_WHOLE = GROUPINGS[_CONTROLLED]
_REST = (_OLMOE_WHOLE - _OLMOE_EXCHANGE - _OLMOE_IDLE) / _OLMOE_EXCHANGE
# Where the fit looks: affinity of a token to its topic's experts, spread of experts' popularity (both in logits), drift.
_AFFINITIES, _SPREADS, _DRIFTS = (3.75, 4.0, 4.25), (2.5, 2.75), (0.9, 0.95)
_EXCHANGE, _CROSS, _INTRA, _IDLE, _DEVIATION = range(5)
# Rungs of the ladder, Occult first.
_TIERS, _CONTROL, _ONE, _WEIGHTED, _LAST = range(1, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The fitted constants of the draws."""

    affinity: float
    spread: float
    drift: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What the paper's table compares, with idle time in its two parts."""

    exchange_ns: float
    cross_bytes: float
    intra_bytes: float
    exchange_wait_ns: float
    """Waiting for the rank with most bytes of its own between nodes, where ranks exchange one by one."""
    kernel_wait_ns: float
    """Waiting for the rank with the longest expert kernels."""
    deviation: float
    """Standard deviation of rows over ranks."""

    def row(self, slowness: float) -> npt.NDArray[np.float64]:
        """Return the rows of `TABLE`, a straggler taking `slowness` times its kernels."""
        idle = self.exchange_wait_ns + slowness * self.kernel_wait_ns
        return np.array([self.exchange_ns, self.cross_bytes, self.intra_bytes, idle, self.deviation])


def draw_experts(
    routing: Routing, *, tokens: int, num_experts: int, top_k: int, layers: int, seed: int = 0
) -> npt.NDArray[np.int32]:
    """Return int32 [tokens, layers, top_k]: each token has a topic, whose cluster of experts it prefers, in every layer anew.

    There are as many topics as clusters of `top_k` experts. From the second half on, experts' popularity has drifted.
    """
    chosen, topics = np.empty((tokens, layers, top_k), np.int32), num_experts // top_k
    for layer in range(layers):
        # A generator of its own: a layer's topics and popular experts do not depend on how many tokens are drawn.
        rng = np.random.default_rng([seed, layer])
        cluster = rng.permutation(np.arange(num_experts) * topics // num_experts)
        before, after = rng.standard_normal((2, num_experts))
        later = np.sqrt(1 - routing.drift**2) * before + routing.drift * after
        popular = routing.spread * np.where(np.arange(tokens)[:, None] * 2 < tokens, before, later)
        topic = rng.integers(0, topics, tokens)
        score = (
            popular + routing.affinity * (cluster[None, :] == topic[:, None]) + rng.gumbel(size=(tokens, num_experts))
        )
        chosen[:, layer] = np.argpartition(-score, top_k, axis=1)[:, :top_k]
    return chosen


def ladder(model: ModelSpec, experts: npt.NDArray[np.int32], num_ranks: int = _RANKS) -> list[Measures]:
    """Return Occult's measures and those after each ingredient, planned on the first half of the tokens, measured on the second."""
    bench = _Bench.of(model, experts, num_ranks)
    flat = ExpertParallelSchedule(name="occult").with_options(placement__policy="occult")
    occult, grouped = (
        Candidate(placement=each, router=_home_router(each, rows)) for each, rows in (bench.occult(), bench.grouped())
    )
    one, copied = bench.copied(copies=1), bench.copied(copies=None)
    runs = [(occult, flat), (occult, bench.tiers), (grouped, bench.tiers)]
    runs += [(Candidate(placement=plan.placement, router=plan.router(nearest_first=nearest)), bench.tiers)
             for plan, nearest in ((one, False), (copied, False), (copied, True))]  # fmt: skip
    return [_measure(bench.simulation, candidate, schedule, bench.step) for candidate, schedule in runs]


def free_groups(model: ModelSpec, experts: npt.NDArray[np.int32]) -> Measures:
    """Return the measures of groups whose sizes nothing controls, without copies."""
    bench = _Bench.of(model, experts, _RANKS)
    rows = []
    for layer in range(experts.shape[1]):
        affinity = co_activation(bench.plan, layer, model.num_experts)
        nodes = node_groups(affinity, _NODES, _RANKS // _NODES)
        clusters = node_clusters(affinity, nodes, _RANKS // _NODES)
        rows.append(
            [[held[at] for at in group] for held, inside in zip(nodes, clusters, strict=True) for group in inside]
        )
    placement = from_rank_lists(rows, model.num_experts, _NODES)
    candidate = Candidate(placement=placement, router=_home_router(placement, rows))
    return _measure(bench.simulation, candidate, bench.tiers, bench.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """Tokens to plan on and to measure, and the paper's cluster."""

    simulation: ParallelSimulation
    plan: list[StepTokens]
    step: StepTokens
    num_ranks: int
    num_experts: int
    tiers: ExpertParallelSchedule

    @classmethod
    def of(cls, model: ModelSpec, experts: npt.NDArray[np.int32], num_ranks: int) -> _Bench:
        layers, half = experts.shape[1], len(experts) // 2
        model = dataclasses.replace(
            model, num_layers=layers, moe_layers=tuple(range(layers)), sliding_layers=(), recurrent_layers=()
        )
        source = source_ranks(half, num_ranks)
        network = Tier(
            bytes_per_s=_NETWORK_BITS_PER_S / 8,
            latency_s=_NETWORK_LATENCY_S,
            source="published",
            relative_uncertainty=0.1,
        )
        profile = load_hardware("a100-80gb-sxm")
        if profile.node is None:
            raise ValueError("the bundled profile describes no server")
        link = Tier(bytes_per_s=profile.node.gpu_link_bytes_per_s.value, latency_s=_LINK_LATENCY_S, source="datasheet",
                    relative_uncertainty=0.2)  # fmt: skip
        constants = EpConstants(inter=network, intra=link, shared_nic=True, half_duplex_nic=True)
        simulation = ParallelSimulation(
            model, profile, _NODES, num_ranks // _NODES, context_tokens=_CONTEXT, constants=constants
        )
        return cls(
            simulation=simulation, plan=[StepTokens(experts=np.ascontiguousarray(experts[:half]), source_rank=source)],
            step=StepTokens(experts=np.ascontiguousarray(experts[half : 2 * half]), source_rank=source), num_ranks=num_ranks,
            num_experts=model.num_experts, tiers=ExpertParallelSchedule(name="occult").with_options(
                placement__policy="occult", all_to_all__kind="hierarchical", all_to_all__tiers="in-turn"),
        )  # fmt: skip

    def occult(self) -> tuple[Placement, Groups]:
        """Return groups of equal size that keep co-activated experts on one rank; which ranks share a node plays no part."""
        layers = range(self.plan[0].experts.shape[1])
        rows = [uniform_groups(co_activation(self.plan, layer, self.num_experts), self.num_ranks) for layer in layers]
        return from_rank_lists(rows, self.num_experts, _NODES), rows

    def grouped(self) -> tuple[Placement, Groups]:
        """Return GRACE's groups without copies."""
        rows = []
        for layer in range(self.plan[0].experts.shape[1]):
            affinity = co_activation(self.plan, layer, self.num_experts)
            each = self.num_ranks // _NODES
            rows.append(rank_groups(affinity, node_groups(affinity, _NODES, each), each, _RATIO))
        return from_rank_lists(rows, self.num_experts, _NODES), rows

    def copied(self, copies: int | None) -> GracePlan:
        """Return the groups with so many copies of what overloads the heaviest rank; None: as many as its load asks for."""
        return grace_plan(self.plan, self.num_experts, self.num_ranks, _NODES, ratio=_RATIO, copies=copies)


def _home_router(placement: Placement, layers: Groups) -> StaticChoice:
    """Return the router that knows only the groups: slots that fill short ranks up take no tokens."""
    home = np.empty((placement.num_layers, placement.num_logical), np.int32)
    for layer, groups in enumerate(layers):
        for rank, group in enumerate(groups):
            home[layer, list(group)] = rank * placement.slots_per_rank + np.arange(len(group))
    return StaticChoice(table=np.repeat(home[:, :, None], placement.num_ranks, axis=2))


def _measure(
    simulation: ParallelSimulation, candidate: Candidate, schedule: ExpertParallelSchedule, step: StepTokens
) -> Measures:
    """Return one rung's measures."""
    placement, router = candidate.placement, candidate.router
    routed = [router.slots(step.experts[:, at], step.source_rank, placement, at) for at in range(placement.num_layers)]
    load = count_step(np.stack(routed, axis=1), step.source_rank, topology_of(placement), schedule)
    tables, run, program = (
        simulation.tables(schedule, load),
        simulation.run(schedule, load),
        simulation.program(schedule),
    )
    # What each rank itself sends and receives between nodes, there and back; a node's ranks share a hierarchical exchange.
    own = (load.sent + load.received)[:, 0, INTER] * 2.0 * _VALUE_BYTES * simulation.model.hidden_size
    own_ns = own / (_NETWORK_BITS_PER_S / 8) * NS_PER_S
    volume = tables.ex_bytes.sum(axis=(0, 2))
    return Measures(
        exchange_ns=float((run.ex_end - run.ex_start).sum()), cross_bytes=float(volume[INTER]), intra_bytes=float(volume[INTRA]),
        exchange_wait_ns=0.0 if schedule.all_to_all.kind == "hierarchical" else _waiting(own_ns),
        kernel_wait_ns=_waiting(tables.work_ns[program.op_kind == OP_EXPERT]), deviation=float(load.rank_rows().std(axis=1).mean()),
    )  # fmt: skip


def _waiting(busy: npt.NDArray[np.generic]) -> float:
    """Return how long a rank waits on average for the busiest one, `busy: [operations, ranks]` summed over operations."""
    work = busy.astype(np.float64)
    return float((work.max(axis=1, keepdims=True) - work).mean(axis=1).sum())


def slowness_of(measured: Sequence[Measures]) -> float:
    """Return the slowness of stragglers with which idle time after grouping is OLMoE's published part of its exchanges."""
    grouped = measured[_CONTROL]
    return _OLMOE_IDLE / _OLMOE_EXCHANGE * grouped.exchange_ns / grouped.kernel_wait_ns


def _changes(measured: Sequence[Measures], slowness: float) -> npt.NDArray[np.float64]:
    """Return [ingredients, measures] in per cent of Occult."""
    base = measured[0].row(slowness)
    return np.stack([(each.row(slowness) / base - 1) * 100 for each in measured[1:]])


def _speedup(measured: Sequence[Measures], slowness: float, rest: float) -> float:
    """Return Occult's time over that of all ingredients: exchanges, idle time and the rest, which no ingredient changes."""
    first, last = (measured[at].row(slowness) for at in (0, _LAST))
    return float((first[_EXCHANGE] + first[_IDLE] + rest) / (last[_EXCHANGE] + last[_IDLE] + rest))


def _drawn(name: str, routing: Routing, tokens: int = _TOKENS, seed: int = 0) -> npt.NDArray[np.int32]:
    model = load_model(name)
    return draw_experts(
        routing, tokens=2 * tokens, num_experts=model.num_experts, top_k=model.top_k, layers=_LAYERS, seed=seed
    )


def fit() -> Routing:
    """Return the constants of the draws, on a grid, with the least sum of differences over the three cells they are fitted to."""
    grid = [Routing(affinity=affinity, spread=spread, drift=drift)
            for affinity in _AFFINITIES for spread in _SPREADS for drift in _DRIFTS]  # fmt: skip
    cells = ((_CROSS, _CONTROL - 1), (_DEVIATION, _CONTROL - 1), (_DEVIATION, _LAST - 1))
    names = list(TABLE)

    def missed(routing: Routing) -> float:
        ladders = [ladder(load_model(name), _drawn(name, routing)) for name in MODELS]
        mean = np.mean([_changes(each, 1.0) for each in ladders], axis=0)  # slowness plays no part in these cells
        return float(sum(abs(mean[at, row] - TABLE[names[row]][at]) for row, at in cells))

    return min(grid, key=missed)


def _single_steps(found: dict[str, list[Measures]]) -> list[Cell]:
    """Return what grouping and nearest copies change, model by model."""
    rungs, names = {GROUPED: (_TIERS, _CONTROL), NEAREST: (_WEIGHTED, _LAST)}, list(TABLE)
    cells = []
    for (step, row), published in STEPS.items():
        for name, value in zip(MODELS, published, strict=True):
            before, after = (found[name][at].row(1.0)[names.index(row)] for at in rungs[step])
            cells.append(Cell(table=step, row=row, column=name, unit="%", published=value, simulated=(after / before - 1) * 100,
                              role=CHECKED, note=STEP_NOTES.get(step, "")))  # fmt: skip
    return cells


def _groupings(
    measured: Sequence[Measures], slowness: float, routing: Routing, recordings: dict[str, npt.NDArray[np.int32]]
) -> list[Cell]:
    """Return OLMoE's times by how groups are made; those of controlled sizes are the unit, and say what idle time and the rest are."""
    model = load_model(MODELS[0])
    free = free_groups(model, recordings.get(MODELS[0], _drawn(MODELS[0], routing)))
    unit = _OLMOE_EXCHANGE / measured[_CONTROL].exchange_ns
    cells = []
    for name, one in (("uniform", measured[_TIERS]), (_CONTROLLED, measured[_CONTROL]), ("sizes free", free)):
        exchange, idle = (float(one.row(slowness)[at] * unit) for at in (_EXCHANGE, _IDLE))
        whole = exchange + idle + _REST * _OLMOE_EXCHANGE
        for row, published, simulated in zip(
            ("all-to-all time", "GPU idle", "end to end"), GROUPINGS[name], (exchange, idle, whole), strict=True
        ):
            cells.append(Cell(table="OLMoE's groups, 2 x 2", row=row, column=name, unit="ms", published=published, simulated=simulated,
                              role=FITTED if name == _CONTROLLED else CHECKED, note=GROUP_NOTES.get((row, name), "")))  # fmt: skip
    return cells


def reproduce_grace_moe(recordings: dict[str, npt.NDArray[np.int32]] | None = None) -> Reproduction:
    """Return the paper's table beside the simulator's; three constants fitted.

    recordings: choices int [tokens, layers, top_k] by model name, in place of drawn ones.
    """
    routing = fit()
    found = {name: ladder(load_model(name), (recordings or {}).get(name, _drawn(name, routing))) for name in MODELS}
    slowness = slowness_of(found[MODELS[0]])
    mean = np.mean([_changes(measured, slowness) for measured in found.values()], axis=0)
    fitted = {
        ("cross-node traffic", _CONTROL - 1),
        ("load standard deviation", _CONTROL - 1),
        ("load standard deviation", _LAST - 1),
    }
    cells = []
    for row, (name, published) in enumerate(TABLE.items()):
        for at, ingredient in enumerate(INGREDIENTS):
            role = FITTED if (name, at) in fitted else CHECKED
            cells.append(Cell(table="change against Occult, 2 x 2", row=name, column=ingredient, unit="%",
                              published=published[at], simulated=float(mean[at, row]), role=role,
                              note=NOTES.get((name, at), "")))  # fmt: skip
    cells += _single_steps(found) + _groupings(found[MODELS[0]], slowness, routing, recordings or {})
    rest = _REST * found[MODELS[0]][_CONTROL].exchange_ns
    for name, measured in found.items():
        cells.append(Cell(table="Occult's time over GRACE's, 2 x 2", row=name, column="end to end", unit="x",
                          published=SPEEDUPS[name], simulated=_speedup(measured, slowness, rest), role=CHECKED,
                          note="" if name == MODELS[0] else SPEEDUP_NOTE))  # fmt: skip
    wider = _changes(ladder(load_model(MODELS[0]), _drawn(MODELS[0], routing), num_ranks=2 * _RANKS), slowness)
    for row, name in enumerate(TABLE):
        for at, ingredient in enumerate(INGREDIENTS):
            cells.append(Cell(table="change against Occult, 2 x 4, OLMoE", row=name, column=ingredient, unit="%", published=None,
                              simulated=float(wider[at, row]), role=PREDICTED))  # fmt: skip
    return Reproduction(
        paper="grace-moe", citation=CITATION, cells=tuple(cells),
        constants=(
            FittedConstant(name="affinity of tokens to their topic's experts", value=routing.affinity, unit="logits",
                           fitted_to="cross-node traffic after grouping"),
            FittedConstant(name="spread of experts' popularity", value=routing.spread, unit="logits",
                           fitted_to="load standard deviation after grouping"),
            FittedConstant(name="drift of popularity from profiling to serving", value=routing.drift, unit="",
                           fitted_to="load standard deviation after copying"),
        ),
        notes=(
            "the paper's routing is not public: it is drawn from topics whose experts are as many as a token chooses",
            f"a straggler takes {slowness:.2f} times its kernels, as OLMoE's published idle time after grouping says",
            f"beside exchanges and idle time a step takes {_REST:.2f} times its exchanges after grouping, as OLMoE's published times say",
            f"a step has {_TOKENS} tokens, {_LAYERS} layers",
            (
                "speed-ups of 4.66, 3.73 and 4.47 over other engines, and times end to end but OLMoE's, are published as figures without "
                "numbers, or without saying over which engine: not set beside anything"
            ),
            "constants are fitted to one draw; another moves load deviations by tens of points, idle time by up to 12, traffic by up to 7",
        ),
    )  # fmt: skip
