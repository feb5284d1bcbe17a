"""Expert-parallel steps on one machine: from token counts to a prediction.

Modelled: an `ParallelSimulation` binds a model, a machine and a kind of step (prefill or decode), keeps what it has looked up, and
predicts any schedule for any steps. Ignored: where experts sit and which copy tokens take (those are in the counts), which
schedule is best (the planner's job), files (the front door's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...base.errors import DoesNotFit, InputError, Internal
from ...base.units import NS_PER_S
from ...calibrate.costs.load import load_costs
from ...specs.machines.overlap import served_error
from ...specs.machines.profile import Profile
from ...specs.memory import MemoryBreakdown
from ...specs.models import ModelSpec, WeightFormat, weight_format
from ...specs.schedules.parallel import ExpertParallelSchedule
from .costs import EpCosting, tabulate_ep
from .critical_path import CriticalPath, critical_path
from .draft_layers import with_draft_layers
from .groups import check_groups
from .memory import RankShape, largest_batch, rank_memory
from .program import INTER, INTRA, OP_EXPERT, TOGETHER, Program, Shape, build_program
from .simulators import EpOutcome, first_ep_difference, run_ep_compiled, run_ep_simpy
from .tables import EpTables
from .tiers import EpConstants, constants_of
from .timeline import LANE_COMPUTE, LANE_INTER
from .traffic import StepLoad, Topology

# What counts-only recordings add to the relative uncertainty: the largest port and rank of a real step lie above their
# expectation, and choices that go together travel together. On 8,192 recorded tokens of
# DeepSeek-V2-Lite, 2 x 4 ranks, contiguous, every preset's step from expectations lies 0 to 3.3 % below the counted one.
INDEPENDENCE_UNCERTAINTY = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Where a mean step's time goes, along the chain that nothing shortens (`critical_path`)."""

    by_kind_s: dict[str, float]
    """Seconds by kind of operation or exchange; they add up to the step."""
    imbalance_s: float
    """Of the experts' part, what the fullest rank takes longer than the mean rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpPrediction:
    """What one schedule is predicted to do, as means over steps. Seconds are of one step through all layers."""

    schedule: ExpertParallelSchedule
    step_s: float
    relative_uncertainty: float
    """Half the width of the interval, over the step."""
    steps_s: tuple[float, ...]
    layer_s: float
    """The step over its MoE layers."""
    compute_s: float
    """Kernels of the busiest rank."""
    expert_s: float
    """Expert kernels, the slowest rank of each stage: what imbalance costs is in here."""
    exchange_s: float
    """Time during which an exchange runs on some tier, the slowest port of each."""
    exposed_s: float
    """The step without the compute of its busiest rank: exchanges and waiting that nothing hides."""
    busy_fraction: dict[str, float]
    """Mean over ranks of each lane's busy time over the step."""
    max_over_mean_load: float
    """Rows of the fullest rank over the mean, mean over layers and steps."""
    inter_node_bytes: int
    """Sent between nodes in a step, all ranks."""
    intra_node_bytes: int
    """Sent inside nodes in a step, all ranks."""
    tokens_per_s: float
    bound: str
    """compute or exchange: which one alone would take longer."""
    outcome: EpOutcome
    """Of the first step."""
    parts: StepParts | None = None
    """Where the time goes, where that was asked for."""

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return {
            "name": self.schedule.name, "step_s": self.step_s, "relative_uncertainty": self.relative_uncertainty,
            "layer_s": self.layer_s, "compute_s": self.compute_s, "expert_s": self.expert_s, "exchange_s": self.exchange_s,
            "exposed_s": self.exposed_s, "busy_fraction": self.busy_fraction, "max_over_mean_load": self.max_over_mean_load,
            "inter_node_bytes": self.inter_node_bytes, "intra_node_bytes": self.intra_node_bytes, "tokens_per_s": self.tokens_per_s,
            "bound": self.bound,
        } | ({} if self.parts is None else {"parts_s": self.parts.by_kind_s, "imbalance_s": self.parts.imbalance_s})  # fmt: skip


