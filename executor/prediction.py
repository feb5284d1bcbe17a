"""What the simulator says of a run that is about to be made: the same workload, the same decisions, costs from a
profile.

Modelled: sizes are those of the slots that really move, which differ a little from a format's nominal bytes
(alignment, scales). Ignored: SimPy; the compiled twin is equal to it to the nanosecond.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..calibrate.cost_model import CostModel
from ..calibrate.expert_store import expert_layout
from ..calibrate.fitted_model import FittedCostModel
from ..calibrate.run_kind import RunKind, usual_run
from ..errors import InputError
from ..schedule import OffloadSchedule
from ..sim.costs import CostTables, chunk_sizes
from ..sim.engines import Outcome, run_twin
from ..sim.metrics import Metrics, summarise
from ..sim.policies.state import make_config, needs_prices
from ..sim.tabulate import CostSources, tabulate, typical_tokens
from ..sim.workload import Workload, build_workload
from ..specs import ModelSpec, WeightFormat, weight_format
from ..traces.recording import RoutingTrace
from ..units import NS_PER_S, seconds_to_ns
from .execute import RunInput
from .run_facts import run_facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A prediction with the tables it was made from."""

    tables: CostTables
    sources: CostSources
    outcome: Outcome
    metrics: Metrics


def run_input(schedule: OffloadSchedule, trace: RoutingTrace, *, window_steps: int | None = None) -> RunInput:
    """Return what running `schedule` on a recording takes.

    Raises InputError for a cache without a size, for more layers on the host than there are, or for guesses that the recording
    does not hold.
    """
    schedule = _with_whole_layers(schedule, trace)
    cache = schedule.cache
    if cache.policy != "none" and cache.experts_per_layer is None and cache.pooled_experts is None:
        raise InputError(
            "cache", "no size", "a run needs the number of slots", "set cache.experts_per_layer or cache.pooled_experts"
        )
    distances, width = (0, 0) if trace.predicted is None else trace.predicted.shape[2:]
    if schedule.predictor.kind == "next-gate" and distances < schedule.predictor.depth:
        raise InputError(
            "predictor.depth",
            schedule.predictor.depth,
            f"the recording's guesses reach {distances} layers",
            "use predictor.kind=dial",
        )
    workload = build_workload(
        trace,
        schedule.workload,
        reset_per_request=cache.reset == "request",
        max_steps=window_steps,
        with_next_use=cache.policy == "belady",
    )
    config = make_config(
        schedule,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        guess_distances=distances,
        guess_width=width,
    )
    if cache.pooled_experts is not None:
        capacities = np.array([cache.pooled_experts])
    else:
        capacities = np.full(trace.num_layers, cache.experts_per_layer or 0)
    return RunInput(schedule=schedule, config=config, workload=workload, capacities=capacities)


def _with_whole_layers(schedule: OffloadSchedule, trace: RoutingTrace) -> OffloadSchedule:
    """Return a schedule that keeps whole layers off the device as one that says how many experts are on it."""
    away = schedule.cache.host_layers
    if away is None:
        return schedule
    if away >= trace.num_layers:
        raise InputError(
            "cache.host_layers",
            away,
            f"the recording has {trace.num_layers} MoE layers",
            "leave at least one on the device, or use cpu-moe",
        )
    return schedule.with_options(cache__pooled_experts=(trace.num_layers - away) * trace.num_experts)


def with_costs(given: RunInput, model: ModelSpec, costs: CostModel, *, slot_bytes: int) -> RunInput:
    """Return `given` with the predicted costs that its decisions weigh and the formats of its experts; `given` itself without any.

    They are those of a run whose decisions are not known yet, as a search takes them: what the run is like follows from them.
    Raises MissingCalibration where the profile does not reach.
    """
    fmt, low = stored_format(given.schedule, model), second_format(given.schedule)
    if not needs_prices(given.config) and low is None:
        return given
    if isinstance(costs, FittedCostModel):
        workload, tokens = given.workload, typical_tokens(given.workload)
        together = workload.top_k * workload.num_tokens / (tokens * workload.num_steps)
        costs = costs.for_run(usual_run(fmt.name, together, tokens))
    tables, _ = tabulate(costs, model, given.schedule, given.workload, fmt, low)
    return dataclasses.replace(
        given, weighed=with_slot_bytes(tables, costs, given.schedule, _sizes(model, low, slot_bytes))
    )


