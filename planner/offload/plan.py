"""The plan: what is asked for, and the chosen schedule with its proof and its rivals.

Modelled: the best overall; every preset as baseline at the same memory and bits; what binds; and the verdict whether a better policy or
only more memory would help: the same memory with Belady's cache beside the best, and the best with more memory. Ignored: how it is
made (`make`), expert parallelism (its own planner).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ...base.errors import InputError
from ...base.frames import Tabular, flat
from ...base.version import __version__
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.plans.document import OFFLOAD, SCHEMA_VERSION
from ...specs.schedules.offload import OffloadSchedule, schedule_from_dict
from ...specs.schedules.presets import ENGINE_FAMILY, FAMILIES, NEEDS
from ...traces.content import recording_sha256
from ..trials import Tally
from .objective import RANKED_BY, Limits
from .scoring import FrontPoint
from .variants import Variant
from .verdict import need_nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadRequest:
    """What is asked of a plan for one device."""

    bits: tuple[str, ...] = ("native",)
    """Weight formats that experts may have; native: the checkpoint's."""
    objective: str = "tokens_per_s"
    floor_tokens_per_s: float | None = None
    concurrency: int = 1
    prefill_chunk_tokens: int | None = None
    exhaustive: bool = False
    """Let no candidate be eliminated by racing: every one is simulated until it cannot win."""
    ttft_s: float | None = None
    """Most that the first token of a request may take."""
    tpot_s: float | None = None
    """Most that each further token may take."""
    seconds: float | None = None
    """After so long the search begins no further candidate (several weight formats share it); None: all are looked at."""

    @property
    def limits(self) -> Limits:
        """What every schedule must keep."""
        return Limits(ttft_s=self.ttft_s, tpot_s=self.tpot_s)

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise InputError(name, limit, "not a time above zero", "give seconds")
            if limit is not None and self.objective == "least_memory":
                rule = "least memory has a floor, no limits"
                raise InputError(name, limit, rule, "give floor_tokens_per_s, or choose another objective")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError("seconds", self.seconds, "not a time above zero", "give seconds")
        floor = self.floor_tokens_per_s
        if floor is not None and not 0 < floor < math.inf:
            raise InputError("floor_tokens_per_s", floor, "not a speed above zero", "give tokens per second")
        if floor is not None and self.objective != "least_memory":
            rule = "only the objective least_memory has a floor"
            raise InputError("floor_tokens_per_s", floor, rule, "leave it out, or choose that objective")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan(Tabular):
    """A finished plan."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "role",
        "name",
        "decode_tokens_per_s",
        "decode_tokens_per_s_low",
        "decode_tokens_per_s_high",
        "prefill_tokens_per_s",
        "ttft_s",
        "request_s",
        "hit_rate",
        "bound",
    )
    request: OffloadRequest
    best: Prediction
    baselines: tuple[Prediction, ...]
    left_out: dict[str, str]
    """Presets that do not fit, and by how much."""
    front: tuple[FrontPoint, ...]
    references: dict[str, Prediction]
    """belady: the best with a cache that knows the future; more memory: the best given more."""
    tally: Tally
    """What became of all candidates."""
    lower_bound_step_s: float
    optimality_gap: float
    """How much slower the best is than the lower bound, as a fraction of the bound."""
    verdict: str
    provenance: dict[str, Any]
    made_of: dict[str, Any]
    """Model and machine, whole, as the plan document holds them."""
    simulation: Simulation = field(repr=False)
    """What the best was found on."""
    variant: Variant | None = None
    """The micro-batch and the type of keys and values that were chosen; None: by the settings of an engine."""
    served: dict[str, Any] | None = None
    """The engine that the plan is for, and how its own settings compare; None: whatever can run it."""
    asked: dict[str, Any] = field(default_factory=dict)
    """What was asked for: what makes the plan, and routing that was made up for it, again."""
    notes: tuple[str, ...] = ()
    """What was taken where nothing was said."""
    set_by_user: tuple[dict[str, Any], ...] = ()
    """What settings have changed, each with what stood there before."""
    policy: dict[str, str] | None = None
    """The policy file whose rules were tried beside the bundled ones."""
    drafting: dict[str, Any] | None = None
    """How tokens are drafted, which lengths were looked at, and when it pays; None: nobody asked."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for the best, for every published schedule, and for every reference that is out of reach."""
        found = [("best", prediction_to_dict(self.best))]
        found += [("published", prediction_to_dict(one)) for one in self.baselines]
        found += [("reference", prediction_to_dict(one) | {"name": name}) for name, one in self.references.items()]
        return [{"role": role} | flat(one) for role, one in found]

    def table_title(self) -> str:
        """Return the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, as plan.json holds it."""
        return plan_to_dict(self)