@dataclass(slots=True)
class ParallelSimulation:
    """A model on ranks in nodes, ready to predict schedules.

    context_tokens: context of every request. prefill: a step holds whole prompts, otherwise one token of each request.
    memory_bytes: budget of each device (its own memory when None). Raises MissingCalibration where the profile lacks a tier and
    InputError where the model has no experts or the device less memory than the budget.
    """

    model: ModelSpec
    profile: Profile
    num_nodes: int
    ranks_per_node: int
    prefill: bool = True
    context_tokens: int = 4096
    dense_format: WeightFormat | None = None
    constants: EpConstants | None = None
    memory_bytes: int | None = None
    kv_bytes_per_value: float = 2
    kept_context_tokens: int | None = None
    """Context of a request that memory is kept for; None: as long as the one steps are timed at."""
    draft_tokens: int = 0
    """Drafted tokens that a decode step checks for every sequence, beside the one that is certain."""
    tokens_a_step: float = 1.0
    """Tokens that such a step yields for every sequence in the mean."""
    _costing: EpCosting | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1 or self.context_tokens < 1:
            raise InputError(
                "nodes", self.num_nodes, "nodes, ranks per node and context are at least one", "give positive counts"
            )
        if self.memory_bytes is not None and not 0 < self.memory_bytes <= self.profile.memory_bytes:
            raise InputError("memory", self.memory_bytes, f"a device of {self.profile.name} has {self.profile.memory_bytes} bytes",
                             "give less, or leave it out")  # fmt: skip
        if not self.model.moe_layers:
            raise InputError("model", self.model.name, "has no layers with experts", "choose a model with experts")

    @property
    def num_ranks(self) -> int:
        """Ranks over all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def costing(self) -> EpCosting:
        """The durations that tables are made from."""
        if self._costing is None:
            constants = self.constants or constants_of(self.profile, self.num_nodes, self.ranks_per_node)
            dense = self.dense_format or weight_format("16")
            costs = load_costs(
                self.profile, self.model, tables=False, dense_format=dense, kv_bytes_per_value=self.kv_bytes_per_value
            )
            self._costing = EpCosting(costs, constants, self.prefill, self.context_tokens, self.draft_tokens)
        return self._costing

    def topology(self, num_slots: int) -> Topology:
        """Return the machine with `num_slots` slots a layer; raises InputError where ranks do not divide them."""
        if num_slots % self.num_ranks:
            raise InputError(
                "num_slots", num_slots, f"not divisible by {self.num_ranks} ranks", "change the redundant slots"
            )
        return Topology(num_ranks=self.num_ranks, num_nodes=self.num_nodes, slots_per_rank=num_slots // self.num_ranks)

    def program(self, schedule: ExpertParallelSchedule) -> Program:
        """Return the schedule's program over the model's MoE layers."""
        apart = self.model.num_shared_experts > 0 and (schedule.pipeline.shared_overlap or schedule.pipeline.shortcut)
        check_groups(schedule, self.num_nodes, self.ranks_per_node)
        shape = Shape(num_layers=self.model.num_moe_layers, has_shared=apart, drafts=self.draft_tokens,
                      reduces_apart=schedule.parallel.group(self.ranks_per_node) > self.ranks_per_node)  # fmt: skip
        return build_program(schedule, shape)

    @property
    def kept_share(self) -> float:
        """Of the tokens that a step computes, those that it yields."""
        return self.tokens_a_step / (self.draft_tokens + 1)

    def tables(self, schedule: ExpertParallelSchedule, load: StepLoad) -> EpTables:
        """Return the cost tables of one step."""
        if load.num_layers != self.model.num_moe_layers:
            raise InputError("trace", f"{load.num_layers} MoE layers", f"{self.model.name} has {self.model.num_moe_layers}",
                             "choose the model the recording was made with")  # fmt: skip
        drafted = with_draft_layers(load, schedule, self.draft_tokens)
        return tabulate_ep(self.costing, schedule, self.program(schedule), drafted)

    def memory_of(self, schedule: ExpertParallelSchedule, slots_per_rank: int, rank_tokens: int) -> MemoryBreakdown:
        """Return what a rank of so many slots a layer holds in steps of `rank_tokens` tokens of its own, item by item."""
        check_groups(schedule, self.num_nodes, self.ranks_per_node)
        shape = RankShape(
            num_nodes=self.num_nodes, ranks_per_node=self.ranks_per_node, slots_per_rank=slots_per_rank,
            context_tokens=self.kept_context_tokens or self.context_tokens, prefill=self.prefill,
            kv_bytes_per_value=self.kv_bytes_per_value, dense_format=self.dense_format or weight_format("16"),
            runtime_bytes=int(self.profile.device.runtime_bytes.value), tokens_per_request=self.draft_tokens + 1,
        )  # fmt: skip
        return rank_memory(self.model, schedule, shape, rank_tokens)

    @property
    def budget_bytes(self) -> int:
        """Memory of one rank; ranks on the cores of one host share its memory."""
        budget = self.profile.memory_bytes if self.memory_bytes is None else self.memory_bytes
        if self.profile.device.kind != "cpu":
            return budget
        return budget // (self.ranks_per_node if self.costing.constants.ranks is None else self.num_ranks)

    def rank_bytes(self, schedule: ExpertParallelSchedule, load: StepLoad) -> int:
        """Return the bytes a rank holds in a step of `load`."""
        tokens = int(load.rank_tokens.sum(axis=0).max())
        return self.memory_of(schedule, load.topology.slots_per_rank, tokens).device_bytes

    def check_fits(self, schedule: ExpertParallelSchedule, load: StepLoad) -> None:
        """Return nothing; raises DoesNotFit where a rank's memory is too small."""
        needed = self.rank_bytes(schedule, load)
        has = self.budget_bytes
        if needed > has:
            slots = load.topology.slots_per_rank
            most = largest_batch(lambda tokens: self.memory_of(schedule, slots, tokens), has)
            enough = "not even one token a rank fits"
            if most:
                enough = f"at most {most:,} tokens a rank fit: --tokens-per-rank {most}, or fewer requests with --concurrency"
            raise DoesNotFit(
                f"{schedule.name} needs {needed:,} bytes on every rank, of {has:,} ({enough})", needed - has
            )

    def run(
        self, schedule: ExpertParallelSchedule, load: StepLoad, *, engine: str = "compiled", rows: bool = False
    ) -> EpOutcome:
        """Return the outcome of one step under one engine, or under both, compared ("both")."""
        program, tables = self.program(schedule), self.tables(schedule, load)
        return run_engines(program, tables, schedule.name, engine=engine, rows=rows)

    def predict(self, schedule: ExpertParallelSchedule, loads: Sequence[StepLoad], *, engine: str = "compiled", rows: bool = False,
                check_memory: bool = True, parts: bool = False) -> EpPrediction:  # fmt: skip
        """Return the prediction for a schedule over `loads`, counted under its own division; raises DoesNotFit.

        rows: keep the first step's timeline. parts: say where the time goes.
        """
        if not loads:
            raise InputError("loads", 0, "no step to predict", "give a recording with tokens")
        program = self.program(schedule)
        outcomes, times, sizes, paths = [], [], [], []
        for number, load in enumerate(loads):
            if check_memory and number == 0:
                self.check_fits(schedule, load)
            tables = self.tables(schedule, load)
            outcomes.append(run_engines(program, tables, schedule.name, engine=engine, rows=rows and number == 0))
            times.append(_times(program, tables))
            if parts:
                paths.append(critical_path(program, tables, outcomes[-1]))
            sizes.append(tables.ex_bytes.sum(axis=(0, 2)))
        steps_s = np.array([outcome.makespan_ns for outcome in outcomes]) / NS_PER_S
        compute, expert, exchange = (float(np.mean(column)) / NS_PER_S for column in zip(*times, strict=True))
        step_s = float(steps_s.mean())
        busy = np.mean([outcome.busy_ns.mean(axis=0) / outcome.makespan_ns for outcome in outcomes], axis=0).tolist()
        names = {"compute": LANE_COMPUTE, "inter": LANE_INTER + INTER, "intra": LANE_INTER + INTRA}
        volume = np.mean(sizes, axis=0)
        yielded = self.kept_share * float(np.mean([load.num_tokens for load in loads]))
        return EpPrediction(
            schedule=schedule, step_s=step_s, relative_uncertainty=self._uncertainty(compute, exchange, loads[0].exact, schedule),
            steps_s=tuple(steps_s.tolist()), layer_s=step_s / self.model.num_moe_layers, compute_s=compute, expert_s=expert,
            exchange_s=exchange, exposed_s=step_s - compute, busy_fraction={name: busy[lane] for name, lane in names.items()},
            max_over_mean_load=float(np.mean([load.max_over_mean() for load in loads])), inter_node_bytes=int(volume[INTER]),
            intra_node_bytes=int(volume[INTRA]), tokens_per_s=yielded / step_s,
            bound="compute" if compute >= exchange else "exchange", outcome=outcomes[0], parts=_mean_parts(paths) if paths else None,
        )  # fmt: skip

    def uncertainties(self) -> dict[str, float]:
        """Return the relative uncertainty of what schedules have in common: dense kernels, kernels of experts, exchanges."""
        wrong = {name: each.relative_uncertainty for name, each in self.costing.estimates.items()}
        tiers = (self.costing.constants.intra, self.costing.constants.inter)
        return {
            "dense": max(wrong.get("dense", 0.0), wrong.get("head", 0.0)), "expert": wrong.get("expert", 0.0),
            "exchange": max(tier.relative_uncertainty for tier in tiers if tier is not None),
        }  # fmt: skip

    def _uncertainty(self, compute_s: float, exchange_s: float, exact: bool, schedule: ExpertParallelSchedule) -> float:
        """Return the relative uncertainty of a step: kernels' and links' weighted by their time, more from counts alone."""
        estimates, constants = self.costing.estimates, self.costing.constants
        kernel = max((each.relative_uncertainty for each in estimates.values()), default=0.0)
        link = max(
            constants.intra.relative_uncertainty, constants.inter.relative_uncertainty if constants.inter else 0.0
        )
        if constants.network is not None and schedule.parallel.group(self.ranks_per_node) > self.ranks_per_node:
            link = max(link, constants.network.relative_uncertainty)
        total = compute_s + exchange_s
        weighted = (kernel * compute_s + link * exchange_s) / total if total else 0.0
        if constants.ranks is not None and constants.ranks.step_uncertainty is not None:
            weighted = constants.ranks.step_uncertainty  # measured of whole steps, whose stages err in both directions
        # Constants that someone states stand for themselves; a real server's steps were never closer than this.
        least = 0.0 if self.constants is not None or self.profile.curves else served_error()
        return max(weighted, least) + (0.0 if exact else INDEPENDENCE_UNCERTAINTY)

    def sources(self) -> str:
        """Return where the costs used so far come from, most trusted first."""
        constants = self.costing.constants
        names = {part for each in self.costing.estimates.values() for part in each.source.split("+")}
        for tier in (constants.intra, constants.inter):
            names |= set(tier.source.split("+")) if tier else set()
        return "+".join(sorted(names))


