"""What a prediction is of: model and weights, machine and engine, recording or lengths of requests.

Modelled: one way for every command and function from its options to a simulation, with what was taken where nothing was said; the
same for a plan that was made. Ignored: which schedule is predicted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError
from ..specs.models import ModelSpec
from ..traces.lengths import RequestLengths
from .load import Recording, as_machine, as_model
from .requests import LengthsLike, planned_routing, requests_of, routing_of
from .settings import SettingsLike, open_settings

if TYPE_CHECKING:
    from ..sim.offload.drafting.draft import Drafting
    from ..sim.offload.simulate import Simulation
    from ..specs.machines.engines import Engine
    from ..specs.machines.profile import Profile
    from ..specs.models import WeightFormat
    from ..specs.schedules.offload import OffloadSchedule


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
    asked: dict[str, Any] = field(default_factory=dict)
    """What was asked for, for a plan's document: what makes the plan, and its routing, again."""
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
        return schedule.with_upload(self.upload_tokens)

    def start(self, name: str | None) -> OffloadSchedule:
        """Return the schedule to start from: the preset asked for, else everything on the device where it fits, else what the
        engine does of itself.
        """
        from ..specs.schedules.presets import load_preset

        if name is not None or self.engine is None:
            guessed = self.simulation.trace.predicted is not None
            return self.at_once(load_preset(name or ("mixtral-offloading" if guessed else "mixtral-offloading-code")))
        resident = self.at_once(load_preset("resident"))
        if self.simulation.slots_that_fit(resident) == self.simulation.num_experts or not self.engine.offload:
            return resident
        preferred = "n-cpu-moe" if "n-cpu-moe" in self.engine.offload else self.engine.offload[0]
        return self.at_once(load_preset(preferred))

    def with_layers_off(self, schedule: OffloadSchedule) -> Subject:
        """Return the question with whole layers off the card where a schedule leaves their experts to the cores and the engine knows no
        other way.
        """
        layers = self.simulation.model.moe_layers
        if (
            self.engine is None
            or not self.engine.whole_layers
            or schedule.kernel.miss != "cpu"
            or schedule.cache.policy != "static"
        ):
            return self
        held = (self.simulation.resolve(schedule).cache.pooled_experts or 0) // self.simulation.trace.num_experts
        if held >= len(layers):
            return self
        off = layers[len(layers) - held - 1] + 1
        note = f"{off} of {self.simulation.model.num_layers} layers off the card as a whole, as {self.engine.name} has them"
        simulation = self.simulation.over(self.simulation.trace, layers_off=off)
        return dataclasses.replace(self, simulation=simulation, notes=(*self.notes, note))

    def with_cards_filled(self, schedule: OffloadSchedule) -> Subject:
        """Return the question with layers divided over several cards so that the fewest of them leave their experts to the host.

        Of whole layers only, where the host holds those of the first ones: divided by memory alone, the first card would stand empty.
        """
        from ..planner.served.llamacpp import filled_cards

        batch = schedule.workload
        if self.simulation.split is None or schedule.name != "n-cpu-moe" or batch.prefill_chunk_tokens is None:
            return self
        one = filled_cards(self.simulation, batch.concurrency, batch.prefill_chunk_tokens)
        if one is None or one.split is None:  # what is missing is said where the schedule is predicted
            return self
        kept = tuple(note for note in self.notes if not note.startswith("cards: "))
        how = f"cards: {one.split.words}; told {one.words}: the fewest layers leave their experts to the host (--split layer: by memory)"
        return dataclasses.replace(self, simulation=self.simulation.divided(one.split), notes=(*kept, how))


