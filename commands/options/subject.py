"""What a prediction is of, as a command line names it: model and weights, machine and engine, recording or lengths of requests.

Modelled: one way for every command from its options to a simulation, with what was taken where nothing was said. Ignored: which
schedule is predicted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...base.errors import InputError
from .settings import Settings

if TYPE_CHECKING:
    from ...sim.offload.simulate import Simulation
    from ...specs.machines.engines import Engine
    from ...specs.machines.profile import Profile
    from ...specs.models import ModelSpec, WeightFormat
    from ...specs.schedules.offload import OffloadSchedule

DEFAULT_PROMPT, DEFAULT_REPLY, DEFAULT_UBATCH = 512, 128, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A simulation, with what the answer must say about how it came about."""

    simulation: Simulation
    engine: Engine | None
    """The serving engine of a machine made of parts; None where constants are of a whole machine."""
    concurrency: int
    ubatch: int | None
    upload_tokens: int | None
    described: dict[str, Any]
    """Keys of the answer's document."""
    notes: tuple[str, ...]
    """The same in words."""
    request_options: dict[str, str] = field(default_factory=dict)
    """Fields of the workload that an option of their own has set."""

    def at_once(self, schedule: OffloadSchedule) -> OffloadSchedule:
        """Return a schedule with this subject's batching, and with what its engine does with large passes."""
        schedule = dataclasses.replace(
            schedule,
            workload=dataclasses.replace(
                schedule.workload, concurrency=self.concurrency, prefill_chunk_tokens=self.ubatch
            ),
        )
        if self.upload_tokens is not None and schedule.kernel.miss != "fetch":
            schedule = schedule.with_options(kernel__upload_tokens=self.upload_tokens)
        return schedule

    def start(self, name: str | None) -> OffloadSchedule:
        """Return the schedule to start from: the preset asked for, else everything on the device where it fits, else what the
        engine does of itself.
        """
        from ...specs.schedules.presets import load_preset

        if name is not None or self.engine is None:
            return self.at_once(load_preset(name or "mixtral-offloading"))
        resident = self.at_once(load_preset("resident"))
        if self.simulation.slots_that_fit(resident) == self.simulation.num_experts or not self.engine.offload:
            return resident
        preferred = "n-cpu-moe" if "n-cpu-moe" in self.engine.offload else self.engine.offload[0]
        return self.at_once(load_preset(preferred))


def open_subject(*, model: str, hardware: str, trace: str | None, engine: str | None = None, quant: str | None = None,
                 prompt_tokens: int | None = None, reply_tokens: int | None = None, context: int | None = None,
                 concurrency: int | None = None, ubatch: int | None = None, kv_type: str = "f16", memory: str | None = None,
                 window: int | None = None, dense_bits: str | None = None, changes: Settings) -> Subject:  # fmt: skip
    """Return what a command line asks about; raises InputError for options that contradict each other."""
    from ...sim.offload.simulate import Simulation
    from ...specs.machines.engines import load_engine
    from ...specs.machines.load import engine_note, load_machine
    from ...specs.memory import kv_bytes_per_value
    from ...specs.models.load import load_model
    from ...traces.synthesis.prior import prior_name, prior_recording
    from .declarations import open_trace

    spec = changes.changed_model(load_model(model))
    profile = changes.changed_machine(load_machine(hardware, engine))
    spec, dense = _formats(spec, quant, dense_bits)
    serving = None if profile.engine is None else load_engine(profile.engine.name)
    together = concurrency or 1
    notes = [f"engine: {engine_note(profile)}"] if serving is not None else []
    if trace is None:
        prompt = DEFAULT_PROMPT if prompt_tokens is None else prompt_tokens
        reply = DEFAULT_REPLY if reply_tokens is None else reply_tokens
        if prompt + reply == 0:
            raise InputError(
                "--reply-tokens", 0, "a request without any token", "give --prompt-tokens or --reply-tokens"
            )
        recording = prior_recording(spec, prompt_tokens=prompt, reply_tokens=reply, requests=together)
        routing = f"no recording: routing as {prior_name(spec)}'s, in this model's shape; {together} of {prompt} + {reply} tokens"
        notes.append(routing)
    else:
        for option, value in (("--prompt-tokens", prompt_tokens), ("--reply-tokens", reply_tokens)):
            if value is not None:
                raise InputError(option, value, "the recording has requests of its own", "leave out --trace or this")
        recording = open_trace(trace)
        routing = f"recording: {recording.source or trace}"
    simulation = Simulation(
        model=spec, profile=profile, trace=recording, window_steps=window, memory_bytes=_budget(memory, profile), dense_format=dense,
        kv_bytes_per_value=kv_bytes_per_value(kv_type), context_tokens=context,
    )  # fmt: skip
    chunk = ubatch if ubatch is not None else DEFAULT_UBATCH if serving is not None else None
    asked = {"concurrency": "--concurrency"} if concurrency is not None else {}
    if ubatch is not None:
        asked["prefill_chunk_tokens"] = "--ubatch"
    described = {
        "engine": None if profile.engine is None else {"name": profile.engine.name, "backend": profile.engine.backend,
                                                       "version": profile.engine.version},
        "machine": profile.description, "routing": routing, "kv_type": kv_type, "quant": quant,
    }  # fmt: skip
    return Subject(
        simulation=simulation, engine=serving, concurrency=together, ubatch=chunk,
        upload_tokens=None if serving is None else serving.upload_from(spec.num_experts, spec.top_k),
        described=described, notes=tuple(notes), request_options=asked,
    )  # fmt: skip