def _mean_parts(paths: Sequence[CriticalPath]) -> StepParts:
    """Return where the mean step's time goes; kinds without time are left out."""
    by_kind = {
        kind: float(np.mean([path.by_kind_ns[kind] for path in paths])) / NS_PER_S for kind in paths[0].by_kind_ns
    }
    imbalance = float(np.mean([path.imbalance_ns for path in paths])) / NS_PER_S
    return StepParts(by_kind_s={kind: value for kind, value in by_kind.items() if value}, imbalance_s=imbalance)


def run_engines(program: Program, tables: EpTables, name: str, *, engine: str, rows: bool) -> EpOutcome:
    """Return the outcome under one engine ("compiled", "simpy"), or under both, compared ("both"); raises Internal."""
    if engine == "simpy":
        return run_ep_simpy(program, tables)
    outcome = run_ep_compiled(program, tables, rows=rows or engine == "both")
    if engine == "both":
        difference = first_ep_difference(run_ep_simpy(program, tables), outcome)
        if difference is not None:
            raise Internal(f"the engines disagree on {name}: {difference}")
    return outcome


def _times(program: Program, tables: EpTables) -> tuple[int, int, int]:
    """Return nanoseconds of (the busiest rank's kernels, expert stages by their slowest rank, exchanges by their slowest port)."""
    expert = tables.work_ns[program.op_kind == OP_EXPERT].max(axis=1).sum()
    longest = tables.ex_ns.max(axis=2)  # [exchanges, tiers]
    together = program.ex_mode == TOGETHER
    exchange = np.where(together, longest.max(axis=1), longest.sum(axis=1)).sum()
    return int(tables.work_ns.sum(axis=0).max()), int(expert), int(exchange)
