"""Single operations of expert parallelism: the experts of a layer on the fullest rank, and an exchange there and back.

Modelled: AIConfigurator's wide-EP measurement (power-law popularity, the collector's own rounding; EPLB's placement of the same load;
the fullest rank's tokens enter its kernel, and a rank's own tokens are routed beside it) and DeepEP's benchmark (even choices, all
ranks alike, 8-bit dispatch, 16-bit combine). Ignored: draws of the benchmark but for their mean.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from ....base.units import MS_PER_S, NS_PER_S, US_PER_S
from ....calibrate.costs.cost_model import CostModel
from ....calibrate.costs.load import load_costs
from ....calibrate.imports.aiconfigurator.routing import DRAWS, power_law_counts
from ....planner.placement.eplb import rebalance
from ....sim.parallel.program import OP_COMBINE, OP_DISPATCH
from ....sim.parallel.simulate import ParallelSimulation
from ....sim.parallel.traffic import expect_step
from ....specs.models import ModelSpec, weight_format
from ....specs.models.load import load_model
from ....specs.schedules.parallel import ExpertParallelSchedule
from ..machine import NotExpressible
from .rows import Row
from .serving import Served
from .setup import machine_of

_FP8_BYTES = 1 + 4 / 128
_SEATS = 8
_UNCERTAIN = 0.05


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
    drawn = []
    rng = np.random.default_rng([tokens, model.num_experts, model.top_k, ranks, round(alpha * 100)])
    for _ in range(DRAWS):
        counts = power_law_counts(tokens, model.num_experts, model.top_k, ranks, alpha, rng)
        drawn.append(_fullest(counts, slots, ranks, tokens, balanced=balanced))
    seconds = float(np.mean([_seconds(costs, each, fmt) for each in drawn]))
    wrong = costs.grouped_item(8, fmt).relative_uncertainty + _UNCERTAIN
    held = slots / ranks
    rows = float(np.mean([each.sum() for each in drawn]))
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


def _fullest(counts: np.ndarray, slots: int, ranks: int, tokens: int, *, balanced: bool) -> np.ndarray:
    """Return the rows of each slot of the fullest rank."""
    if not balanced:
        by_rank = counts.reshape(ranks, -1)
        return np.asarray(by_rank[int(by_rank.sum(axis=1).argmax())])
    placement = rebalance(counts[None].astype(float), slots, ranks, 1)
    share = counts / placement.replica_counts()[0]
    rows = np.rint(share[placement.physical_to_logical[0]]).astype(np.int64).reshape(ranks, -1)
    return np.asarray(rows[int(rows.sum(axis=1).argmax())])


def _seconds(costs: CostModel, rows: np.ndarray, fmt: object) -> float:
    whole = costs.whole_experts_s(rows.astype(float), None, fmt)  # type: ignore[arg-type]
    if whole is not None:
        return float(whole)
    each = 0.0
    for count in rows.tolist():
        each += costs.grouped_item(int(count), fmt).seconds if count else 0.0  # type: ignore[arg-type]
    return costs.grouped_base().seconds + each


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
