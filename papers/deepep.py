"""DeepEP's published exchanges, from topology and byte counts (github.com/deepseek-ai/DeepEP, docs/legacy.md at dd758caf).

Modelled: the benchmark's own routing (random scores; experts of the `min(nodes, 4)` nodes with the best expert, 8 of them), its
two kernels (normal: pipelined over two tiers, a token once per node and rank; low latency: every choice on its own), and its
way of counting bandwidth (own node and own rank included). Three constants are fitted: the NVLink port, the network port, the
latency of a low-latency kernel; every other cell follows. Ignored: tuning of chunk sizes, kernels' own overheads in the
normal mode, and the difference between writing and reading NVLink.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from ..base.units import GIGA, NS_PER_S, TERA, US_PER_S
from ..sim.parallel.program import OP_COMBINE, OP_DISPATCH
from ..sim.parallel.simulate import ParallelSimulation
from ..sim.parallel.tiers import EpConstants, Tier
from ..sim.parallel.traffic import StepLoad, count_step
from ..specs.machines.profile_file import load_hardware
from ..specs.models.load import load_model
from ..specs.schedules.parallel import ExpertParallelSchedule
from .cells import CHECKED, FITTED, PREDICTED, Cell, FittedConstant, Reproduction

CITATION = "DeepEP, docs/legacy.md at dd758caf (H800, CX7 400 Gb/s; 7168 hidden, top-8, FP8 dispatch, BF16 combine)"
# GB/s as the benchmark counts them: by ranks, (dispatch, combine).
NORMAL: Mapping[int, tuple[float, float] | None] = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50), 128: None}
# Microseconds.
LOW_LATENCY: Mapping[int, tuple[float, float]] = {
    8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360),
}  # fmt: skip
_RANKS_PER_NODE, _EXPERTS, _TOP_K, _HIDDEN, _MOST_NODES = 8, 256, 8, 7168, 4
_NORMAL_TOKENS, _LOW_LATENCY_TOKENS = 4096, 128
_FP8_BYTES, _BF16_BYTES = 1 + 4 / 128, 2.0
# A low-latency message carries 16 further bytes (tests/legacy/test_low_latency.py).
_LOW_LATENCY_FP8_BYTES = _FP8_BYTES + 16 / _HIDDEN
# Tokens drawn for each rank, and tokens of the whole machine: more would change the largest port by less than 1 %.
_DRAWN, _DRAWN_TOTAL = 512, 16_384


@functools.lru_cache(maxsize=8)
def benchmark_routing(num_ranks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (experts [tokens, 1, top_k], source rank [tokens]) of the benchmark's random routing on `num_ranks`."""
    nodes = max(1, num_ranks // _RANKS_PER_NODE)
    tokens = min(_DRAWN * num_ranks, max(_DRAWN_TOTAL, 64 * num_ranks))
    score = np.random.default_rng(seed).random((tokens, _EXPERTS), dtype=np.float32)
    best = score.reshape(tokens, nodes, -1).max(axis=2)
    kept = np.argsort(-best, axis=1)[:, : min(nodes, _MOST_NODES)]
    allowed = np.zeros((tokens, nodes), bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    masked = np.where(np.repeat(allowed, _EXPERTS // nodes, axis=1), score, -1)
    chosen = np.argpartition(-masked, _TOP_K, axis=1)[:, :_TOP_K]
    return chosen[:, None, :].astype(np.int64), np.arange(tokens, dtype=np.int64) % num_ranks


def _exchange_s(num_ranks: int, kind: str, tokens_per_rank: int, bytes_per_value: tuple[float, float],
                constants: EpConstants) -> tuple[float, float, StepLoad, float]:  # fmt: skip
    """Return (dispatch, combine) in seconds, the counts, and by how much they were scaled to the benchmark's tokens."""
    nodes = max(1, num_ranks // _RANKS_PER_NODE)
    model = dataclasses.replace(load_model("deepseek-v3"), num_layers=1, moe_layers=(0,))
    simulation = ParallelSimulation(model, load_hardware("h800-sxm"), nodes, num_ranks // nodes, constants=constants)
    schedule = ExpertParallelSchedule(name=kind).with_options(
        all_to_all__kind=kind, all_to_all__dispatch_bytes_per_value=bytes_per_value[0],
        all_to_all__combine_bytes_per_value=bytes_per_value[1],
    )  # fmt: skip
    experts, source = benchmark_routing(num_ranks)
    counted = count_step(experts, source, simulation.topology(_EXPERTS), schedule)
    scale = tokens_per_rank * num_ranks / len(source)
    load = dataclasses.replace(
        counted, sent=_mean_port(counted.sent, scale), received=_mean_port(counted.received, scale)
    )
    program = simulation.program(schedule)
    run = simulation.run(schedule, load)
    lasts = run.ex_end - run.ex_start
    times = [float(lasts[program.ex_kind == kind][0]) / NS_PER_S for kind in (OP_DISPATCH, OP_COMBINE)]
    return times[0], times[1], counted, scale


def _mean_port(tokens: np.ndarray, scale: float) -> np.ndarray:
    """Return every port at the mean of its tier, scaled: the benchmark's routing is the same in expectation on all ranks."""
    mean = tokens.mean(axis=3, keepdims=True) * scale
    return np.asarray(np.rint(np.broadcast_to(mean, tokens.shape)), np.int64)


def _counted_tokens(num_ranks: int) -> tuple[float, float]:
    """Return (nodes, ranks) a token goes to, own ones included: what the benchmark multiplies its tokens by."""
    experts, _ = benchmark_routing(num_ranks)
    nodes = max(1, num_ranks // _RANKS_PER_NODE)
    node, rank = (
        np.sort(experts[:, 0] // (_EXPERTS // nodes), axis=1),
        np.sort(experts[:, 0] // (_EXPERTS // num_ranks), axis=1),
    )
    distinct = [1 + (np.diff(ids, axis=1) > 0).sum(axis=1) for ids in (node, rank)]
    return float(distinct[0].mean()), float(distinct[1].mean())


def _constants(nvlink: float, nic: float, latency_s: float) -> EpConstants:
    made = {"source": "published", "relative_uncertainty": 0.05, "latency_s": latency_s}
    return EpConstants(intra=Tier(bytes_per_s=nvlink, **made), inter=Tier(bytes_per_s=nic, **made))  # type: ignore[arg-type]


def _normal(num_ranks: int, nvlink: float, nic: float) -> tuple[float, float]:
    """Return the normal kernels' bandwidths (dispatch, combine) in GB/s, counted as the benchmark does."""
    nodes, ranks = _counted_tokens(num_ranks)
    dispatch_s, combine_s, _, _ = _exchange_s(
        num_ranks, "hierarchical", _NORMAL_TOKENS, (_FP8_BYTES, _BF16_BYTES), _constants(nvlink, nic, 0.0)
    )
    per_token = (ranks if num_ranks <= _RANKS_PER_NODE else nodes) * _NORMAL_TOKENS * _HIDDEN / GIGA
    return per_token * _FP8_BYTES / dispatch_s, per_token * _BF16_BYTES / combine_s


def _low_latency(num_ranks: int, nvlink: float, nic: float, latency_s: float) -> tuple[float, float]:
    """Return the low-latency kernels' times (dispatch, combine) in microseconds."""
    constants = _constants(nvlink, nic, latency_s)
    sizes = (_LOW_LATENCY_FP8_BYTES, _BF16_BYTES)
    dispatch_s, combine_s, _, _ = _exchange_s(num_ranks, "all-choices", _LOW_LATENCY_TOKENS, sizes, constants)
    return dispatch_s * US_PER_S, combine_s * US_PER_S


def reproduce_deepep() -> Reproduction:
    """Return DeepEP's two tables beside the simulator's; three constants fitted."""
    # Without latency, bandwidth as counted is proportional to the port that binds: one division fits it.
    eight, thirty_two = (row[0] for ranks in (8, 32) if (row := NORMAL[ranks]) is not None)
    nvlink = GIGA * eight / _normal(8, GIGA, GIGA)[0]
    nic = GIGA * thirty_two / _normal(32, TERA, GIGA)[0]
    latency_s = (LOW_LATENCY[8][0] - _low_latency(8, nvlink, nic, 0.0)[0]) / US_PER_S
    cells = []
    for ranks, row in NORMAL.items():
        for at, (column, simulated) in enumerate(
            zip(("dispatch", "combine"), _normal(ranks, nvlink, nic), strict=True)
        ):
            role = PREDICTED if row is None else FITTED if at == 0 and ranks in (8, 32) else CHECKED
            cells.append(Cell(table="normal kernels", row=f"EP{ranks}", column=column, unit="GB/s",
                              published=None if row is None else row[at], simulated=simulated, role=role))  # fmt: skip
    for ranks, times in LOW_LATENCY.items():
        for at, (column, simulated) in enumerate(
            zip(("dispatch", "combine"), _low_latency(ranks, nvlink, nic, latency_s), strict=True)
        ):
            role = FITTED if at == 0 and ranks == 8 else CHECKED
            cells.append(Cell(table="low-latency kernels", row=f"EP{ranks}", column=column, unit="us", published=times[at],
                              simulated=simulated, role=role))  # fmt: skip
    return Reproduction(
        paper="deepep", citation=CITATION, cells=tuple(cells),
        constants=(
            FittedConstant(name="NVLink port", value=nvlink, unit="bytes/s", fitted_to="normal kernels, EP8 dispatch"),
            FittedConstant(name="network port", value=nic, unit="bytes/s", fitted_to="normal kernels, EP32 dispatch"),
            FittedConstant(name="latency of a low-latency kernel", value=latency_s, unit="s",
                           fitted_to="low-latency kernels, EP8 dispatch"),
        ),
        notes=(
            "bandwidths are counted as the benchmark counts them: distinct nodes (in one node: ranks) of a token, its own included",
            "an earlier and a later release differ from this table by up to 30 % (EP32 dispatch 44 and 59 GB/s)",
        ),
    )  # fmt: skip