def open_simulation(
    model: str,
    hardware: str,
    trace: str,
    memory: str | None,
    window: int | None,
    dense_bits: str | None,
    settings: Settings | None = None,
) -> Simulation:
    """Return the simulation of a model on a machine over a recording, all named as on the command line.

    settings: what is changed of model and machine.
    """
    from .settings import split_settings

    return open_subject(
        model=model, hardware=hardware, trace=trace, memory=memory, window=window, dense_bits=dense_bits,
        changes=split_settings(None) if settings is None else settings,
    ).simulation  # fmt: skip


def _budget(memory: str | None, profile: Profile) -> int | None:
    """Return the device budget that was asked for; raises InputError for more than the device has."""
    from ...base.units import GIB, parse_bytes

    if memory is None:
        return None
    budget, most = parse_bytes(memory, "--memory"), profile.memory_bytes
    if budget > most:
        raise InputError("--memory", memory, f"{profile.name} has {most} bytes ({most / GIB:.2f} GiB)",
                         "give at most that, or another machine")  # fmt: skip
    return budget


def usual_dense_bits(spec: ModelSpec) -> str:
    """Return the weight format of everything but routed experts where nobody says: the checkpoint's, 16 bits at most.

    Engines serve checkpoints of 32 bits in 16; a GGUF file is run as it is.
    """
    from ...specs.models import weight_format

    stored = weight_format(spec.native_dense_bits)
    return spec.native_dense_bits if stored.head_bits is not None or stored.bits_per_weight <= 16 else "16"


def _formats(spec: ModelSpec, quant: str | None, dense_bits: str | None) -> tuple[ModelSpec, WeightFormat]:
    """Return the model with its experts in the format of `quant`, and the format of everything else.

    A model that was read from a GGUF file says how everything is stored; the formats of checkpoints say so of experts.
    """
    from ...base.errors import UnknownName
    from ...specs.models import quantised_as, weight_format
    from ...specs.models.mixes.names import mix_names

    of_file = weight_format(spec.native_dense_bits).head_bits is not None
    if quant is None:
        return spec, weight_format(
            spec.native_dense_bits if dense_bits == "native" else dense_bits or usual_dense_bits(spec)
        )
    if dense_bits is not None:
        raise InputError("--dense-bits", dense_bits, "--quant says how everything is stored", "give one of the two")
    if of_file:
        raise InputError(
            "--quant", quant, f"{spec.name} is a file, whose types are its own", "leave out --quant, or name a model"
        )
    try:
        experts, dense = quantised_as(quant, None, spec)
    except UnknownName:
        raise UnknownName("--quant", quant, mix_names()) from None
    return dataclasses.replace(spec, native_bits=experts.name), dense
