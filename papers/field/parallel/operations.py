"""Single operations of expert parallelism: the experts of a layer on the fullest rank, and an exchange there and back.

Modelled: AIConfigurator's wide-EP measurement (power-law popularity, the collector's own rounding; EPLB's placement of the same load;
the tokens with a choice on the fullest rank enter its kernel, with all of their choices; one draw is measured) and DeepEP's benchmark
(even choices, all ranks alike, 8-bit dispatch, 16-bit combine). Ignored: noise of timers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ....base.units import MS_PER_S, NS_PER_S, US_PER_S
from ....calibrate.costs.cost_model import CostModel
from ....calibrate.costs.gpu.costs import KernelCosts
from ....calibrate.costs.gpu.experts import load_of_rows
from ....calibrate.costs.load import load_costs
from ....calibrate.imports.aiconfigurator.routing import DRAWS, entering_tokens, power_law_counts
from ....planner.placement.eplb import rebalance
from ....sim.parallel.program import OP_COMBINE, OP_DISPATCH
from ....sim.parallel.simulate import ParallelSimulation
from ....sim.parallel.traffic import expect_step
from ....specs.models import ModelSpec, WeightFormat, weight_format
from ....specs.models.load import load_model
from ....specs.schedules.parallel import ExpertParallelSchedule
from ..machine import NotExpressible
from .rows import Row
from .serving import Served
from .setup import machine_of

Rows: TypeAlias = npt.NDArray[np.int64]

_FP8_BYTES = 1 + 4 / 128
_SEATS = 8
_NINE_IN_TEN = 1.645
"""Standard deviations that nine in ten draws are within."""


def predict_kernel(row: Row) -> Served:
    """Return the time of a layer's experts on the fullest rank, in the row's unit."""
    ranks, tokens = row.count("ep", most=1024), row.count("tokens_global", most=1 << 22)
    if ranks is None or tokens is None:
        raise NotExpressible("ranks or tokens are not stated")
    model = load_model(row.text("model") or "deepseek-v3")
    alpha = _alpha(row)
    assumed: list[str] = []
    profile = machine_of(row, assumed)
    fmt = weight_format("nvfp4" if row.text("gpu").lower().startswith(("b2", "gb", "b3")) else "8")
    costs = load_costs(profile, model, tables=False, dense_format=weight_format("8"))
    copies = re.search(r"eplb\+?([0-9]+)", row.text("eplb"))
    balanced = row.text("eplb").startswith("eplb")
    slots = model.num_experts + (int(copies.group(1)) if copies else 0)
    if slots % ranks or model.num_experts % ranks:
        raise NotExpressible(f"{slots} slots do not divide over {ranks} ranks")
    rng = np.random.default_rng([tokens, model.num_experts, model.top_k, ranks, round(alpha * 100)])
    drawn = []
    for _ in range(DRAWS):
        counts = power_law_counts(tokens, model.num_experts, model.top_k, ranks, alpha, rng)
        drawn.append(_fullest(counts, slots, ranks, model.top_k, balanced=balanced))
    each = np.array([_seconds(costs, rows, enter, slots, fmt) for rows, enter in drawn])
    seconds = float(each.mean())
    # What was measured is one such draw.
    wrong = math.hypot(
        costs.grouped_item(8, fmt).relative_uncertainty, _NINE_IN_TEN * float(each.std(ddof=1)) / seconds
    )
    held = slots / ranks
    rows = float(np.mean([each.sum() for each, _ in drawn]))
    line = max(held * model.expert_bytes(fmt) / profile.device.memory_bytes_per_s.value,
               rows * model.expert_flops_per_token / profile.device.peak_flops_per_s["float16"].value)  # fmt: skip
    scale = US_PER_S if row.metric.lower().startswith("us") else MS_PER_S
    return Served(
        value=seconds * scale,
        relative_uncertainty=wrong,
        bound="compute",
        roofline=line * scale,
        assumed=tuple(assumed),
    )


def _alpha(row: Row) -> float:
    value = row.row.get("alpha")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise NotExpressible("the skew of its loads is not stated") from None


def _fullest(counts: Rows, slots: int, ranks: int, top_k: int, *, balanced: bool) -> tuple[Rows, int]:
    """Return (rows of each slot of the fullest rank, tokens that enter it)."""
    if balanced:
        placement = rebalance(counts[None].astype(float), slots, ranks, 1)
        share = (counts / placement.replica_counts()[0])[placement.physical_to_logical[0]]
        whole = np.floor(share).astype(np.int64)
        rest = int(counts.sum()) - int(whole.sum())
        whole[np.argsort(whole - share, kind="stable")[:rest]] += 1
        counts = whole
    by_rank = counts.reshape(ranks, -1)
    rank = int(by_rank.sum(axis=1).argmax())
    mine = np.arange(by_rank.shape[1]) + rank * by_rank.shape[1]
    return np.asarray(by_rank[rank]), entering_tokens(counts, mine, top_k)


def _seconds(costs: CostModel, rows: Rows, enter: int, slots: int, fmt: WeightFormat) -> float:
    if isinstance(costs, KernelCosts):
        choices = enter * costs.model.top_k
        load = load_of_rows(rows, tokens=enter, all_rows=choices, choices=choices, all_experts=slots)
        whole = costs.loaded_experts_s(load, fmt)
        if whole is not None:
            return float(whole)
    each = sum(costs.grouped_item(int(count), fmt).seconds for count in rows.tolist() if count)
    return costs.grouped_base(fmt).seconds + each


def predict_exchange(row: Row) -> Served:
    """Return the time of DeepEP's dispatch and combine of one layer, in the row's unit."""
    tokens, nodes = row.count("tokens_per_rank", most=1 << 20), row.count("nodes", 1, most=128) or 1
    if tokens is None:
        raise NotExpressible("tokens of a rank are not stated")
    words = f"{row.id} {row.text('exchange')} {row.text('mode')}".lower()
    low = bool(re.search(r"\bll\b|-ll-|low", words))
    assumed: list[str] = []
    gpu = row.text("gpu") or _gpu_in(row)
    profile = machine_of(dataclasses.replace(row, row={**row.row, "gpu": gpu}), assumed)
    model = _one_layer(load_model("deepseek-v3"))
    seats = row.count("ranks_per_node", _SEATS, most=72) or _SEATS
    simulation = ParallelSimulation(model, profile, nodes, seats)
    kind = "all-choices" if low else "per-rank" if nodes == 1 else "hierarchical"
    schedule = ExpertParallelSchedule(name=kind).with_options(
        all_to_all__kind=kind, all_to_all__dispatch_bytes_per_value=_FP8_BYTES, all_to_all__combine_bytes_per_value=2.0
    )
    ranks = nodes * seats
    chance = np.full((1, 1, model.num_experts), model.top_k / model.num_experts)
    load = expect_step(chance, np.full(ranks, tokens, np.int64), simulation.topology(model.num_experts), schedule)
    run, program = simulation.run(schedule, load), simulation.program(schedule)
    lasts = run.ex_end - run.ex_start
    seconds = sum(float(lasts[program.ex_kind == which][0]) / NS_PER_S for which in (OP_DISPATCH, OP_COMBINE))
    tiers = [simulation.costing.constants.intra, simulation.costing.constants.inter]
    wrong = max(tier.relative_uncertainty for tier in tiers if tier is not None)
    port = profile.node.gpu_link_bytes_per_s.value if profile.node and nodes == 1 else 50e9
    moved = (
        tokens * model.hidden_size * (_FP8_BYTES + 2.0) * (model.top_k if low or nodes == 1 else min(nodes, 4) - 1 or 1)
    )
    scale = MS_PER_S if row.metric.lower().startswith("ms") else US_PER_S
    return Served(value=seconds * scale, relative_uncertainty=wrong, bound="exchange", roofline=moved / port * scale,
                  assumed=tuple(assumed))  # fmt: skip


def _one_layer(model: ModelSpec) -> ModelSpec:
    return dataclasses.replace(model, num_layers=1, moe_layers=(0,))


def _gpu_in(row: Row) -> str:
    found = re.search(r"\b(h100|h200|b200|h800|a100)", row.text("source").lower())
    return found.group(1) if found else "h100"
