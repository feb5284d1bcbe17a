"""What rebalancing experts did to servers that people measured, beside what the model of a served period says; nothing is fitted to it.

Modelled: ratios of throughput with and without DeepSeek's EPLB under loads that resemble recordings (nobody published these servers'
routing), placed from one load and serving another that has drifted; how long a synchronous rearrangement stands still, from layers,
experts, bytes and links (`planner.parallel.period.moves`). Ignored: queues, arrivals, text lengths that were not stated.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base.units import GIGA
from ..planner.parallel.evidence import CountEvidence
from ..planner.parallel.period.moves import (
    MOVING_S_PER_EXPERT,
    PLANNING_S_PER_SLOT,
    Rearrangement,
    rearrangement,
)
from ..planner.placement.comparison import Candidate
from ..planner.placement.eplb import rebalance
from ..planner.placement.placement import Placement, contiguous
from ..planner.placement.replica_choice import WeightedChoice
from ..sim.parallel.simulate import ParallelSimulation
from ..sim.parallel.tiers import constants_of
from ..specs.machines.profile import Profile
from ..specs.machines.serving import load_server, serving_machine
from ..specs.models import ModelSpec, weight_format
from ..specs.models.load import load_model
from ..specs.schedules.parallel import ExpertParallelSchedule
from ..traces.synthesis.loads import POPULARITY, Counts, loads_of
from .cells import CHECKED, Cell, FittedConstant, Reproduction

CITATION = "vllm-project/vllm#41141, #43219, #50647; ROCm/ATOM#1210 (public pull requests of 2026)"
_NARROW = 1 + 4 / 128
_MOVED_SHARE = "EPLB places every layer anew, so that a rank keeps hardly any of its experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """A server of one row."""

    model: str
    card: str
    engine: str
    nodes: int
    ranks_per_node: int
    bits: str
    dense_bits: str
    prefill: bool
    context: int
    tokens_per_rank: int
    exchange: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


_QWEN = _Server(model="qwen3.5-397b-a17b", card="b200", engine="vllm", nodes=1, ranks_per_node=8, bits="nvfp4", dense_bits="8",
                prefill=False, context=1024, tokens_per_rank=128, exchange="per-rank")  # fmt: skip
_DEEPSEEK = _Server(model="deepseek-v3", card="gb200", engine="vllm", nodes=1, ranks_per_node=32, bits="nvfp4", dense_bits="8",
                    prefill=False, context=1024, tokens_per_rank=850, exchange="all-choices")  # fmt: skip
_V4 = _Server(model="deepseek-v4-pro", card="mi355x", engine="sglang", nodes=1, ranks_per_node=8, bits="mxfp4", dense_bits="8",
              prefill=True, context=8192, tokens_per_rank=8192, exchange="per-rank")  # fmt: skip


def reproduce_rebalancing() -> Reproduction:
    """Return public rows of rebalancing beside the model's; nothing fitted to them."""
    cells = [*_offline(), *_stall(), *_slower(), *_redundant()]
    return Reproduction(
        paper="rebalancing", citation=CITATION, cells=tuple(cells),
        constants=(
            FittedConstant(name="planning, a slot of a layer", value=PLANNING_S_PER_SLOT, unit="s",
                           fitted_to="vllm-project/vllm#28369, which is none of these rows"),
            FittedConstant(name="moving, an expert of a rank", value=MOVING_S_PER_EXPERT, unit="s",
                           fitted_to="vllm-project/vllm#28369, which is none of these rows"),
        ),
        notes=(
            "routing of none of these servers is published: loads resemble recordings of DeepSeek-R1, placed from one and serving another",
            "batches and lengths are assumed where they are not stated: 128 tokens a rank (#41141), prompts of 8192 (ATOM#1210)",
            "ATOM's biased placement (its busiest experts on every rank: 8.68 requests/s) is no policy here and is left out",
        ),
    )  # fmt: skip


