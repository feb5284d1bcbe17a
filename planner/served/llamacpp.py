"""llama.cpp and its fork ik_llama.cpp as search spaces: layers whose experts stay in host memory, micro-batch, where large passes compute.

Modelled: `--n-cpu-moe N` (`--cpu-moe`: all, N = 0: none) with everything else on the card, `-ub`, `--no-op-offload`; and the engine's own
choices where it is told nothing: `--fit`, on by default, as `common/fit.cpp` has it. That leaves 1024 MiB of the card free; where not all
fits so, all dense weights go to the card, then experts of whole layers from the front, then, of one more layer, one or two of its
three matrices. ik_llama.cpp puts everything on the card unless it is told otherwise (its `--fit` is off and another one), and has no
`--no-op-offload`. Ignored: that last part of a layer (its gain at most is granted when schedules are compared), fewer layers on the
card (`-ngl N`) where not even the dense weights fit. Several cards: `cards`.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...base.errors import DoesNotFit
from ...base.units import MIB
from ...sim.offload.simulate import Simulation
from ...specs.card_split import LAYER, divide
from ...specs.machines.engines import load_engine
from ...specs.schedules.presets import load_preset
from .cards import divided, filled_from_the_front
from .setting import Setting, check_cards, check_fits, check_host, device_bytes, fitting, has_card, passes_tried

FIT_MARGIN_BYTES = 1024 * MIB
UBATCHES = (512, 1024, 2048, 4096)
DEFAULT_BATCH = 2048
# Numbers of layers on the host that are looked at, besides the fewest: spread evenly up to all.
_LEVELS = 7
FITTED = "--fit (the default)"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSpace:
    """The settings of llama.cpp or of a fork of it."""

    name: str
    fits: bool
    """Told nothing, it chooses placement itself; else everything goes to the card."""
    keeps_on_cores: bool
    """It can be told that large passes compute experts of host memory on the cores."""

    def settings(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, refused: list[DoesNotFit]
    ) -> list[Setting]:
        """Return every setting that is looked at and fits, by micro-batch, the fewest layers on the host first.

        ubatch: the micro-batch asked for; None: several are tried. refused: is given why others do not fit. Where large passes copy no
        experts the card needs no room for them, and holds those of more layers.
        """
        on_cores = self.keeps_on_cores and simulation.upload_tokens is not None
        candidates = (
            _over_cards(simulation, setting(simulation, host_layers, concurrency, each, op_offload=op_offload))
            for each in passes_tried(simulation, ubatch, UBATCHES)
            for host_layers, op_offload in self._counts(simulation, concurrency, each, refused, on_cores=on_cores)
        )
        return fitting(simulation, candidates, lambda _, reason: refused.append(reason))

    def defaults(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, left_out: dict[str, str]
    ) -> list[Setting]:
        """Return what people start the engine with: nothing set (`--fit`), `--cpu-moe`, everything on the card where it fits.

        left_out: is given, by name, why one of them cannot run or is not modelled.
        """
        each = ubatch if ubatch is not None else load_engine(self.name).prompt_chunk(0)
        found = []
        if self.fits:
            try:
                found.append(fitted(simulation, concurrency, each))
            except DoesNotFit as reason:
                left_out[FITTED] = str(reason)
        layers = simulation.trace.num_layers
        told = (layers, 0) if self.fits else (0, layers)
        counts = told if has_card(simulation) else () if self.fits else (0,)
        if simulation.split is not None:  # as the engine divides what it is told to place itself: by the cards' memory
            by_memory = divide(simulation.profile, simulation.model.num_layers, free_bytes=simulation.budgets)[0]
            told_words = "--cpu-moe", "-ngl 999"
            candidates = (
                dataclasses.replace(
                    setting(simulation, count, concurrency, each), split=by_memory, words=f"{name} -ub {each}"
                )
                for name, count in zip(told_words, (layers, 0), strict=True)
            )
        else:
            candidates = (setting(simulation, host_layers, concurrency, each) for host_layers in counts)
        return found + fitting(simulation, candidates, lambda one, reason: left_out.update({one.words: str(reason)}))

    def fuller(self, simulation: Simulation, default: Setting) -> Setting:
        """Return a default with the whole of the layer of which it has a part on the card."""
        more = setting(
            simulation, default.host_layers - 1, default.schedule.workload.concurrency, default.ubatch, front=True
        )
        return dataclasses.replace(more, split=default.split)

    def _counts(
        self, simulation: Simulation, concurrency: int, ubatch: int, refused: list[DoesNotFit], *, on_cores: bool
    ) -> Sequence[tuple[int, bool]]:
        """Return numbers of layers on the host, each with whether large passes copy their experts to the card."""
        found = [(count, True) for count in self._levels(simulation, concurrency, ubatch, refused, op_offload=True)]
        if on_cores:
            few = self._levels(simulation, concurrency, ubatch, refused, op_offload=False)
            found += [(count, False) for count in few if count]
        return sorted(found, key=lambda each: (each[0], not each[1]))

    def _levels(
        self, simulation: Simulation, concurrency: int, ubatch: int, refused: list[DoesNotFit], *, op_offload: bool
    ) -> Sequence[int]:
        """Return numbers of layers on the host: the fewest with which the card is large enough, some more, all."""
        numbers = _numbers(simulation)
        if simulation.split is not None:
            return _levels_over_cards(simulation, numbers, concurrency, ubatch, refused, op_offload=op_offload)
        one, missing = fewest_on_host(simulation, numbers, concurrency, ubatch, op_offload=op_offload)
        if not missing:
            return sorted({one.host_layers, numbers[-1], *_spread(one.host_layers, numbers[-1])})
        where = f"{self.name} with a micro-batch of {ubatch} tokens and all experts in host memory"
        refused.append(DoesNotFit(where, missing))
        return ()


LLAMA_CPP = LlamaSpace(name="llama.cpp", fits=True, keeps_on_cores=True)
IK_LLAMA_CPP = LlamaSpace(name="ik_llama.cpp", fits=False, keeps_on_cores=False)


def setting(simulation: Simulation, host_layers: int, concurrency: int, ubatch: int, *, op_offload: bool = True,
            front: bool = False) -> Setting:  # fmt: skip
    """Return the setting with so many layers' experts in host memory; front: those on the card are the first layers'."""
    layers, each = simulation.trace.num_layers, simulation.trace.num_experts
    batching = {"workload__concurrency": concurrency, "workload__prefill_chunk_tokens": ubatch}
    if host_layers == 0:
        schedule = load_preset("resident").with_options(cache__experts_per_layer=each, **batching)
    elif host_layers >= layers:
        schedule = load_preset("cpu-moe").with_options(**batching)
    else:
        schedule = load_preset("n-cpu-moe").with_options(
            cache__pooled_experts=(layers - host_layers) * each,
            cache__placement="front" if front else "back",
            **batching,
        )
    bits = simulation.expert_format(schedule).name
    schedule = schedule.with_options(experts__bits=bits).with_upload(simulation.upload_tokens if op_offload else None)
    count = min(host_layers, layers)
    told, card = simulation.model.moe_layers[count - 1] + 1 if count else 0, has_card(simulation)
    placed = "--cpu-moe " if count == layers else f"--n-cpu-moe {told} " if count else "-ngl 999 "
    words = f"{placed if card else ''}-ub {ubatch}" + ("" if op_offload else " --no-op-offload")
    return Setting(
        schedule=schedule, words=words, cached_experts=(layers - count) * each, host_layers=count, ubatch=ubatch,
        op_offload=op_offload, card=card, told_layers=told,
    )  # fmt: skip


def fewest_on_host(simulation: Simulation, counts: Sequence[int], concurrency: int, ubatch: int, *, free_bytes: int = 0,
                   front: bool = False, op_offload: bool = True) -> tuple[Setting, int]:  # fmt: skip
    """Return the setting with the fewest of `counts` layers' experts in host memory that leaves so much of the card free, and 0.

    Where none does, the last of them, and the bytes that it lacks. counts: rising, at least one; front, op_offload: see `setting`.
    """
    found: dict[int, tuple[Setting, int]] = {}

    def lacking(count: int) -> int:
        if count not in found:
            one = setting(simulation, count, concurrency, ubatch, front=front, op_offload=op_offload)
            found[count] = one, device_bytes(simulation, one) + free_bytes - simulation.budget_bytes
        return found[count][1]

    # Each further layer on the host takes less of the card, but for the first: it brings a buffer for what is copied.
    first, rest = counts[0], counts[1:]
    if lacking(first) > 0 and rest and lacking(rest[-1]) <= 0:
        count = rest[bisect.bisect_left(rest, True, key=lambda each: lacking(each) <= 0)]
    else:
        count = first if lacking(first) <= 0 or not rest else rest[-1]
    return found[count][0], max(0, lacking(count))


def fewest_host_layers(simulation: Simulation, concurrency: int, ubatch: int, free_bytes: int = 0) -> int | None:
    """Return how few layers' experts may lie in host memory with so much of the card left free; None where not even all suffice."""
    counts = range(simulation.trace.num_layers + 1)
    one, missing = fewest_on_host(simulation, counts, concurrency, ubatch, free_bytes=free_bytes)
    return None if missing else one.host_layers


