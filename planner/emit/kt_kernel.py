"""KTransformers (kt-kernel in SGLang), offload: how many experts of each layer are on the device, and how they are chosen.

Modelled: the number per layer, or the share of all experts for a cache that layers share; placement by recorded frequency for
static caches; the update after long prompts for caches that change. Ignored: processor threads, weight paths and kernels, which
describe the machine and its files.
"""

from __future__ import annotations

from ...specs import ModelSpec
from .choices import Emission, OffloadChoice
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from .offload_notes import guess_notes, other_notes

_MOST_DIGITS = 12


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return kt-kernel's flags."""
    cache, total = choice.schedule.cache, model.num_moe_layers * model.num_experts
    flags: dict[str, FlagValue] = {}
    if cache.pooled_experts is not None and cache.policy != "none":
        flags["--kt-gpu-experts-ratio"] = _ratio(choice.cached_experts, total)
    else:
        flags["--kt-num-gpu-experts"] = choice.cached_experts // model.num_moe_layers
    partial = choice.cached_experts < total
    changing, chosen = partial and cache.policy in ("lru", "lfu"), partial and cache.policy == "static"
    flags["--kt-expert-placement-strategy"] = "frequency" if chosen else "uniform"
    flags["--kt-enable-dynamic-expert-update"] = changing
    usage = [
        USE_FLAGS,
        "add --kt-weight-path, --kt-method, --kt-cpuinfer and --kt-threadpool-count for your files and processor",
    ]
    notes = []
    if chosen:
        usage.append("add --init-expert-location with the recorded counts that choose the most frequent experts")
        notes.append("cache.policy=static: the plan says how many experts, SGLang's recorded counts say which")
    if changing:
        usage.append("set --kt-gpu-prefill-token-threshold to the prompt length from which experts are chosen anew")
        notes.append(
            f"cache.policy={cache.policy}: experts on the device change after long prompts only, not at every miss"
        )
    if partial:
        notes.append(
            "experts in host memory are computed by the processor, not copied: the plan's copy times do not apply"
        )
    notes += guess_notes(choice, "nothing is fetched ahead")
    notes += other_notes(choice)
    return Emission(
        engine="kt-kernel in SGLang", files={FLAGS_FILE: flag_lines(flags)}, usage=tuple(usage), notes=tuple(notes)
    )


def _ratio(cached: int, total: int) -> float:
    """Return the shortest decimal share of `total` that the engine, which rounds down, turns back into `cached`."""
    for digits in range(1, _MOST_DIGITS + 1):
        scale = int(10**digits)
        share = -(-cached * scale // total) / scale
        if int(total * share) == cached:
            return share
    return cached / total
