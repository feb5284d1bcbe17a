"""GRACE-MoE (arXiv 2509.25041): what each of its ingredients changes against Occult, on two nodes of two A100.

Modelled: OLMoE, DeepSeek-V2-Lite and Qwen3-30B-A3B, the paper's ladder (Occult, whose groups know devices but not nodes, with a
token once per rank; hierarchical exchange; affinity grouping with controlled sizes; dynamic copies and topology-aware routing),
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
from ..planner.placement.grace import grace_plan, node_groups, rank_groups
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

CITATION = "GRACE-MoE, arXiv 2509.25041: A100, 2 nodes x 2, NVLink, 25 Gb/s between nodes; mean of three models"
MODELS = ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b")
INGREDIENTS = ("+ hierarchical exchange", "+ grouping", "+ copies and topology-aware routing")
# Change against Occult in per cent.
TABLE: dict[str, tuple[float, float, float]] = {
    "all-to-all time": (-35.2, -48.3, -50.6),
    "cross-node traffic": (-35.6, -50.7, -52.1),
    "intra-node traffic": (100.1, 47.1, 57.2),
    "GPU idle": (-49.9, -4.8, -25.7),
    "load standard deviation": (0.0, 90.0, 39.4),
}
# Time of Occult over GRACE's, end to end.
SPEEDUPS = {"olmoe-1b-7b": 1.45, "deepseek-v2-lite": 1.31, "qwen3-30b-a3b": 1.31}
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
# Milliseconds of OLMoE with sizes controlled by 0.15: exchanges, idle, end to end.
_OLMOE_EXCHANGE, _OLMOE_IDLE, _OLMOE_WHOLE = 2846, 507, 5698
_REST = (_OLMOE_WHOLE - _OLMOE_EXCHANGE - _OLMOE_IDLE) / _OLMOE_EXCHANGE
# Where the fit looks: affinity of a token to its topic's experts, spread of experts' popularity (both in logits), drift.
_AFFINITIES, _SPREADS, _DRIFTS = (3.75, 4.0, 4.25), (2.5, 2.75), (0.9, 0.95)
_EXCHANGE, _CROSS, _INTRA, _IDLE, _DEVIATION = range(5)
_NOTES = {
    ("intra-node traffic", 1): (
        "published, grouping keeps more of a token's experts on one GPU of the node, and copies then bring 10 points of traffic "
        "back inside nodes; in the drawn routing both are nearly equal, so their order is not reproduced"
    ),
    ("GPU idle", 2): (
        "idle time follows the deviation of load, and copies planned on the first half even that out more here than published"
    ),
    (
        "load standard deviation",
        2,
    ): "one drift for all models and layers; copies planned on the first half even out more than published",
}
_SPEEDUP_NOTE = (
    "the rest of a step is known for OLMoE only and taken for all models; the others must spend more outside exchanges, since "
    "the published speed-up is lower though exchanges fall alike; other draws change speed-ups by up to 0.16"
)


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
    layers, half = experts.shape[1], len(experts) // 2
    model = dataclasses.replace(
        model, num_layers=layers, moe_layers=tuple(range(layers)), sliding_layers=(), recurrent_layers=()
    )
    source = source_ranks(half, num_ranks)
    plan = [StepTokens(experts=np.ascontiguousarray(experts[:half]), source_rank=source)]
    step = StepTokens(experts=np.ascontiguousarray(experts[half : 2 * half]), source_rank=source)
    network = Tier(
        bytes_per_s=_NETWORK_BITS_PER_S / 8, latency_s=_NETWORK_LATENCY_S, source="published", relative_uncertainty=0.1
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
    num = model.num_experts
    occult = _occult(plan, num, num_ranks)
    grace = grace_plan(plan, num, num_ranks, _NODES, ratio=_RATIO)
    grouped = _grouped(plan, num, num_ranks, grace.ratios)
    flat = ExpertParallelSchedule(name="occult").with_options(placement__policy="occult")
    tiers = flat.with_options(all_to_all__kind="hierarchical", all_to_all__tiers="in-turn")
    static = [Candidate(placement=each, router=_home_router(each, rows)) for each, rows in (occult, grouped)]
    copied = Candidate(placement=grace.placement, router=grace.router())
    runs = [(static[0], flat), (static[0], tiers), (static[1], tiers), (copied, tiers)]
    return [_measure(simulation, candidate, schedule, step) for candidate, schedule in runs]


def _home_router(placement: Placement, layers: Groups) -> StaticChoice:
    """Return the router that knows only the groups: slots that fill short ranks up take no tokens."""
    home = np.empty((placement.num_layers, placement.num_logical), np.int32)
    for layer, groups in enumerate(layers):
        for rank, group in enumerate(groups):
            home[layer, list(group)] = rank * placement.slots_per_rank + np.arange(len(group))
    return StaticChoice(table=np.repeat(home[:, :, None], placement.num_ranks, axis=2))


def _occult(plan: Sequence[StepTokens], num_experts: int, num_ranks: int) -> tuple[Placement, Groups]:
    """Return groups of equal size that keep co-activated experts on one rank; which ranks share a node plays no part."""
    layers = range(plan[0].experts.shape[1])
    rows = [uniform_groups(co_activation(plan, layer, num_experts), num_ranks) for layer in layers]
    return from_rank_lists(rows, num_experts, _NODES), rows


def _grouped(
    plan: Sequence[StepTokens], num_experts: int, num_ranks: int, ratios: Sequence[float]
) -> tuple[Placement, Groups]:
    """Return GRACE's groups without copies."""
    rows = []
    for layer, ratio in enumerate(ratios):
        affinity = co_activation(plan, layer, num_experts)
        rows.append(
            rank_groups(affinity, node_groups(affinity, _NODES, num_ranks // _NODES), num_ranks // _NODES, ratio)
        )
    return from_rank_lists(rows, num_experts, _NODES), rows


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
    grouped = measured[2]
    return _OLMOE_IDLE / _OLMOE_EXCHANGE * grouped.exchange_ns / grouped.kernel_wait_ns


def _changes(measured: Sequence[Measures], slowness: float) -> npt.NDArray[np.float64]:
    """Return [ingredients, measures] in per cent of Occult."""
    base = measured[0].row(slowness)
    return np.stack([(each.row(slowness) / base - 1) * 100 for each in measured[1:]])


def _speedup(measured: Sequence[Measures], slowness: float) -> float:
    """Return Occult's time over that of all ingredients: exchanges, idle time and the rest, which no ingredient changes."""
    rest = _REST * measured[2].exchange_ns
    first, last = (measured[at].row(slowness) for at in (0, 3))
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
    cells = ((_CROSS, 1), (_DEVIATION, 1), (_DEVIATION, 2))
    names = list(TABLE)

    def missed(routing: Routing) -> float:
        ladders = [ladder(load_model(name), _drawn(name, routing)) for name in MODELS]
        mean = np.mean([_changes(each, 1.0) for each in ladders], axis=0)  # slowness plays no part in these cells
        return float(sum(abs(mean[at, row] - TABLE[names[row]][at]) for row, at in cells))

    return min(grid, key=missed)


def reproduce_grace_moe(recordings: dict[str, npt.NDArray[np.int32]] | None = None) -> Reproduction:
    """Return the paper's table beside the simulator's; three constants fitted.

    recordings: choices int [tokens, layers, top_k] by model name, in place of drawn ones.
    """
    routing = fit()
    found = {name: ladder(load_model(name), (recordings or {}).get(name, _drawn(name, routing))) for name in MODELS}
    slowness = slowness_of(found[MODELS[0]])
    mean = np.mean([_changes(measured, slowness) for measured in found.values()], axis=0)
    fitted = {("cross-node traffic", 1), ("load standard deviation", 1), ("load standard deviation", 2)}
    cells = []
    for row, (name, published) in enumerate(TABLE.items()):
        for at, ingredient in enumerate(INGREDIENTS):
            role = FITTED if (name, at) in fitted else CHECKED
            cells.append(Cell(table="change against Occult, 2 x 2", row=name, column=ingredient, unit="%",
                              published=published[at], simulated=float(mean[at, row]), role=role,
                              note=_NOTES.get((name, at), "")))  # fmt: skip
    for name, measured in found.items():
        cells.append(Cell(table="Occult's time over GRACE's, 2 x 2", row=name, column="end to end", unit="x",
                          published=SPEEDUPS[name], simulated=_speedup(measured, slowness), role=CHECKED,
                          note="" if name == MODELS[0] else _SPEEDUP_NOTE))  # fmt: skip
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
            "constants are fitted to one draw; another moves load deviations by tens of points, idle time by up to 12, traffic by up to 7",
        ),
    )  # fmt: skip
