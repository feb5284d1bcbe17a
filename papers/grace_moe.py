"""GRACE-MoE (arXiv 2509.25041): what each of its ingredients changes against Occult, on two nodes of two A100.

Modelled: OLMoE, DeepSeek-V2-Lite and Qwen3-30B-A3B, the paper's ladder (Occult with a token once per rank; hierarchical
exchange; affinity grouping with controlled sizes; dynamic copies and topology-aware routing), NVLink inside a node and 25 Gb/s
between nodes, shared by a node's ranks, in and out together (the published exchange times follow total traffic). The paper's
routing is not public: tokens are drawn here from topics that prefer a cluster of experts. Three constants are fitted: how
strongly tokens keep to their topic (to the cross-node traffic after grouping), how unevenly experts are used (to the load
deviation after grouping), and how far use drifts between profiling and serving (to the load deviation after copying). A
recording can take the draws' place. Ignored: serving overheads around the layers, and the overlap of routing decisions with
communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..ep_schedule import ExpertParallelSchedule
from ..planner.ep_evidence import topology_of
from ..planner.placement.affinity import co_activation
from ..planner.placement.comparison import Candidate
from ..planner.placement.grace import grace_plan, node_groups, rank_groups
from ..planner.placement.occult import occult_placement
from ..planner.placement.placement import Placement, from_rank_lists
from ..planner.placement.replica_choice import StaticChoice, nearest_table
from ..planner.placement.splits import StepTokens, source_ranks
from ..sim.ep_costs import EpConstants, Tier
from ..sim.ep_rehearsal import EpRehearsal
from ..sim.ep_traffic import count_step
from ..sim.policies.ep_program import INTER, INTRA, OP_EXPERT
from ..specs import ModelSpec
from ..specs_io import load_hardware, load_model
from ..units import GIGA, NS_PER_S
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
_NODES, _RANKS = 2, 4
# Batch 256 with prompts of 128: tokens of a step are divided over ranks; fewer are drawn, traffic is proportional.
_CONTEXT, _TOKENS, _LAYERS = 128, 8192, 3
_NETWORK_BITS_PER_S = 25 * GIGA
_NETWORK_LATENCY_S, _LINK_LATENCY_S = 20e-6, 5e-6
_VALUE_BYTES = 2
# The paper's ratio of group sizes (OLMoE), taken for all models.
_RATIO = 0.15
_TOPICS = 8
# Where the fit looks: affinity of a token to its topic's experts, spread of experts' popularity (both in logits).
_AFFINITIES, _SPREADS, _DRIFTS = (2.75, 3.0, 3.25), (0.75, 1.0, 1.25), (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The three fitted constants."""

    affinity: float
    spread: float
    drift: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What the paper's table compares, and the time of a step."""

    values: npt.NDArray[np.float64]
    """Rows of `TABLE`, then the step."""


