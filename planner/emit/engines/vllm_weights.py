"""vLLM, offload: weights of experts in host memory, read over the bus where they are needed or fetched layer by layer.

Modelled: vLLM 0.33.0's two backends. `uva` reads routed experts in place, without a cache on the device; `prefetch` copies whole
layers ahead. Ignored: parameters other than experts, which stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ....base.errors import InputError
from ....base.units import GIB
from ....specs.models import ModelSpec
from ..checks import check_groups, text_of
from ..choices import Emission, OffloadChoice, as_run
from ..flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from ..offload_notes import COMMON, guess_notes, other_notes
from ..table import flags_of
from .vllm_table import TABLE

_STEPS_PER_GIB = 100


def render_offload(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return vLLM's offload flags; none where every expert is on the device."""
    cache, away = choice.schedule.cache, model.num_moe_layers * model.num_experts - choice.cached_experts
    flags: dict[str, FlagValue] = {}
    notes, facts, unlike = [], [], ""
    if choice.schedule.copy.fetch != "routed":
        flags = {"--offload-backend": "prefetch", "--offload-group-size": 1, "--offload-num-in-group": 1,
                 "--offload-prefetch-step": 1, "--offload-params": "experts"}  # fmt: skip
        notes.append(
            f"copy.fetch={choice.schedule.copy.fetch}: the next layer's experts are fetched while one computes, into one buffer of a layer"
        )
        facts.append("every layer's experts are fetched in every step; none stay on the device")
        unlike = (
            "" if cache.policy == "none" else "no experts stay on the device, and the next layer's are fetched ahead"
        )
    elif away:
        # Rounded up, so that no more experts than planned stay on the device.
        gib = math.ceil(away * choice.expert_bytes * _STEPS_PER_GIB / GIB) / _STEPS_PER_GIB
        flags = {"--offload-backend": "uva", "--cpu-offload-gb": gib, "--cpu-offload-params": "experts"}
        notes.append(
            f"cache.policy={cache.policy}: the bytes of {choice.cached_experts} experts stay on the device, in the order modules "
            "are loaded, and never change; the others are read over the bus at every use and not kept"
        )
        facts.append("a parameter is offloaded whole, and one parameter holds all experts of a layer: whole layers' experts are in host "
                     "memory, the others on the device")  # fmt: skip
        unlike = "experts in host memory are read by the kernels over the bus, not copied"
    notes += guess_notes(choice, "experts are not guessed")
    notes += other_notes(choice, ("copy.fetch",))
    usage = (USE_FLAGS,) if flags else ("every expert is on the device: no flag is needed",)
    return Emission(
        engine=TABLE.engine, files={FLAGS_FILE: flag_lines(flags)}, usage=usage, notes=tuple(notes), facts=tuple(facts),
        runs=None if unlike else as_run(choice.schedule, (*COMMON, "copy.fetch")), unlike=unlike,
    )  # fmt: skip


def check_offload(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where vLLM's offload configuration would refuse the flags."""
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    other = {"uva": ("--offload-group-size", "--offload-num-in-group", "--offload-prefetch-step", "--offload-params"),
             "prefetch": ("--cpu-offload-gb", "--cpu-offload-params")}  # fmt: skip
    for name in other.get(flags.get("--offload-backend", "auto"), ()):
        if name in flags:
            raise InputError(
                f"{FLAGS_FILE}: {name}", flags[name], f"not an option of {flags['--offload-backend']}", "drop it"
            )
    check_groups(flags)