def _offline() -> list[Cell]:
    """Return the rows of offline and online EPLB on 8 B200 (#41141)."""
    gain = _gain(_QWEN, "decode", 0)
    note = "no copies; 8 ranks are hardly uneven, so that most of the step does not depend on the placement"
    rows = [
        ("ChemData700K", 6981.33 / 6745.20),
        ("OpenMathInstruct-2", 6717.14 / 6473.46),
        ("Magicoder-Evol", 6598.05 / 6381.60),
    ]
    found = [
        Cell(table="Qwen3.5-397B, 8 x B200", row=name, column="offline / none", unit="x", published=value, simulated=gain, role=CHECKED,
             note=note if at == 0 else "")
        for at, (name, value) in enumerate(rows)
    ]  # fmt: skip
    found.append(Cell(table="Qwen3.5-397B, 8 x B200", row="ChemData700K", column="online / none", unit="x", published=6873.39 / 6745.20,
                      simulated=_online(_QWEN, gain), role=CHECKED, note="moved at once every 3,000 steps, as vLLM comes"))  # fmt: skip
    return found


def _online(server: _Server, gain: float) -> float:
    """Return throughput of a server that is rearranged at once every 3,000 steps, over one that never is."""
    planned, served = _loads(server, "decode")
    step_s = _step_s(server, served, _in_order(server, served))
    move = _move(server, planned)
    return 3000 * step_s / (3000 * step_s / gain + move.whole_s)


def _stall() -> list[Cell]:
    """Return how long a synchronous rearrangement of 32 GB200 stands still (#43219)."""
    planned, served = _loads(_DEEPSEEK, "decode")
    model, profile = load_model(_DEEPSEEK.model), _machine(_DEEPSEEK)
    before, after = (rebalance(counts, model.num_experts + 32, _DEEPSEEK.ranks, 1) for counts in (planned, served))
    fmt = weight_format(_DEEPSEEK.bits)
    move = rearrangement(
        model, before, after, model.expert_bytes(fmt), constants_of(profile, 1, _DEEPSEEK.ranks_per_node)
    )
    note = f"planning {move.planning_s:.2f} s, sends and bytes {move.moving_s:.2f} s; 0.65 to 1.70 s over 22 rearrangements; {_MOVED_SHARE}"
    return [Cell(table="DeepSeek-R1, 32 x GB200", row="synchronous rearrangement", column="stall", unit="s", published=0.91,
                 simulated=move.whole_s, role=CHECKED, note=note)]  # fmt: skip


# Kimi-K3: 92 MoE layers of 896 experts of three matrices of 3584 x 3072 (its config.json), 4-bit with scales.
_K3_LAYERS, _K3_EXPERTS, _K3_RANKS, _K3_EXPERT_BYTES = 92, 896, 16, 3 * 3584 * 3072 * 4.25 / 8
_K3_CONTROL_S, _K3_SERVED_S, _K3_MOVES = 463.11, 1466.50, 24
_NIC_BYTES_PER_S = 50 * GIGA
"""Of a rank, 400 Gb/s: its cards are not stated."""