def forecast(given: RunInput, model: ModelSpec, costs: CostModel, *, slot_bytes: int, rows: bool = False) -> Forecast:
    """Return the prediction of a run; raises MissingCalibration where the profile does not reach."""
    fmt, low = stored_format(given.schedule, model), second_format(given.schedule)
    if isinstance(costs, FittedCostModel):
        facts = run_facts(given)
        costs = costs.for_run(
            RunKind(
                bits=fmt.name,
                cached=given.schedule.cache.policy != "none",
                overlapped=given.schedule.copy.overlap,
                fresh_fraction=facts.fresh_fraction,
                ahead_fraction=facts.ahead_fraction,
                errands_per_core_expert=facts.errands_per_core_expert,
                fetches_per_transfer=facts.fetches_per_transfer,
                experts_per_visit=facts.experts_per_visit,
                typical_tokens=typical_tokens(given.workload),
            )
        )
    tables, sources = tabulate(costs, model, given.schedule, given.workload, fmt, low)
    tables = with_slot_bytes(tables, costs, given.schedule, _sizes(model, low, slot_bytes))
    outcome = simulate(given, tables, rows=rows)
    return Forecast(
        tables=tables, sources=sources, outcome=outcome, metrics=summarise(outcome, given.workload, sources)
    )


def simulate(given: RunInput, tables: CostTables, *, rows: bool = False) -> Outcome:
    """Return the outcome of a run under given tables."""
    serial = not given.schedule.copy.overlap
    return run_twin(
        given.config, given.workload, tables, given.capacities, serial=serial, rows=rows, weighed=given.weighed
    )


def stored_format(schedule: OffloadSchedule, model: ModelSpec) -> WeightFormat:
    """Return how a schedule stores the experts of a model."""
    return weight_format(model.native_bits if schedule.experts.bits == "native" else schedule.experts.bits)


def second_format(schedule: OffloadSchedule) -> WeightFormat | None:
    """Return the smaller format that some experts of a schedule use, None without one."""
    return None if schedule.experts.low_bits is None else weight_format(schedule.experts.low_bits)


def _sizes(model: ModelSpec, low: WeightFormat | None, slot_bytes: int) -> list[int]:
    """Return the bytes that really move for one expert, by weight format."""
    return [slot_bytes] if low is None else [slot_bytes, expert_layout(model, low.name).slot_bytes]


def with_slot_bytes(
    tables: CostTables, costs: CostModel, schedule: OffloadSchedule, sizes: Sequence[int]
) -> CostTables:
    """Return `tables` for transfers of `sizes` bytes, by weight format."""
    chunks = [chunk_sizes(size, schedule.copy.chunk_bytes) for size in sizes]
    pinned = schedule.copy.pinned
    pieces = [
        [max(1, seconds_to_ns(costs.host_to_device(part, pinned=pinned).seconds)) for part in (first, last)]
        for _, first, last in chunks
    ]
    wait_ns = seconds_to_ns(costs.transfer_wait_s())
    backs = [max(1, seconds_to_ns(costs.device_to_host(size, pinned=pinned).seconds)) for size in sizes]
    reads = [0] * len(sizes)
    if schedule.copy.host_experts is not None:
        reads = [max(1, seconds_to_ns(costs.disk_to_host(size).seconds)) for size in sizes]
    return tables._replace(
        expert_bytes=np.array(sizes, np.int64),
        num_chunks=np.array([count for count, _, _ in chunks], np.int64),
        chunk_bytes=np.array([[first, last] for _, first, last in chunks], np.int64),
        chunk_ns=np.array(pieces, np.int64) + np.array([0, wait_ns], np.int64),
        back_ns=np.array(backs, np.int64),
        disk_ns=np.array(reads, np.int64),
    )


def counted_steps(workload: Workload) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which steps a run's speed is told by: those that decode, or all of them where none does."""
    decode: np.ndarray[tuple[int], np.dtype[np.bool_]] = workload.steps.step_phase == 1
    return decode if decode.any() else np.ones_like(decode)


def predicted_step_s(found: Outcome, workload: Workload) -> float:
    """Return the mean predicted duration of the steps that count."""
    steps = np.diff(np.concatenate(([0], found.step_end)))
    return float(steps[counted_steps(workload)].mean()) / NS_PER_S
