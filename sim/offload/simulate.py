"""One schedule on one recording and one machine: from files' nouns to a prediction.

Modelled: a `Simulation` binds a model, a machine and a recording, keeps the workloads and cost tables it has built, and
predicts any schedule on them. Ignored: which schedule is best (the planner's job), and files (the front door's).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ...base.errors import InputError, Internal
from ...calibrate.costs.cost_model import CostModel
from ...calibrate.costs.estimate import Estimate
from ...calibrate.costs.fitted.model import FittedCostModel
from ...calibrate.costs.load import load_costs
from ...specs.card_memory import CardMemory
from ...specs.card_split import CardSplit
from ...specs.machines.profile import Profile
from ...specs.memory import MemoryBreakdown
from ...specs.models import ModelSpec, WeightFormat
from ...specs.schedules.offload import OffloadSchedule
from ...traces.format import RoutingTrace
from ...traces.match import check_match
from ..policies.bundled import knows_future
from ..policies.state import Array, needs_prices
from .assumptions import assumptions
from .costs import CostTables
from .drafting.draft import Drafting
from .forecast import figures, least_tables, run_tables, usual_tables
from .memory.device import DeviceMemory
from .metrics import Metrics
from .run_facts import RunFacts, run_facts
from .run_input import RunInput, bind
from .simulators import Outcome, first_difference, run_compiled, run_simpy, some_steps
from .tabulate import CostSources, tables_key
from .workload import Workload, build_workload, picked

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one schedule is predicted to do, with everything needed to check it."""

    schedule: OffloadSchedule
    """Resolved: the cache's capacity is filled in."""
    metrics: Metrics
    memory_breakdown: MemoryBreakdown
    assumptions: tuple[str, ...]
    engine: str
    outcome: Outcome
    popularity_source: str
    cards: tuple[CardMemory, ...] = ()
    """What each card holds, where there are several."""


_COSTED = {"model", "profile", "dense_format", "kv_bytes_per_value", "split", "layers_off"}
"""Fields of a simulation that its costs depend on."""


