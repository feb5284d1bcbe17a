"""KTransformers (kt-kernel in its fork of SGLang) as a search space: experts of each layer on the card, chunks, where prompts are computed.

Modelled: `--kt-num-gpu-experts N` for several N up to what the card holds, the lowest numbers of each layer (`uniform`: nobody chooses
which), `--chunked-prefill-size`, and `--kt-gpu-prefill-token-threshold`, from which a pass copies the experts layer by layer to the card.
Its rivals are what its own launcher starts: chunks and threshold of 4096 tokens, and every expert on the cores. Ignored: experts
deferred to the next layer, placement by recorded frequency, threads and formats of the cores' weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...base.errors import DoesNotFit
from ...sim.offload.simulate import Simulation
from ...specs.schedules.presets import load_preset
from .setting import Setting, check_fits, fitting, has_card, passes_tried

CHUNKS = (2048, 4096, 8192, 16384)
LAUNCHED_CHUNK = 4096
"""`kt run`'s --chunked-prefill-size and --kt-gpu-prefill-token-threshold (kt-kernel 0.7.2, read)."""
_LEVELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KTransformersSpace:
    """The settings of kt-kernel with SGLang."""

    name: str = "ktransformers"

    def settings(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, refused: list[DoesNotFit]
    ) -> list[Setting]:
        """Return every setting that is looked at and fits, the fewest experts on the card first.

        ubatch: the chunk asked for; None: several are tried. refused: is given why others do not fit.
        """
        candidates = (
            setting(simulation, count, concurrency, chunk, on_card=on_card)
            for chunk in passes_tried(simulation, ubatch, CHUNKS)
            for count in self._levels(simulation, concurrency, chunk, refused)
            for on_card in ((True, False) if count < simulation.trace.num_experts else (True,))
        )
        return fitting(simulation, candidates, lambda _, reason: refused.append(reason))

    def defaults(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, left_out: dict[str, str]
    ) -> list[Setting]:
        """Return what the engine's launcher starts with every expert on the cores: nothing says of itself how many the card holds.

        left_out: is given, by name, why it cannot run.
        """
        one = setting(simulation, 0, concurrency, LAUNCHED_CHUNK if ubatch is None else ubatch)
        return fitting(simulation, [one], lambda one, reason: left_out.update({one.words: str(reason)}))

    def fuller(self, simulation: Simulation, default: Setting) -> Setting:
        """Return the default itself: it has no part of a layer."""
        return default

    def _levels(self, simulation: Simulation, concurrency: int, chunk: int, refused: list[DoesNotFit]) -> list[int]:
        """Return numbers of experts of each layer on the card: none, the most that fit, and some between."""
        most = -1
        low, high = 0, simulation.trace.num_experts
        while low <= high:
            middle = (low + high) // 2
            try:
                check_fits(simulation, setting(simulation, middle, concurrency, chunk))
            except DoesNotFit as reason:
                high = middle - 1
                if middle == 0:
                    refused.append(reason)
            else:
                most, low = middle, middle + 1
        return sorted({most * step // _LEVELS for step in range(_LEVELS + 1)}) if most >= 0 else []


KTRANSFORMERS = KTransformersSpace()


def setting(
    simulation: Simulation, experts_per_layer: int, concurrency: int, chunk: int, *, on_card: bool = True
) -> Setting:
    """Return the setting with so many experts of each layer on the card; on_card: passes from the threshold on are computed there."""
    layers, each = simulation.trace.num_layers, simulation.trace.num_experts
    batching = {"workload__concurrency": concurrency, "workload__prefill_chunk_tokens": chunk}
    if experts_per_layer >= each:
        schedule = load_preset("resident").with_options(cache__experts_per_layer=each, **batching)
    elif experts_per_layer == 0:
        schedule = load_preset("cpu-moe").with_options(**batching)
    else:
        schedule = load_preset("kt-uniform").with_options(cache__experts_per_layer=experts_per_layer, **batching)
    bits = simulation.expert_format(schedule).name
    uploads = on_card and experts_per_layer < each
    schedule = schedule.with_options(experts__bits=bits)
    schedule = schedule.with_upload(simulation.upload_tokens if uploads else None)
    words = f"--kt-num-gpu-experts {experts_per_layer} --chunked-prefill-size {chunk}"
    if uploads:
        words += f" --kt-gpu-prefill-token-threshold {simulation.upload_tokens}"
    return Setting(
        schedule=schedule, words=words, cached_experts=experts_per_layer * layers, ubatch=chunk, op_offload=on_card,
        experts_per_layer=experts_per_layer, card=has_card(simulation),
    )  # fmt: skip