def open_subject(*, model: str | os.PathLike[str] | ModelSpec, hardware: str | Profile,
                 trace: str | os.PathLike[str] | Recording | None = None, engine: str | None = None, quant: str | None = None,
                 prompt_tokens: int | None = None, reply_tokens: int | None = None, lengths: LengthsLike = None,
                 context: int | None = None, concurrency: int | None = None, ubatch: int | None = None, kv_type: str = "f16",
                 memory: int | str | None = None, window: int | None = None, dense_bits: str | None = None,
                 reserve: int | str | None = None, split: str | None = None, drafting: Drafting | None = None,
                 settings: SettingsLike = None, seed: int = 0, native: bool = True) -> Subject:  # fmt: skip
    """Return what is asked about; raises InputError for options that contradict each other.

    Nouns are given as they are or named as on the command line; the other options are those of `simulate`. native: experts are as the
    checkpoint has them, or a file of it.
    """
    from ..sim.offload.simulate import Simulation
    from ..specs.card_split import read_split
    from ..specs.machines.compose import assumed_of
    from ..specs.machines.engines import load_engine, prompt_chunk_on
    from ..specs.machines.load import engine_note
    from ..specs.memory import kv_bytes_of
    from ..specs.models.mixes.known import known_name

    changes = open_settings(settings)
    spec = changes.changed_model(as_model(model))
    profile = changes.changed_machine(as_machine(hardware, engine))
    serving = None if profile.engine is None else load_engine(profile.engine.name)
    written, quant = quant, None if quant is None else known_name(quant)
    if quant is not None and serving is not None and not serving.gguf and quant.lower() == spec.native_bits:
        quant = None  # what such an engine is given is the checkpoint itself
    bits_said = (
        not native or dense_bits is not None or any(text.startswith("experts.bits=") for text in changes.schedule)
    )
    is_assumed = quant is None and not bits_said
    if is_assumed and serving is not None:
        quant = _usual_file(spec, serving)
    spec, dense = _formats(spec, quant, dense_bits)
    profile, weights_from = _as_uncertain(profile, spec, quant, dense, written or quant)
    if quant is not None and is_assumed:
        weights_from.append(f"{quant} taken, as files of {spec.name} are published; --quant says another")
    elif serving is not None and quant is None and not spec.is_file:
        more = "; --quant names the format of a file, such as Q4_K_M" if serving.gguf else ""
        weights_from.append(
            f"weights as the checkpoint has them: experts {spec.native_bits}, others {dense.name}{more}"
        )
    together = concurrency or 1
    said = changes.request.get("concurrency", "")
    made_for = (
        int(said) if concurrency is None and said.isascii() and said.isdigit() and 0 < len(said) < 6 else together
    )
    asked_lengths = requests_of(lengths, prompt_tokens, reply_tokens, recorded=trace is not None,
                                together=max(1, made_for), longest=spec.longest_context)  # fmt: skip
    routed = routing_of(spec, trace, asked_lengths, seed)
    notes = [*([f"engine: {engine_note(profile)}"] if serving is not None else []), *weights_from]
    if (assumed := assumed_of(profile)) is not None:
        notes.insert(0, f"machine: assumed because not stated: {assumed}")
    if asked_lengths is not None:
        notes.append(routed.words)
    uploads = None if serving is None else serving.upload_from(spec.num_experts, spec.top_k)
    _check_context(spec, context, asked_lengths)
    share = 1.0 if serving is None else serving.memory_share
    budgets = _card_budgets(memory, reserve, profile, share)
    if serving is not None and share < 1 and memory is None:
        notes.append(f"memory: {share:.0%} of the card, as {serving.name} fills of itself; --memory says another")
    divided, taken = read_split(split, profile, spec.num_layers, free_bytes=budgets)
    if divided is not None:
        notes.append(f"cards: {'; '.join((divided.words, *taken))}")
    simulation = Simulation(
        model=spec, profile=profile, trace=routed.recording, window_steps=window, split=divided, card_budgets=budgets, drafting=drafting,
        memory_bytes=None if budgets else _budget(memory, reserve, profile, share),
        dense_format=dense, kv_bytes_per_value=kv_bytes_of(kv_type, spec), context_tokens=context, upload_tokens=uploads,
        likewise=routed.spread,
    )  # fmt: skip
    chunk = ubatch if ubatch is not None else None if serving is None else prompt_chunk_on(profile)
    asked = {"concurrency": "--concurrency"} if concurrency is not None else {}
    if ubatch is not None:
        asked["prefill_chunk_tokens"] = "--ubatch"
    described = {
        "engine": None if profile.engine is None else {"name": profile.engine.name, "backend": profile.engine.backend,
                                                       "version": profile.engine.version},
        "machine": profile.description, "routing": routed.words, "kv_type": kv_type, "quant": quant,
    }  # fmt: skip
    return Subject(
        simulation=simulation, engine=serving, concurrency=together, ubatch=chunk,
        upload_tokens=uploads, described=described, notes=tuple(notes), request_options=asked,
        asked={
            "model": spec.name if isinstance(model, ModelSpec) else os.fspath(model),
            "hardware": hardware if isinstance(hardware, str) else hardware.name, "engine": engine, "quant": quant,
            "prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens, "context": context, "concurrency": together, "ubatch": ubatch,
            "kv_type": kv_type, "dense_bits": dense_bits, "routing": routed.words,
            "prior": asked_lengths.to_dict() if asked_lengths is not None and trace is None else None,
            "segments": asked_lengths.to_dict() if asked_lengths is not None and trace is not None else None,
        },
    )  # fmt: skip