def fitted(simulation: Simulation, concurrency: int, ubatch: int, free_bytes: int = FIT_MARGIN_BYTES) -> Setting:
    """Return what `--fit` makes of a context that is set; raises DoesNotFit where it would leave dense layers off the card.

    free_bytes: of the card, what it leaves free (`--fit-target`).
    """
    if simulation.split is not None:
        return _fitted_over_cards(simulation, concurrency, ubatch, free_bytes)
    chosen, missing = fewest_on_host(
        simulation, _numbers(simulation), concurrency, ubatch, free_bytes=free_bytes, front=True
    )
    if missing:
        free = f"{free_bytes // MIB} MiB left free"
        raise DoesNotFit(
            f"everything but experts, with {free}: layers would leave the card, which is not modelled", missing
        )
    check_fits(simulation, chosen)
    layer_bytes = simulation.expert_bytes(chosen.schedule) * simulation.trace.num_experts
    matrices = 3 if simulation.model.gated else 2
    left = simulation.budget_bytes - free_bytes - device_bytes(simulation, chosen)
    part = min(matrices - 1, left * matrices // layer_bytes) / matrices if chosen.host_layers else 0.0
    schedule = chosen.schedule.with_options(name=FITTED)
    return dataclasses.replace(chosen, schedule=schedule, words=FITTED, fitted=True, part_of_layer=part)


def _over_cards(simulation: Simulation, one: Setting) -> Setting:
    """Return a setting with its layers divided over the cards, where there are several."""
    if simulation.split is None:
        return one
    split = divided(simulation, one.schedule, one.cached_experts)
    told = ",".join(f"{share:g}" for share in split.shares)
    return dataclasses.replace(one, split=split, words=f"-sm layer -ts {told} {one.words}")


def _levels_over_cards(
    simulation: Simulation,
    numbers: range,
    concurrency: int,
    ubatch: int,
    refused: list[DoesNotFit],
    *,
    op_offload: bool,
) -> Sequence[int]:
    """Return numbers of layers on the host: the fewest with which all cards are large enough, some more, the most that the host holds."""

    def of(count: int) -> Setting:
        return setting(simulation, count, concurrency, ubatch, op_offload=op_offload)

    def hosted(count: int) -> DoesNotFit | None:
        return _lacking(lambda: check_host(simulation, of(count)))

    try:
        fewest = fewest_over_cards(simulation, numbers, concurrency, ubatch, op_offload=op_offload).host_layers
    except DoesNotFit as reason:
        refused.append(reason)
        return ()
    if (lacking := hosted(fewest)) is not None:
        refused.append(lacking)
        return ()
    above = range(fewest + 1, numbers[-1] + 1)
    most = fewest + bisect.bisect_left(above, True, key=lambda count: hosted(count) is not None)
    return sorted({fewest, most, *_spread(fewest, most)})


def fewest_over_cards(
    simulation: Simulation, numbers: range, concurrency: int, ubatch: int, *, op_offload: bool = True
) -> Setting:
    """Return the setting with the fewest layers' experts in host memory with which all cards are large enough, divided over them.

    Raises DoesNotFit where not even all suffice. What the host has room for is not asked.
    """

    def on_cards(count: int) -> Setting:
        one = _over_cards(simulation, setting(simulation, count, concurrency, ubatch, op_offload=op_offload))
        check_cards(simulation, one)
        return one

    def fits(count: int) -> bool:
        return _lacking(lambda: on_cards(count)) is None

    if fits(numbers[0]):
        return on_cards(numbers[0])
    return on_cards(numbers[1:][min(bisect.bisect_left(numbers[1:], True, key=fits), len(numbers) - 2)])


def filled_cards(simulation: Simulation, concurrency: int, ubatch: int) -> Setting | None:
    """Return `fewest_over_cards` of all layers; None where not even the rest fits, or cards do not hold whole layers."""
    if simulation.split is None or simulation.split.mode != LAYER:
        return None
    try:
        return fewest_over_cards(simulation, range(simulation.trace.num_layers + 1), concurrency, ubatch)
    except DoesNotFit:
        return None


def _lacking(ask: Callable[[], object]) -> DoesNotFit | None:
    """Return why something does not fit, None where it does."""
    try:
        ask()
    except DoesNotFit as reason:
        return reason
    return None


def _fitted_over_cards(simulation: Simulation, concurrency: int, ubatch: int, free_bytes: int) -> Setting:
    """Return what `--fit` makes of several cards: its own split by memory where all fits so, whole layers from the front otherwise."""
    layers, each = simulation.trace.num_layers, simulation.trace.num_experts
    every = setting(simulation, 0, concurrency, ubatch)
    by_memory = divide(simulation.profile, simulation.model.num_layers, free_bytes=simulation.budgets)[0]
    cards = simulation.divided(by_memory).card_memory(every.schedule, cached_experts=every.cached_experts)
    if all(one.num_bytes + free_bytes <= simulation.budgets[one.card] for one in cards):
        chosen, split = every, by_memory
    else:
        bare = setting(simulation, layers, concurrency, ubatch)
        split, kept = filled_from_the_front(simulation, bare.schedule, free_bytes)
        whole = sum(layer < kept for layer in simulation.model.moe_layers)
        chosen = setting(simulation, layers - whole, concurrency, ubatch, front=True)
        chosen = dataclasses.replace(chosen, cached_experts=whole * each)
    schedule = chosen.schedule.with_options(name=FITTED)
    found = dataclasses.replace(chosen, schedule=schedule, words=FITTED, fitted=True, split=split)
    check_fits(simulation, found)
    return found


def _numbers(simulation: Simulation) -> range:
    """Return how many layers' experts may lie apart from the rest: none where there is one memory."""
    return range(simulation.trace.num_layers + 1) if has_card(simulation) else range(1)


def _spread(first: int, last: int) -> Iterator[int]:
    for step in range(1, _LEVELS):
        yield first + round((last - first) * step / _LEVELS)