@dataclass(slots=True)
class Simulation(DeviceMemory):
    """A model, a machine and a recording, ready to predict schedules.

    window_steps: replay only the first so many forward passes. memory_bytes: the whole device budget (the device's own
    memory when None). Raises InputError when recording and model do not match.
    """

    model: ModelSpec
    profile: Profile
    trace: RoutingTrace
    window_steps: int | None = None
    memory_bytes: int | None = None
    dense_format: WeightFormat | None = None
    kv_bytes_per_value: float = 2
    """Bytes of one cached key or value."""
    context_tokens: int | None = None
    """Context that memory is kept for; None: the longest request's."""
    upload_tokens: int | None = None
    """Passes of at least so many tokens fetch what the cores would compute, because the machine's engine does so; None: none do."""
    split: CardSplit | None = None
    """How the model lies on a machine of several cards."""
    layers_off: int = 0
    """First decoder layers that lie in host memory as a whole, not their experts alone."""
    card_budgets: tuple[int, ...] = ()
    """The budget of each of them; empty: `memory_bytes` each, or all they have."""
    drafting: Drafting | None = None
    """How decode steps are drafted; None: they are not."""
    likewise: tuple[RoutingTrace, ...] = ()
    """The same requests with routing that may as well be: intervals of predictions reach over theirs."""
    picked_steps: Array | None = None
    """Numbers, rising, of the window's forward passes that are replayed, as a run of their own; None: all."""
    own_rules: tuple[tuple[str, str], ...] = ()
    """(option of a schedule, name) of the rules of a policy file, which a search then tries beside the bundled ones."""
    _workloads: dict[Any, Workload] = field(default_factory=dict)
    _tables: dict[Any, tuple[CostTables, CostSources]] = field(default_factory=dict)
    _facts: dict[Any, RunFacts] = field(default_factory=dict)
    _likewise: dict[int, Simulation] = field(default_factory=dict)
    _divided: dict[CardSplit, Simulation] = field(default_factory=dict)
    _drafted: dict[int, Simulation] = field(default_factory=dict)
    _parts: dict[bytes, Simulation] = field(default_factory=dict)
    _step_ends: dict[OffloadSchedule, Array] = field(default_factory=dict)
    _kept: dict[Any, Any] = field(default_factory=dict)
    _context: int = 0
    _costs: CostModel | None = None

    def __post_init__(self) -> None:
        for trace in (self.trace, *self.likewise):
            check_match(self.model, trace)
        longest = int(self.trace.position.max()) + 1
        if self.context_tokens is not None and self.context_tokens < longest:
            rule = f"shorter than the longest request, {longest} tokens"
            raise InputError("context_tokens", self.context_tokens, rule, f"give at least {longest}")
        self._context = self.context_tokens or longest
        if self.drafting is not None:
            self.drafting.check(self.model)
            self._context += self.drafting.length  # keys and values of guesses

    def over(self, trace: RoutingTrace, **changes: Any) -> Simulation:
        """Return a simulation of everything else over one recording alone, with fields changed by name."""
        kept: dict[str, Any] = {
            each.name: getattr(self, each.name) for each in dataclasses.fields(self) if not each.name.startswith("_")
        }  # fmt: skip
        if trace is not self.trace:
            kept["likewise"] = ()
        found = Simulation(**(kept | {"trace": trace} | changes))
        if not _COSTED & changes.keys():
            found._costs = self._costs  # with all that they remember
        return found

    def with_kv(self, bytes_per_value: float) -> Simulation:
        """Return the same simulation with keys and values of another size, which its forward passes do not depend on."""
        return self._alike(self.over(self.trace, kv_bytes_per_value=bytes_per_value))

    def divided(self, split: CardSplit | None) -> Simulation:
        """Return the same simulation with the model divided otherwise over the cards, made once; itself for None or its own split."""
        if split is None or split == self.split:
            return self
        if split not in self._divided:
            self._divided[split] = self._alike(self.over(self.trace, split=split))
        return self._divided[split]

    def _alike(self, other: Simulation) -> Simulation:
        """Return `other`, which differs in nothing that forward passes depend on, with the passes that are made already."""
        if self.drafting is None:  # what a guess takes depends on cards, keys and values
            other._workloads = self._workloads
        return other

    def part(self, steps: Array) -> Simulation:
        """Return the simulation of these steps of the window alone, `steps` being their numbers; made once, with what it has run."""
        key = np.ascontiguousarray(steps, np.int64).tobytes()
        if key not in self._parts:
            self._parts[key] = self.over(self.trace, picked_steps=steps, likewise=())
        return self._parts[key]

    def weighed_ns(self, schedule: OffloadSchedule, weights: Array, limit_ns: float = math.inf) -> float:
        """Return a resolved schedule's time, each step's counting `weights` [num_steps] times; infinity beyond `limit_ns`.

        When steps end is kept, so that little is simulated twice.
        """
        ends = self._step_ends.get(schedule)
        if ends is None or (len(ends) < len(weights) and _weighed(ends, weights) <= limit_ns):
            # The limit of whole nanoseconds lies a little above: sums of floating-point numbers depend on their order.
            limit = 0 if math.isinf(limit_ns) else math.ceil(limit_ns * (1 + 1e-9)) + 1
            ends = self._step_ends[schedule] = self.run(schedule, limit_ns=limit, weights=weights).step_end
        return _weighed(ends, weights) if len(ends) == len(weights) else math.inf

    def estimated_ns(self, schedule: OffloadSchedule, weights: Array) -> float:
        """Return what `weighed_ns` would have come to for a schedule that it was asked about, if all went like what was run."""
        ends = self._step_ends[schedule]
        run = float(weights[: len(ends)].sum())
        return _weighed(ends, weights) * float(weights.sum()) / run if run else math.inf

    def remembered(self, key: tuple[Any, ...], make: Callable[[], _Made]) -> _Made:
        """Return what `make` made for `key` when it was first asked for: what searches of this simulation share."""
        if key not in self._kept:
            self._kept[key] = make()
        found: _Made = self._kept[key]
        return found

    @property
    def costs(self) -> CostModel:
        """The cost model that tables are made from: fitted tables where the machine was measured, else its constants' roofline."""
        if self._costs is None:
            dense: dict[str, Any] = {} if self.dense_format is None else {"dense_format": self.dense_format}
            if self.split is not None:
                dense["split"] = self.split
            if self.layers_off:
                dense["layers_off"] = self.layers_off
            self._costs = load_costs(self.profile, self.model, kv_bytes_per_value=self.kv_bytes_per_value, **dense)
        return self._costs

    def workload(self, schedule: OffloadSchedule, *, with_next_use: bool = False) -> Workload:
        """Return the forward passes of the recording under the schedule's batching, built once for each kind."""
        reset = schedule.cache.reset == "request"
        key = (schedule.workload, reset, with_next_use)
        if key not in self._workloads:
            whole = build_workload(
                self.trace,
                schedule.workload,
                reset_per_request=reset,
                max_steps=self.window_steps,
                with_next_use=with_next_use,
                drafting=self.drafting,
                guess=self._guess(schedule.workload.concurrency),
            )
            self._workloads[key] = whole if self.picked_steps is None else picked(whole, self.picked_steps)
        return self._workloads[key]

    def drafted(self, length: int) -> Simulation:
        """Return the same simulation with drafts of `length` guesses, made once; 0: without any. Raises InputError without drafting."""
        if self.drafting is None:
            raise InputError("--draft-tokens", length, "nothing says what drafts", "say how, with --acceptance")
        if length == self.drafting.length:
            return self
        if length not in self._drafted:
            other = dataclasses.replace(self.drafting, length=length) if length else None
            self._drafted[length] = self.over(self.trace, drafting=other)
        return self._drafted[length]

    def _guess(self, requests: int) -> tuple[Estimate, ...]:
        """Return what drafting a token of each of 1, 2, … `requests` takes, at half the context that is kept."""
        if self.drafting is None:
            return ()
        card = 0 if self.split is None else self.split.head_card
        return self.drafting.guess(
            self.costs, self.model, max(1, self._context // 2), requests, lambda model: load_costs(self.profile.of_card(card), model)
        )  # fmt: skip

    def given(self, schedule: OffloadSchedule) -> RunInput:
        """Return everything that the decisions of a resolved schedule depend on; raises InputError where the recording lacks guesses."""
        workload = self.workload(schedule, with_next_use=knows_future(schedule.cache.policy))
        given = bind(schedule, self.trace, workload)
        if needs_prices(given.config) or schedule.experts.low_bits is not None or len(self.costs.each_card) > 1:
            given = dataclasses.replace(given, weighed=self.usual_tables(schedule)[0])
        return given

    def usual_tables(self, schedule: OffloadSchedule) -> tuple[CostTables, CostSources]:
        """Return a schedule's tables before any of its decisions is known, made once for all schedules that share them."""
        key = tables_key(schedule, self.trace.num_layers, self.trace.num_experts)
        if key not in self._tables:
            self.low_format(schedule)  # refuses what is no smaller
            self._tables[key] = usual_tables(schedule, self.workload(schedule), self.model, self.costs)
        return self._tables[key]

    def least_tables(self, schedule: OffloadSchedule) -> CostTables:
        """Return tables of which no entry exceeds that of any run with the schedule's own, whatever its decisions: for bounds."""
        costs = self.costs
        if not isinstance(costs, FittedCostModel):
            return self.usual_tables(schedule)[0]
        kind = (schedule.cache.policy == "none", schedule.copy.overlap)
        key = ("least", *kind, *tables_key(schedule, self.trace.num_layers, self.trace.num_experts))
        if key not in self._tables:
            self._tables[key] = least_tables(schedule, self.workload(schedule), self.model, costs)
        return self._tables[key][0]

    def tables(self, schedule: OffloadSchedule, *, max_steps: int | None = None) -> tuple[CostTables, CostSources]:
        """Return the cost tables of a resolved schedule's own run, or of its first `max_steps` steps as a run of their own."""
        if not isinstance(self.costs, FittedCostModel):
            return self.usual_tables(schedule)
        given = self.given(schedule)
        return run_tables(given, self.model, self.costs, facts=self._facts_of(given, max_steps))

    def _facts_of(self, given: RunInput, max_steps: int | None = None) -> RunFacts:
        """Return what a run's decisions say of it, counted once for all schedules that decide alike."""
        weighs = (
            tables_key(given.schedule, self.trace.num_layers, self.trace.num_experts)
            if given.weighed is not None
            else None
        )
        steps = None if max_steps is None or max_steps >= given.workload.num_steps else max_steps
        cache = given.schedule.cache
        key = (given.config, given.capacities.tobytes(), given.schedule.workload, cache.reset, cache.policy, weighs, steps)  # fmt: skip
        if key not in self._facts:
            self._facts[key] = run_facts(given, num_steps=steps)
        return self._facts[key]

    def resolve(self, schedule: OffloadSchedule) -> OffloadSchedule:
        """Return the schedule with its cache's capacity filled in: as given, or the largest that fits; and with a disk below the
        host where the machine's memory cannot hold what must lie there.

        Raises DoesNotFit when the capacity given, or the smallest useful one, exceeds the budget, or the host cannot hold the rest.
        """
        sized = self._sized(schedule.with_options(experts__bits=self.expert_format(schedule).name))
        cached = min(sized.cache.slots(self.trace.num_layers), self.num_experts)
        if sized.copy.host_experts == 0:  # as many as the machine has room for
            sized = sized.with_options(copy__host_experts=None)
        return self.within_host(sized, cached_experts=cached)

    def _sized(self, schedule: OffloadSchedule) -> OffloadSchedule:
        """Return the schedule with its cache's capacity filled in; raises DoesNotFit as `resolve` does."""
        cache = schedule.cache
        expert_bytes = self.expert_bytes(schedule)
        if cache.policy == "none":
            return schedule
        if cache.host_layers is not None:
            if cache.host_layers >= self.trace.num_layers:
                raise InputError("cache.host_layers", cache.host_layers, f"the model has {self.trace.num_layers} MoE layers",
                                 "leave at least one on the device, or use cpu-moe")  # fmt: skip
            whole = self.trace.num_layers - cache.host_layers
            return schedule.with_options(cache__pooled_experts=whole * self.trace.num_experts)
        if cache.bytes is not None:
            pooled = min(cache.bytes // expert_bytes, self.num_experts)
            if pooled < 1:
                raise InputError(
                    "cache.bytes", cache.bytes, f"less than one expert of {expert_bytes} bytes", "give more"
                )
            return schedule.with_options(cache__pooled_experts=int(pooled))
        if (
            cache.experts_per_layer is not None
            and cache.experts_per_layer + cache.first_layer_extra > self.trace.num_experts
        ):
            key = "experts_per_layer" if cache.experts_per_layer > self.trace.num_experts else "first_layer_extra"
            raise InputError(f"cache.{key}", getattr(cache, key),
                             f"the model has {self.trace.num_experts} experts a layer", "give at most that many")  # fmt: skip
        if cache.pooled_experts is not None and cache.pooled_experts > self.num_experts:
            raise InputError("cache.pooled_experts", cache.pooled_experts, f"the model has {self.num_experts} experts",
                             "give at most that many")  # fmt: skip
        if cache.experts_per_layer is not None or cache.pooled_experts is not None:
            return schedule
        if schedule.name == "resident":
            return schedule.with_options(cache__experts_per_layer=self.trace.num_experts)
        if cache.policy == "static" and cache.placement in ("front", "back"):  # whole layers
            layer = self.trace.num_experts
            fits = self.slots_that_fit(schedule, least=layer if schedule.kernel.miss == "fetch" else 1)
            return schedule.with_options(cache__pooled_experts=max(1, fits // layer * layer))
        extra = cache.first_layer_extra
        each = (self.slots_that_fit(schedule, least=self.trace.num_layers + extra) - extra) // self.trace.num_layers
        return schedule.with_options(cache__experts_per_layer=min(int(each), self.trace.num_experts - extra))

    def run(self, schedule: OffloadSchedule, *, engine: str = "compiled", rows: bool = False, limit_ns: int = 0,
            later_ns: Array | None = None, weights: Array | None = None, max_steps: int | None = None,
            checked_steps: Array | None = None) -> Outcome:  # fmt: skip
        """Return the outcome of a resolved schedule under one engine, or under both, compared ("both").

        limit_ns, later_ns, weights: the compiled simulator gives up on a longer run (`run_compiled`). max_steps: run only so many.
        checked_steps: "both" compares only the steps of these numbers, as runs of their own (None: all).
        """
        given, (tables, _) = self.given(schedule), self.tables(schedule, max_steps=max_steps)
        config, workload, capacities, weighed = given.config, given.workload, given.capacities, given.weighed
        serial = not schedule.copy.overlap
        if engine == "simpy":
            return run_simpy(config, workload, tables, capacities, serial=serial, rows=rows, weighed=weighed)
        outcome = run_compiled(config, workload, tables, capacities, serial=serial, rows=rows, limit_ns=limit_ns,
                           later_ns=later_ns, weights=weights, max_steps=max_steps, weighed=weighed)  # fmt: skip
        if engine == "both":
            checked = outcome
            if checked_steps is not None and len(checked_steps) < workload.num_steps:
                whole = workload
                workload, tables = some_steps(whole, tables, checked_steps)
                weighed = some_steps(whole, weighed, checked_steps)[1] if isinstance(weighed, CostTables) else weighed
                checked = run_compiled(config, workload, tables, capacities, serial=serial, rows=rows, weighed=weighed)
            reference = run_simpy(config, workload, tables, capacities, serial=serial, rows=rows, weighed=weighed)
            difference = first_difference(reference, checked)
            if difference is not None:
                raise Internal(f"the engines disagree on {schedule.name}: {difference}")
            note = "" if checked is outcome else f" over {workload.num_steps} of its steps"
            outcome = dataclasses.replace(outcome, engine=f"compiled, checked by simpy{note}")
        return outcome

    def warm(self, base: OffloadSchedule) -> None:
        """Compile what a run of `base`'s batching needs, by running a few steps both ways."""
        for overlap in (True, False):
            schedule = base.with_options(cache__pooled_experts=1, copy__overlap=overlap, copy__host_experts=None)
            self.run(schedule, max_steps=1)
        run_facts(self.given(schedule), num_steps=1)
        short = self.over(self.trace, window_steps=1, likewise=())
        short.run(base.with_options(cache__pooled_experts=1), engine="both")

    def predict(self, schedule: OffloadSchedule, *, engine: str = "compiled", rows: bool = False,
                checked_steps: Array | None = None) -> Prediction:  # fmt: skip
        """Return the prediction for a schedule; raises DoesNotFit when it exceeds the budget."""
        resolved = self.resolve(schedule)
        workload = self.workload(resolved)
        outcome = self.run(resolved, engine=engine, rows=rows, checked_steps=checked_steps)
        given = self.given(resolved)
        metrics = self._metrics(resolved, outcome)
        metrics = metrics.reaching(self._metrics_over(number, resolved) for number in range(len(self.likewise)))
        cached = min(int(given.capacities.sum()), self.num_experts)
        held = {"cached_experts": cached, "transient_experts": metrics.peak_transient_experts}
        self.require_fits(resolved, resolved.name, **held)
        said = assumptions(
            resolved, workload, self.drafting, num_layers=self.trace.num_layers, num_experts=self.trace.num_experts,
            window_steps=self.window_steps, host_expert_bytes=self.host_expert_bytes(resolved),
        )  # fmt: skip
        return Prediction(
            schedule=resolved, metrics=metrics, memory_breakdown=self.memory_breakdown(resolved, **held),
            assumptions=said, engine=outcome.engine, outcome=outcome,
            popularity_source=workload.popularity_source, cards=self.card_memory(resolved, **held),
        )  # fmt: skip

    def _metrics_over(self, number: int, resolved: OffloadSchedule) -> Metrics:
        """Return the metrics of a resolved schedule over the recording of that number in `likewise`."""
        if number not in self._likewise:
            self._likewise[number] = self.over(self.likewise[number])
        return self._likewise[number]._metrics(resolved, self._likewise[number].run(resolved))  # noqa: SLF001

    def _metrics(self, resolved: OffloadSchedule, outcome: Outcome) -> Metrics:
        """Return the figures of a resolved schedule's outcome, with their intervals."""
        given = self.given(resolved)
        return figures(given, self.model, self.costs, self._facts_of(given), outcome, *self.tables(resolved))


def _weighed(ends: Array, weights: Array) -> float:
    return float(np.diff(ends, prepend=0) @ weights[: len(ends)])