def base_schedule(request: OffloadRequest, bits: str) -> OffloadSchedule:
    """Return what the search may not change: bits and batching."""
    return OffloadSchedule(name="search").with_options(
        experts__bits=bits,
        workload__concurrency=request.concurrency,
        workload__prefill_chunk_tokens=request.prefill_chunk_tokens,
    )


def provenance_of(simulation: Simulation) -> dict[str, Any]:
    """Return what a plan document says of where it comes from."""
    return {
        "produced_by": f"moeplan {__version__}",
        "model": simulation.model.name,
        "hardware": simulation.profile.name,
        "memory_bytes": simulation.budget_bytes,
        "window_steps": simulation.window_steps,
        "dense_bits": simulation.dense_format.name if simulation.dense_format is not None else "16",
        "kv_bytes_per_value": simulation.kv_bytes_per_value,
        "context_tokens": simulation.context_tokens,
        "upload_tokens": simulation.upload_tokens,
        **(
            {}
            if simulation.split is None
            else {"split": simulation.split.to_dict(), "card_budgets": list(simulation.budgets)}
        ),
        **({} if simulation.drafting is None else {"drafting": simulation.drafting.provenance()}),
        "trace": {
            "model": simulation.trace.model,
            "source": simulation.trace.source,
            "sha256": recording_sha256(simulation.trace),
            "num_tokens": simulation.trace.num_tokens,
            "num_layers": simulation.trace.num_layers,
            "num_experts": simulation.trace.num_experts,
            "top_k": simulation.trace.top_k,
        },
    }


def prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values, flat for the keys others rely on."""
    metrics = asdict(prediction.metrics)
    return {
        "name": prediction.schedule.name,
        "schedule": prediction.schedule.to_dict(),
        **metrics,
        "memory_breakdown": prediction.memory_breakdown.to_dict(),
        **({"cards": [one.to_dict() for one in prediction.cards]} if prediction.cards else {}),
        "assumptions": list(prediction.assumptions),
        "engine": prediction.engine,
    }


def _rival_to_dict(rival: Prediction) -> dict[str, Any]:
    name = rival.schedule.name
    return prediction_to_dict(rival) | {"family": FAMILIES.get(name, ENGINE_FAMILY), "needs": NEEDS.get(name)}


def plan_to_dict(plan: OffloadPlan) -> dict[str, Any]:
    """Return a plan as plain values, as written to plan.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": OFFLOAD,
        "provenance": plan.provenance,
        **plan.made_of,
        "request": asdict(plan.request),
        "ranked_by": RANKED_BY[plan.request.objective],
        "best": prediction_to_dict(plan.best),
        "baselines": [_rival_to_dict(one) for one in need_nothing(plan.baselines)],
        "baselines_that_need_more": [_rival_to_dict(one) for one in plan.baselines if one.schedule.name in NEEDS],
        "baselines_that_do_not_fit": plan.left_out,
        "references": {name: prediction_to_dict(one) for name, one in plan.references.items()},
        "front": [
            {
                "level": p.level,
                "device_bytes": p.device_bytes,
                **p.figures,
                "schedule": p.schedule.to_dict(),
            }
            for p in plan.front
        ],
        **plan.tally.to_dict(),
        "lower_bound_step_s": plan.lower_bound_step_s,
        "optimality_gap": plan.optimality_gap,
        "verdict": plan.verdict,
        **({} if plan.served is None else {"for": plan.served}),
        **({} if plan.policy is None else {"policy": plan.policy}),
        **({} if plan.drafting is None else {"drafting": plan.drafting}),
        "asked": plan.asked,
        "notes": list(plan.notes),
        "set_by_user": list(plan.set_by_user),
    }


def plan_to_json(plan: OffloadPlan) -> str:
    """Return plan.json's text: sorted nowhere, rounded nowhere, byte-identical for equal plans."""
    return json.dumps(plan_to_dict(plan), indent=1, allow_nan=False) + "\n"


def planned_schedule(document: dict[str, Any]) -> OffloadSchedule:
    """Return the chosen schedule of a plan.json that was read back."""
    return schedule_from_dict(document["best"]["schedule"])