def draw_experts(
    routing: Routing, *, tokens: int, num_experts: int, top_k: int, layers: int, seed: int = 0
) -> npt.NDArray[np.int32]:
    """Return int32 [tokens, layers, top_k]: each token has a topic, whose cluster of experts it prefers, in every layer anew.

    From the second half on, experts' popularity has drifted.
    """
    chosen = np.empty((tokens, layers, top_k), np.int32)
    for layer in range(layers):
        # A generator of its own: a layer's topics and popular experts do not depend on how many tokens are drawn.
        rng = np.random.default_rng([seed, layer])
        cluster = rng.permutation(np.arange(num_experts) * _TOPICS // num_experts)
        before, after = rng.standard_normal((2, num_experts))
        later = np.sqrt(1 - routing.drift**2) * before + routing.drift * after
        popular = routing.spread * np.where(np.arange(tokens)[:, None] * 2 < tokens, before, later)
        topic = rng.integers(0, _TOPICS, tokens)
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
    rehearsal = EpRehearsal(model, profile, _NODES, num_ranks // _NODES, context_tokens=_CONTEXT, constants=constants)
    num = model.num_experts
    occult = occult_placement(plan, num, num, num_ranks, _NODES)
    grace = grace_plan(plan, num, num_ranks, _NODES, ratio=_RATIO)
    grouped = _grouped(plan, num, num_ranks, grace.ratios)
    flat = ExpertParallelSchedule(name="occult").with_options(placement__policy="occult")
    tiers = flat.with_options(exchange__kind="hierarchical", exchange__tiers="in-turn")
    static = [Candidate(placement=each, router=StaticChoice(table=nearest_table(each))) for each in (occult, grouped)]
    copied = Candidate(placement=grace.placement, router=grace.router())
    runs = [(static[0], flat), (static[0], tiers), (static[1], tiers), (copied, tiers)]
    return [_measure(rehearsal, candidate, schedule, step) for candidate, schedule in runs]


def _grouped(plan: Sequence[StepTokens], num_experts: int, num_ranks: int, ratios: Sequence[float]) -> Placement:
    """Return GRACE's groups without copies."""
    rows = []
    for layer, ratio in enumerate(ratios):
        affinity = co_activation(plan, layer, num_experts)
        rows.append(
            rank_groups(affinity, node_groups(affinity, _NODES, num_ranks // _NODES), num_ranks // _NODES, ratio)
        )
    return from_rank_lists(rows, num_experts, _NODES)


def _measure(
    rehearsal: EpRehearsal, candidate: Candidate, schedule: ExpertParallelSchedule, step: StepTokens
) -> Measures:
    """Return one rung's measures. Idle: ranks wait for the one with most bytes of its own, and for the slowest kernels."""
    placement, router = candidate.placement, candidate.router
    routed = [router.slots(step.experts[:, at], step.source_rank, placement, at) for at in range(placement.num_layers)]
    load = count_step(np.stack(routed, axis=1), step.source_rank, topology_of(placement), schedule)
    tables, run, program = rehearsal.tables(schedule, load), rehearsal.run(schedule, load), rehearsal.program(schedule)
    # Tokens that each rank itself sends and receives between nodes, there and back.
    own = (
        (load.sent + load.received)[:, 0, INTER]
        * 2
        * _VALUE_BYTES
        * rehearsal.model.hidden_size
        / (_NETWORK_BITS_PER_S / 8)
        * NS_PER_S
    )
    kernels = tables.work_ns[program.op_kind == OP_EXPERT]
    idle = sum(float((busy.max(axis=1, keepdims=True) - busy).mean(axis=1).sum()) for busy in (own, kernels))
    volume = tables.ex_bytes.sum(axis=(0, 2))
    values = [
        (run.ex_end - run.ex_start).sum(), volume[INTER], volume[INTRA], idle, load.rank_rows().std(axis=1).mean(),
        run.makespan_ns,
    ]  # fmt: skip
    return Measures(values=np.array(values, np.float64))


def _changes(measured: Sequence[Measures]) -> npt.NDArray[np.float64]:
    """Return [ingredients, measures] in per cent of Occult."""
    base = measured[0].values
    return np.stack([(each.values / base - 1) * 100 for each in measured[1:]])


def _drawn(name: str, routing: Routing, tokens: int = _TOKENS, seed: int = 0) -> npt.NDArray[np.int32]:
    model = load_model(name)
    return draw_experts(
        routing, tokens=2 * tokens, num_experts=model.num_experts, top_k=model.top_k, layers=_LAYERS, seed=seed
    )


def fit() -> Routing:
    """Return the constants on a grid that come nearest to the three cells they are fitted to."""
    routings = [Routing(affinity=affinity, spread=spread) for affinity in _AFFINITIES for spread in _SPREADS]
    cross, deviation = TABLE["cross-node traffic"], TABLE["load standard deviation"]

    def after(routing: Routing) -> npt.NDArray[np.float64]:
        found = [_changes(ladder(load_model(name), _drawn(name, routing, _TOKENS // 2))) for name in MODELS]
        return np.asarray(np.mean(found, axis=0))

    def missed(routing: Routing) -> float:
        now = after(routing)[1]
        return float(abs(now[1] / cross[1] - 1) + abs(now[4] / deviation[1] - 1))

    still = min(routings, key=missed)
    drifting = [dataclasses.replace(still, drift=drift) for drift in _DRIFTS]
    return min(drifting, key=lambda routing: abs(float(after(routing)[2][4]) - deviation[2]))


def reproduce_grace_moe(recordings: dict[str, npt.NDArray[np.int32]] | None = None) -> Reproduction:
    """Return the paper's table beside the simulator's; three constants fitted.

    recordings: choices int [tokens, layers, top_k] by model name, in place of drawn ones.
    """
    routing = fit()
    found = {name: ladder(load_model(name), (recordings or {}).get(name, _drawn(name, routing))) for name in MODELS}
    mean = np.mean([_changes(measured) for measured in found.values()], axis=0)
    fitted = {("cross-node traffic", 1), ("load standard deviation", 1), ("load standard deviation", 2)}
    cells = []
    for row, (name, published) in enumerate(TABLE.items()):
        for at, ingredient in enumerate(INGREDIENTS):
            role = FITTED if (name, at) in fitted else CHECKED
            cells.append(Cell(table="change against Occult, 2 x 2", row=name, column=ingredient, unit="%",
                              published=published[at], simulated=float(mean[at, row]), role=role))  # fmt: skip
    for name, measured in found.items():
        faster = float(measured[0].values[5] / measured[3].values[5])
        cells.append(Cell(table="Occult's time over GRACE's, 2 x 2", row=name, column="end to end", unit="x",
                          published=SPEEDUPS[name], simulated=faster, role=CHECKED))  # fmt: skip
    wider = _changes(ladder(load_model(MODELS[0]), _drawn(MODELS[0], routing), num_ranks=2 * _RANKS))
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
            f"the paper's routing is not public: it is drawn from {_TOPICS} topics a layer",
            "the end-to-end times leave out what an engine spends outside the layers, so speed-ups come out higher",
            f"a step has {_TOKENS} tokens, {_LAYERS} layers",
        ),
    )  # fmt: skip