def _slower() -> list[Cell]:
    """Return the server that became slower with better balance (#50647), and what its stalls come to."""
    each = _K3_EXPERTS // _K3_RANKS * _K3_LAYERS
    planning = PLANNING_S_PER_SLOT * _K3_LAYERS * _K3_EXPERTS
    sends = MOVING_S_PER_EXPERT * each
    over_links = each * _K3_EXPERT_BYTES / _NIC_BYTES_PER_S
    stall = planning + sends + over_links
    measured = (_K3_SERVED_S - _K3_CONTROL_S) / _K3_MOVES
    rate = each * _K3_EXPERT_BYTES / (measured - planning - sends) / GIGA
    share = _K3_MOVES * measured / _K3_SERVED_S
    gigabytes = each * _K3_EXPERT_BYTES / GIGA
    note = (
        f"{_K3_MOVES} synchronous rearrangements explain it: {measured:.1f} s each, {share:.0%} of the run. Of one, planning takes "
        f"{planning:.1f} s, sends {sends:.1f} s, {gigabytes:.0f} GB a rank over its network port {over_links:.1f} s. What is left fits "
        f"weights that pass at {rate:.1f} GB/s a rank: through the hosts' memory, not from card to card. Better balance (1.069 to "
        f"1.008 times the mean) saves at most 6 % of a step"
    )
    return [
        Cell(table="Kimi-K3, 16 ranks", row="EPLB over none", column="throughput", unit="x", published=_K3_CONTROL_S / _K3_SERVED_S,
             simulated=_K3_CONTROL_S / (_K3_CONTROL_S + _K3_MOVES * stall), role=CHECKED, note=note),
        Cell(table="Kimi-K3, 16 ranks", row="synchronous rearrangement", column="stall", unit="s", published=measured, simulated=stall,
             role=CHECKED),
    ]  # fmt: skip


def _redundant() -> list[Cell]:
    """Return the rows of EPLB without and with copies on 8 MI355X (ATOM#1210)."""
    return [
        Cell(table="DeepSeek-V4-Pro, 8 x MI355X", row=f"{copies} copies", column="EPLB / none", unit="x", published=published / 6.48,
             simulated=_gain(_V4, "prefill", copies), role=CHECKED,
             note="random prompts: how uneven they make ranks is not stated" if not copies else "")
        for copies, published in ((0, 7.56), (64, 8.06))
    ]  # fmt: skip


def _gain(server: _Server, phase: str, copies: int) -> float:
    """Return throughput under EPLB, placed from one load and serving another, over experts in their order."""
    planned, served = _loads(server, phase)
    model = load_model(server.model)
    wanted = model.num_experts + copies
    balanced = rebalance(planned, -(-wanted // server.ranks) * server.ranks, server.ranks, server.nodes)
    return _step_s(server, served, _in_order(server, served)) / _step_s(server, served, balanced)


def _loads(server: _Server, phase: str) -> tuple[Counts, Counts]:
    model = load_model(server.model)
    return loads_of(POPULARITY[phase], model.num_moe_layers, model.num_experts, model.top_k)


def _machine(server: _Server) -> Profile:
    return serving_machine(load_server(server.card), server.engine)


def _in_order(server: _Server, counts: Counts) -> Placement:
    experts = counts.shape[1]
    return contiguous(len(counts), experts, -(-experts // server.ranks) * server.ranks, server.ranks, server.nodes)


def _move(server: _Server, counts: Counts) -> Rearrangement:
    model = load_model(server.model)
    before = _in_order(server, counts)
    after = rebalance(counts, before.num_slots, server.ranks, server.nodes)
    constants = constants_of(_machine(server), server.nodes, server.ranks_per_node)
    return rearrangement(model, before, after, model.expert_bytes(weight_format(server.bits)), constants)


def _step_s(server: _Server, served: Counts, placement: Placement) -> float:
    model: ModelSpec = load_model(server.model)
    narrow = _NARROW if weight_format(server.bits).bits <= 8 else 2.0
    schedule = ExpertParallelSchedule(name="served").with_options(
        kernel__bits=server.bits, all_to_all__kind=server.exchange, all_to_all__dispatch_bytes_per_value=narrow
    )
    simulation = ParallelSimulation(model, _machine(server), server.nodes, server.ranks_per_node, server.prefill, server.context,
                                    weight_format(server.dense_bits))  # fmt: skip
    evidence = CountEvidence(served, model.top_k, server.tokens_per_rank * server.ranks)
    loads = evidence.loads("report", Candidate(placement=placement, router=WeightedChoice()), schedule)
    return simulation.predict(schedule, loads, check_memory=False).step_s
