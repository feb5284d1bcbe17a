"""Predict one schedule: the function behind `moeplan simulate`.

Modelled: a recording, or requests of given lengths with the routing of the model's family; settings. Ignored: which schedule is best
(`plan`), and printing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base.errors import UnknownName
from ..base.frames import Tabular, flat
from ..planner.offload.plan import prediction_to_dict
from ..sim.offload.metrics import Metrics
from ..sim.offload.simulate import Prediction
from ..sim.policies.policy_file import PolicyFile, load_policy
from ..sim.timeline import Timeline
from ..specs.machines.profile import Profile
from ..specs.memory import MemoryBreakdown
from ..specs.models import ModelSpec
from ..specs.schedules.offload import OffloadSchedule, apply_settings, parse_setting
from .drafting import AcceptanceLike, drafting_of
from .load import Recording, engine_meant
from .requests import LengthsLike
from .settings import SettingsLike, open_settings
from .subject import Subject, open_subject

SIMULATORS = ("compiled", "simpy", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult(Tabular):
    """What one schedule is predicted to do, and of what that is a prediction."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "name",
        "decode_tokens_per_s",
        "decode_tokens_per_s_low",
        "decode_tokens_per_s_high",
        "prefill_tokens_per_s",
        "ttft_s",
        "hit_rate",
        "bound",
    )
    prediction: Prediction
    subject: Subject = field(repr=False)
    """What was asked about: model, machine, recording and what was taken where nothing was said."""
    set_by_user: tuple[Mapping[str, Any], ...] = ()
    """The settings that were made, each with what stood there before."""
    policy: PolicyFile | None = None
    """The policy file whose rules the schedule follows."""

    @property
    def metrics(self) -> Metrics:
        """Speeds, times, hits and bytes, each with its interval."""
        return self.prediction.metrics

    @property
    def schedule(self) -> OffloadSchedule:
        """The schedule that was predicted, with its cache's size filled in."""
        return self.prediction.schedule

    @property
    def memory(self) -> MemoryBreakdown:
        """The memory breakdown: bytes of the device and of the host, item by item."""
        return self.prediction.memory_breakdown

    @property
    def timeline(self) -> Timeline | None:
        """Rows of what ran when, where they were asked for."""
        return self.prediction.outcome.timeline

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken where nothing was said, and what the prediction assumes."""
        return self.subject.notes + self.prediction.assumptions

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row: the schedule's options and every figure of its prediction."""
        return [flat(prediction_to_dict(self.prediction))]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan simulate --json` prints."""
        return (
            prediction_to_dict(self.prediction)
            | ({} if self.policy is None else {"policy": self.policy.to_dict()})
            | {"simulator": self.prediction.engine, "set_by_user": list(self.set_by_user)}
            | (
                {}
                if self.subject.simulation.drafting is None
                else {"drafting": self.subject.simulation.drafting.to_dict()}
            )
            | self.subject.described
        )


def simulate(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    *,
    trace: str | os.PathLike[str] | Recording | None = None,
    schedule: str | OffloadSchedule | None = None,
    settings: SettingsLike = None,
    policy: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    quant: str | None = None,
    prompt_tokens: int | None = None,
    reply_tokens: int | None = None,
    lengths: LengthsLike = None,
    context: int | None = None,
    concurrency: int | None = None,
    ubatch: int | None = None,
    kv_type: str = "f16",
    memory: int | str | None = None,
    reserve: int | str | None = None,
    window: int | None = None,
    dense_bits: str | None = None,
    split: str | None = None,
    draft_tokens: int | None = None,
    acceptance: AcceptanceLike = None,
    draft: str | os.PathLike[str] | None = None,
    simulator: str = "compiled",
    timeline: bool = False,
    seed: int = 0,
) -> SimulationResult:
    """Return the prediction of one schedule of one model on one machine.

    model, hardware, trace: names or files as on the command line, or what `load_model`, `load_machine` and `load_trace` return; without
    a trace, requests of `prompt_tokens` + `reply_tokens` tokens (512 + 128) with the routing of the model's family. schedule: a preset's
    name or a schedule; None: `mixtral-offloading` (`-code` where no guesses were recorded), or under an engine what it does of itself.
    lengths: requests that differ, or their file. settings: `{"cache.policy": "lfu"}`. policy: a file with rules of one's own,
    which is run; the schedule follows them.
    draft_tokens: guesses that each decode step verifies, of which `acceptance` are accepted (a number, shares by position, or a file of
    them), drafted by `draft`: "n-gram" (the default), "mtp", or a model of the same vocabulary.
    memory: the whole device budget, bytes or a text such as "6GiB"; reserve: what something else uses of it; of several cards each one's,
    or "22GiB,20GiB". split: how the model lies on several cards (`specs.card_split.read_split`); None: as the engine does of itself.
    context, ubatch, window: tokens that memory is kept for, prompt tokens per pass, forward passes to replay. simulator: "compiled",
    "simpy" or "both" (compared to the nanosecond). timeline: keep rows.
    seed: draws other routing like that of the model's family, where there is no trace.

    Raises InputError for options that contradict each other, DoesNotFit where the memory does not suffice.
    """
    if simulator not in SIMULATORS:
        raise UnknownName("--simulator", simulator, SIMULATORS)
    changes = open_settings(settings)
    own_rules = any(one is not None for one in (trace, schedule, policy)) or bool(changes.schedule)
    engine = engine_meant(hardware, engine, own_rules=own_rules)
    subject = open_subject(
        model=model, hardware=hardware, trace=trace, engine=engine, quant=quant, prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens, lengths=lengths, context=context, concurrency=concurrency, ubatch=ubatch, kv_type=kv_type,
        memory=memory, window=window, dense_bits=dense_bits, reserve=reserve, split=split,
        drafting=drafting_of(model, draft_tokens, acceptance, draft), settings=changes, seed=seed,
    )  # fmt: skip
    chosen = subject.at_once(schedule) if isinstance(schedule, OffloadSchedule) else subject.start(schedule)
    own = None if policy is None else load_policy(policy)
    chosen = apply_settings(
        chosen, ({} if own is None else own.settings()) | dict(parse_setting(text) for text in changes.schedule)
    )
    chosen = dataclasses.replace(chosen, workload=changes.changed_request(chosen.workload, subject.request_options))
    if schedule is None and split is None:
        subject = subject.with_cards_filled(chosen)
    subject = subject.with_layers_off(chosen)
    prediction = subject.simulation.predict(chosen, engine=simulator, rows=timeline)
    return SimulationResult(prediction=prediction, subject=subject, set_by_user=tuple(changes.made), policy=own)
