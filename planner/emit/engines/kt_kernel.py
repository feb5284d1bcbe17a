"""KTransformers (kt-kernel in its fork of SGLang), offload: how many experts of each layer are on the device, and how they are chosen.

Modelled: the number per layer, or the share of all experts for a cache that layers share; placement by recorded frequency for
static caches; the update after long prompts for caches that change. Ignored: processor threads, weight paths and kernels, which
describe the machine and its files.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ..checks import needed, text_of
from ..choices import Emission, OffloadChoice, as_run
from ..flags import FLAGS_FILE, NUMBER, SWITCH, TEXT, USE_FLAGS, WHOLE, FlagValue, flag_lines
from ..offload_notes import COMMON, guess_notes, other_notes
from ..table import FORK, EngineTable, flags_of, names, row
from ..target import OffloadTarget, Target
from .kt_commands import SERVER_FILE, check_served, render_served

TABLE = EngineTable(
    engine="kt-kernel 0.7.2 with sglang-kt",
    checked="2026-11-28",
    how="flags compared with the documentation inside the released kt-kernel wheel, and with SGLang 0.5.23's own definitions for which of "
    "them only the fork has (read, not started)",
    source="kt-kernel 0.7.2: README; sglang 0.5.23: srt/arg_groups/fields/exec_.py",
    flags={
        "--kt-num-gpu-experts": row(WHOLE, "experts of each layer on the device", least=0),
        "--kt-max-deferred-experts-per-token": row(WHOLE, "experts a token may take a layer later", least=0, most=4),
        "--kt-weight-path": row(TEXT, "the processor's weights"),
        "--kt-method": row(names("AMXINT4", "AMXINT8", "RAWINT4", "FP8", "FP8_PERCHANNEL", "BF16", "LLAMAFILE"), "their format"),
        "--kt-cpuinfer": row(WHOLE, "threads", least=1),
        "--kt-threadpool-count": row(WHOLE, "NUMA nodes", least=1),
        "--kt-gpu-experts-ratio": row(NUMBER, "share of all experts on the device", least=0, most=1, standing=FORK, since="sglang-kt"),
        "--kt-expert-placement-strategy": row(names("frequency", "uniform", "front-loading", "random"), "which experts",
                                              standing=FORK, since="sglang-kt"),
        "--kt-enable-dynamic-expert-update": row(SWITCH, "choose anew after long prompts", standing=FORK, since="sglang-kt"),
        "--kt-gpu-prefill-token-threshold": row(WHOLE, "length of a long prompt", least=1, standing=FORK, since="sglang-kt"),
    },
)  # fmt: skip
# Of the 1024 to 4096 that the documentation gives.
_LONG_PROMPT = 2048
_MOST_DIGITS = 12


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return kt-kernel's flags; of a plan made for the engine, its whole command line."""
    if choice.served is not None and choice.served.engine == "ktransformers":
        return render_served(choice, choice.served, model)
    cache, total = choice.schedule.cache, model.num_moe_layers * model.num_experts
    flags: dict[str, FlagValue] = {}
    if cache.pooled_experts is not None and cache.policy != "none":
        flags["--kt-gpu-experts-ratio"] = _ratio(choice.cached_experts, total)
    else:
        flags["--kt-num-gpu-experts"] = choice.cached_experts // model.num_moe_layers
    partial = choice.cached_experts < total
    changing, chosen = partial and cache.policy in ("lru", "lfu"), partial and cache.policy == "static"
    flags["--kt-expert-placement-strategy"] = "frequency" if chosen else "uniform"
    if changing:
        flags |= {"--kt-enable-dynamic-expert-update": True, "--kt-gpu-prefill-token-threshold": _LONG_PROMPT}
    usage = [
        USE_FLAGS,
        "add --kt-weight-path, --kt-method, --kt-cpuinfer and --kt-threadpool-count for your files and processor",
    ]
    notes = []
    if chosen:
        usage.append("add --init-expert-location with the recorded counts that choose the most frequent experts")
        notes.append("cache.policy=static: the plan says how many experts, SGLang's recorded counts say which")
    if changing:
        usage.append(
            "--kt-gpu-prefill-token-threshold is the prompt length from which experts are chosen anew: set it to your prompts'"
        )
        notes.append(
            f"cache.policy={cache.policy}: experts on the device change after long prompts only, not at every miss"
        )
    if partial:
        notes.append(
            "experts in host memory are computed by the processor, not copied: the plan's copy times do not apply"
        )
    notes += guess_notes(choice, "nothing is fetched ahead")
    notes += other_notes(choice)
    forked = [name for name in flags if TABLE.flags[name].standing == FORK]
    facts = [
        f"{', '.join(forked)}: only the fork has them (pip install kt-kernel sglang-kt); SGLang 0.5.23 itself refuses them"
    ]
    if changing:
        facts.append(
            "experts are chosen anew with RAWINT4, FP8, BF16 and their like (--kt-method), not with AMXINT4 or AMXINT8"
        )
    return Emission(
        engine=TABLE.engine,
        files={FLAGS_FILE: flag_lines(flags)},
        usage=tuple(usage),
        notes=tuple(notes),
        facts=tuple(facts),
        runs=None if partial else as_run(choice.schedule, COMMON),
        unlike="the processor computes the experts in host memory, beside the device" if partial else "",
    )


def check(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where kt-kernel would refuse the flags."""
    if SERVER_FILE in files:
        check_served(files, model)
        return
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    if "--kt-gpu-experts-ratio" in flags:
        if "--kt-num-gpu-experts" in flags:
            raise InputError(
                f"{FLAGS_FILE}: --kt-num-gpu-experts",
                flags["--kt-num-gpu-experts"],
                "the ratio overrides it",
                "keep one",
            )
    else:
        count = needed(flags, "--kt-num-gpu-experts", FLAGS_FILE)
        if count > model.num_experts:
            raise InputError(
                f"{FLAGS_FILE}: --kt-num-gpu-experts", count, f"a layer has {model.num_experts}", "emit again"
            )
    if "--kt-enable-dynamic-expert-update" in flags:
        needed(flags, "--kt-gpu-prefill-token-threshold", FLAGS_FILE)


TARGET = Target(table=TABLE, offload=OffloadTarget(render=render, check=check))


def _ratio(cached: int, total: int) -> float:
    """Return the shortest decimal share of `total` that the engine, which rounds down, turns back into `cached`."""
    for digits in range(1, _MOST_DIGITS + 1):
        scale = int(10**digits)
        share = -(-cached * scale // total) / scale
        if int(total * share) == cached:
            return share
    return cached / total