def planned_simulation(document: Mapping[str, Any], trace: str | os.PathLike[str] | Recording | None) -> Simulation:
    """Return the simulation that an offload plan was made on: its model and machine, its recording or the routing made up for it.

    trace: the recording as the command line names it; None where the plan has none. Raises InputError for another recording.
    """
    from ..sim.offload.drafting.draft import drafting_from_dict
    from ..sim.offload.simulate import Simulation
    from ..specs.card_split import split_from_dict
    from ..specs.models import weight_format
    from ..specs.provenance import machine_of, model_of

    provenance, model = document.get("provenance"), model_of(document)
    if not isinstance(provenance, dict):
        raise InputError(
            "plan.provenance", provenance, "missing from the plan", "give a plan.json written by moeplan plan"
        )
    routed, profile = planned_routing(document, model, trace), machine_of(document)
    divided = None
    if profile.cards:
        divided = split_from_dict(provenance.get("split"), model.num_layers, profile.num_cards)
    return Simulation(
        model=model, profile=profile, trace=routed.recording, window_steps=provenance.get("window_steps"), split=divided,
        card_budgets=_planned_budgets(provenance.get("card_budgets"), profile) if profile.cards else (),
        memory_bytes=provenance.get("memory_bytes"), dense_format=weight_format(str(provenance.get("dense_bits", "16"))),
        kv_bytes_per_value=provenance.get("kv_bytes_per_value", 2), context_tokens=provenance.get("context_tokens"),
        upload_tokens=provenance.get("upload_tokens"), drafting=drafting_from_dict(provenance.get("drafting")),
        likewise=routed.spread,
    )  # fmt: skip


def _check_context(spec: ModelSpec, context: int | None, lengths: RequestLengths | None) -> None:
    """Return nothing; raises InputError for more context than the model was made for."""
    most = spec.longest_context
    asked = [("--context", context), ("--prompt-tokens + --reply-tokens", None if lengths is None else lengths.longest)]
    for option, tokens in asked:
        if most is not None and tokens is not None and tokens > most:
            rule = f"{spec.name} was made for {most} tokens of context"
            raise InputError(
                option,
                tokens,
                rule,
                f"ask for fewer; where it is stretched (YaRN), --set model.longest_context={tokens}",
            )


def _budget(memory: int | str | None, reserve: int | str | None, profile: Profile, share: float) -> int | None:
    """Return the device budget that was asked for, else the share that the engine fills of itself, None for all of it.

    Raises InputError for more than the device has.
    """
    from ..base.units import GIB

    kept = bytes_of(reserve, "--reserve") or 0
    asked, most = bytes_of(memory, "--memory"), profile.memory_bytes
    if asked is None and not kept and share >= 1:
        return None
    budget = int(most * share) if asked is None else asked
    if budget > most:
        raise InputError("--memory", memory, f"{profile.name} has {most} bytes ({most / GIB:.2f} GiB)",
                         "give at most that, or another machine")  # fmt: skip
    if kept >= budget:
        raise InputError(
            "--reserve", reserve, f"the device budget is {budget} bytes ({budget / GIB:.2f} GiB)", "reserve less"
        )
    return budget - kept


def _card_budgets(
    memory: int | str | None, reserve: int | str | None, profile: Profile, share: float
) -> tuple[int, ...]:
    """Return what each of several cards may hold: one size counts for each of them, or sizes stand with commas between; () for one card.

    Raises InputError for sizes of another number of cards, and for more than a card has.
    """
    if not profile.cards:
        return ()
    asked, kept = (_of_each(size, profile, option) for size, option in ((memory, "--memory"), (reserve, "--reserve")))
    return tuple(
        _budget(budget, less, profile.of_card(card), share) or profile.card_bytes[card]
        for card, (budget, less) in enumerate(zip(asked, kept, strict=True))
    )


def _of_each(size: int | str | None, profile: Profile, option: str) -> tuple[int | str | None, ...]:
    if not isinstance(size, str) or "," not in size:
        return (size,) * profile.num_cards
    found = tuple(part.strip() for part in size.split(","))
    if len(found) != profile.num_cards:
        rule = f"{len(found)} sizes for {profile.num_cards} cards"
        raise InputError(option, size, rule, "give one for each card, or one that counts for each")
    return found


