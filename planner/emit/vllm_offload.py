"""vLLM, offload: weights of experts in host memory, read over the bus where they are needed or fetched layer by layer.

Modelled: vLLM 0.33.0's two backends. `uva` reads routed experts in place, without a cache on the device; `prefetch` copies whole
layers ahead. Ignored: parameters other than experts, which stay on the device.
"""

from __future__ import annotations

import math

from ...specs import ModelSpec
from ...units import GIB
from .choices import Emission, OffloadChoice
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from .offload_notes import guess_notes, other_notes

_STEPS_PER_GIB = 100


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return vLLM's offload flags; none where every expert is on the device."""
    cache, away = choice.schedule.cache, model.num_moe_layers * model.num_experts - choice.cached_experts
    flags: dict[str, FlagValue] = {}
    notes = []
    if choice.schedule.copy.fetch == "layer":
        flags = {"--offload-backend": "prefetch", "--offload-group-size": 1, "--offload-num-in-group": 1,
                 "--offload-prefetch-step": 1, "--offload-params": "experts"}  # fmt: skip
        notes.append(
            "copy.fetch=layer: the next layer's experts are fetched while a layer computes, into one buffer of a whole layer"
        )
    elif away:
        # Rounded up, so that no more experts than planned stay on the device.
        gib = math.ceil(away * choice.expert_bytes * _STEPS_PER_GIB / GIB) / _STEPS_PER_GIB
        flags = {"--offload-backend": "uva", "--cpu-offload-gb": gib, "--cpu-offload-params": "experts"}
        notes.append(
            f"cache.policy={cache.policy}: the bytes of {choice.cached_experts} experts stay on the device, in the order modules "
            "are loaded, and never change; the others are read over the bus at every use and not kept"
        )
    notes += guess_notes(choice, "experts are not guessed")
    notes += other_notes(choice, ("copy.fetch",))
    usage = (USE_FLAGS,) if flags else ("every expert is on the device: no flag is needed",)
    return Emission(engine="vLLM 0.33.0", files={FLAGS_FILE: flag_lines(flags)}, usage=usage, notes=tuple(notes))