def _planned_budgets(given: object, profile: Profile) -> tuple[int, ...]:
    if (
        isinstance(given, list)
        and len(given) == profile.num_cards
        and all(type(one) is int and one > 0 for one in given)
    ):
        return tuple(given)
    raise InputError(
        "plan.provenance.card_budgets", given, "not the bytes of each card", "give a plan.json written by moeplan plan"
    )


def rank_budget(
    memory: int | str | None, reserve: int | str | None, requested: int | None, profile: Profile
) -> int | None:
    """Return the bytes that each of many devices may hold: as asked, else what serving engines fill; None: all it has.

    Raises InputError as for one device.
    """
    from ..specs.machines.engines import SERVED_SHARE

    if memory is not None and requested is not None:
        raise InputError("--memory", memory, "the request says it already", "give one of the two")
    return _budget(
        requested if memory is None else memory, reserve, profile, 1.0 if profile.device.kind == "cpu" else SERVED_SHARE
    )


def bytes_of(size: int | str | None, field: str) -> int | None:
    """Return a size in bytes, given as a number of them or as a text such as "6GiB"; raises InputError for another one."""
    from ..base.units import parse_bytes

    if isinstance(size, str):
        return parse_bytes(size, field)
    if size is not None and (isinstance(size, bool) or size < 0):
        raise InputError(field, size, "not a size", "give bytes, or a text such as 6GiB")
    return size


def _formats(spec: ModelSpec, quant: str | None, dense_bits: str | None) -> tuple[ModelSpec, WeightFormat]:
    """Return the model with its experts in the format of `quant`, and the format of everything else.

    A model that was read from a GGUF file says how everything is stored; the formats of checkpoints say so of experts.
    """
    from ..base.errors import UnknownName
    from ..specs.models import quantised_as, weight_format
    from ..specs.models.mixes.known import USUAL

    if quant is None:
        return spec, weight_format(
            spec.native_dense_bits if dense_bits == "native" else dense_bits or spec.usual_dense_bits
        )
    if dense_bits is not None:
        raise InputError("--dense-bits", dense_bits, "--quant says how everything is stored", "give one of the two")
    if spec.is_file:
        raise InputError(
            "--quant", quant, f"{spec.name} is a file, whose types are its own", "leave out --quant, or name a model"
        )
    try:
        experts, dense = quantised_as(quant, None, spec)
    except UnknownName:
        raise UnknownName("--quant", quant, USUAL, more="any other name that GGUF files have is known too") from None
    return dataclasses.replace(spec, native_bits=experts.name), dense


def _usual_file(spec: ModelSpec, serving: Engine) -> str | None:
    """Return the format of the files of a model that an engine is given where nobody says one; None: the checkpoint's formats.

    Checkpoints of few bits are published as they are, with everything else in 8 bits; of others, files of many formats are.
    """
    from ..specs.models.mixes.published import file_as_trained

    return file_as_trained(spec) if serving.gguf and not spec.is_file else None


def _as_uncertain(
    profile: Profile, spec: ModelSpec, quant: str | None, dense: WeightFormat, written: str | None
) -> tuple[Profile, list[str]]:
    """Return the machine, as uncertain as a mix without a recipe makes every reading of weights; and a line on where bytes are from.

    written: the name as it was given.
    """
    from ..base.units import GIGA
    from ..specs.models import weight_format
    from ..specs.models.mixes.names import mix

    if quant is None:
        return profile, []
    found = mix(quant)
    experts = weight_format(spec.native_bits)
    total = spec.dense_bytes(dense) + spec.num_routed_experts * spec.expert_bytes(experts)
    size = f"{total / GIGA:.1f} GB in all, experts {float(experts.bits_per_weight):.4g} bits a weight"
    if found is None:
        return profile, [f"{written}: {size}, everything else {float(dense.bits_per_weight):.4g}"]
    if found.dynamic is None:
        return profile, [f"{found.name}, matrix by matrix as its quantiser stores this model: {size}"]
    spread = found.dynamic.spread
    note = f"{found.name} has no published recipe: {size}, as files of that name average; this model's may differ by {spread:.0%}"
    return profile.with_rates_uncertain_by(spread), [f"{note} (--model FILE.gguf reads it)"]
