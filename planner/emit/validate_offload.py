"""What offload engines accept, written from their loaders and documentation: keys, types, ranges, and flags with their types.

Modelled: llama.cpp, kt-kernel, MoE-Infinity, Mixtral-offloading, accelerate, and the offload flags of vLLM 0.33.0 and SGLang
0.5.23. Ignored: whether a machine has the memory; whether an engine was ever started with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import InputError, UnknownName
from ...specs import ModelSpec
from ...specs_io import parse_json
from .accelerate import FAMILIES
from .flags import FLAGS_FILE, NUMBER, SWITCH, TEXT, WHOLE, Kind, one_of, read_flags
from .validate_parallel import exact_keys, needed, text_of, typed

LLAMACPP_FLAGS: Mapping[str, Kind] = {
    "--n-gpu-layers": WHOLE, "--override-tensor": TEXT, "--cpu-moe": SWITCH, "--n-cpu-moe": WHOLE, "--moe-cache-mib": WHOLE,
}  # fmt: skip
_OVERRIDE = re.compile(r"blk\\\.\((\d+(?:\|\d+)*)\)\\\.ffn_\(up\|down\|gate\|gate_up\)_\(ch\|\)exps=CPU")
KT_FLAGS: Mapping[str, Kind] = {
    "--kt-num-gpu-experts": WHOLE, "--kt-gpu-experts-ratio": NUMBER,
    "--kt-expert-placement-strategy": one_of("frequency", "uniform", "front-loading", "random"),
    "--kt-enable-dynamic-expert-update": SWITCH, "--kt-gpu-prefill-token-threshold": WHOLE,
}  # fmt: skip
VLLM_FLAGS: Mapping[str, Kind] = {
    "--offload-backend": one_of("auto", "uva", "prefetch"), "--cpu-offload-gb": NUMBER, "--cpu-offload-params": TEXT,
    "--offload-group-size": WHOLE, "--offload-num-in-group": WHOLE, "--offload-prefetch-step": WHOLE, "--offload-params": TEXT,
}  # fmt: skip
SGLANG_FLAGS: Mapping[str, Kind] = {
    "--cpu-offload-gb": WHOLE, "--offload-group-size": WHOLE, "--offload-num-in-group": WHOLE, "--offload-prefetch-step": WHOLE,
    "--enable-paged-experts": SWITCH, "--paged-experts-num-resident": WHOLE,
}  # fmt: skip
_ARCHER = {"offload_path": str, "device_memory_ratio": float, "host_memory_ratio": float, "prefetch": bool, "trace_capacity": int,
           "trace_path": str, "num_threads": int}  # fmt: skip


def check_llamacpp(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where llama.cpp would refuse a file of flags or files contradict each other."""
    on_host: dict[str, list[int]] = {}
    for name, text in files.items():
        flags = read_flags(text, LLAMACPP_FLAGS, name)
        if "--n-cpu-moe" in flags:
            _at_least(flags["--n-cpu-moe"], 0, f"{name}: --n-cpu-moe")
            on_host[name] = [layer for layer in model.moe_layers if layer < flags["--n-cpu-moe"]]
        if "--override-tensor" in flags:
            match = _OVERRIDE.fullmatch(flags["--override-tensor"])
            if not match:
                raise InputError(
                    f"{name}: --override-tensor", flags["--override-tensor"], "not whole layers' experts", "emit again"
                )
            on_host[name] = [int(layer) for layer in match[1].split("|")]
            if not set(on_host[name]) <= set(model.moe_layers):
                raise InputError(f"{name}: --override-tensor", on_host[name], "not MoE layers", "emit again")
        if "--moe-cache-mib" in flags:
            _at_least(flags["--moe-cache-mib"], 1, f"{name}: --moe-cache-mib")
            needed(flags, "--cpu-moe", name)
    if len({tuple(layers) for layers in on_host.values()}) > 1:
        raise InputError("files", on_host, "the files divide the layers differently", "emit again")


def check_kt_kernel(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where kt-kernel would refuse the flags."""
    flags = read_flags(text_of(files, FLAGS_FILE), KT_FLAGS, FLAGS_FILE)
    if "--kt-gpu-experts-ratio" in flags:
        if "--kt-num-gpu-experts" in flags:
            raise InputError(
                f"{FLAGS_FILE}: --kt-num-gpu-experts",
                flags["--kt-num-gpu-experts"],
                "the ratio overrides it",
                "keep one",
            )
        if not 0.0 <= flags["--kt-gpu-experts-ratio"] <= 1.0:
            raise InputError(
                f"{FLAGS_FILE}: --kt-gpu-experts-ratio",
                flags["--kt-gpu-experts-ratio"],
                "not from 0 to 1",
                "emit again",
            )
    else:
        count = needed(flags, "--kt-num-gpu-experts", FLAGS_FILE)
        _at_least(count, 0, f"{FLAGS_FILE}: --kt-num-gpu-experts")
        if count > model.num_experts:
            raise InputError(
                f"{FLAGS_FILE}: --kt-num-gpu-experts", count, f"a layer has {model.num_experts}", "emit again"
            )


def check_moe_infinity(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where `ArcherConfig` would refuse the file."""
    name = "archer_config.json"
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"offload_path"}, set(_ARCHER))
    for key in table:
        typed(table, key, _ARCHER[key], name)
    for key in ("device_memory_ratio", "host_memory_ratio"):
        if not 0.0 <= table.get(key, 0.0) <= 1.0:
            raise InputError(f"{name}: {key}", table[key], "not from 0 to 1", "emit again")


def check_mixtral_offloading(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where the numbers are not those of one `OffloadConfig` for the model."""
    name = "offload_config.json"
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"main_size", "offload_size", "buffer_size", "offload_per_layer"})
    given = {key: typed(table, key, int, name) for key in table}
    away, layers = given["offload_per_layer"], model.num_moe_layers
    if not 0 <= away <= model.num_experts:
        raise InputError(f"{name}: offload_per_layer", away, f"a layer has {model.num_experts} experts", "emit again")
    sizes = {"main_size": layers * (model.num_experts - away), "offload_size": layers * away}
    for key, size in sizes.items():
        if given[key] != size:
            raise InputError(f"{name}: {key}", given[key], f"offload_per_layer={away} makes it {size}", "emit again")
    _at_least(given["buffer_size"], 1, f"{name}: buffer_size")


def check_accelerate(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where modules are unknown, named twice or left without a device."""
    name = "device_map.json"
    table = parse_json(text_of(files, name), name, name)
    modules = _modules(model)
    for key, place in table.items():
        if key not in modules:
            raise UnknownName(f"{name}: module", key, modules)
        if place not in ("cpu", "disk") and (type(place) is not int or place < 0):
            raise InputError(f"{name}: {key}", place, "not a device", "give a device's index, cpu or disk")
    absent = sorted(modules - set(table))
    if absent:
        raise InputError(name, absent[0], "a module has no device", "name every module")


def check_vllm(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where vLLM's offload configuration would refuse the flags."""
    flags = read_flags(text_of(files, FLAGS_FILE), VLLM_FLAGS, FLAGS_FILE)
    other = {"uva": ("--offload-group-size", "--offload-num-in-group", "--offload-prefetch-step", "--offload-params"),
             "prefetch": ("--cpu-offload-gb", "--cpu-offload-params")}  # fmt: skip
    for name in other.get(flags.get("--offload-backend", "auto"), ()):
        if name in flags:
            raise InputError(
                f"{FLAGS_FILE}: {name}", flags[name], f"not an option of {flags['--offload-backend']}", "drop it"
            )
    if flags.get("--cpu-offload-gb", 0.0) < 0:
        raise InputError(f"{FLAGS_FILE}: --cpu-offload-gb", flags["--cpu-offload-gb"], "below zero", "emit again")
    _check_groups(flags)


def check_sglang(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where SGLang would refuse the flags."""
    flags = read_flags(text_of(files, FLAGS_FILE), SGLANG_FLAGS, FLAGS_FILE)
    if "--paged-experts-num-resident" in flags:
        needed(flags, "--enable-paged-experts", FLAGS_FILE)
        resident = flags["--paged-experts-num-resident"]
        if not model.top_k <= resident <= model.num_experts:
            raise InputError(f"{FLAGS_FILE}: --paged-experts-num-resident", resident,
                             f"not from {model.top_k} to {model.num_experts}", "emit again")  # fmt: skip
    _check_groups(flags)


def _check_groups(flags: Mapping[str, int]) -> None:
    """Return nothing; raises InputError unless the last layers of a group are between one and all of it."""
    if "--offload-group-size" in flags:
        group, inside = flags["--offload-group-size"], flags.get("--offload-num-in-group", 1)
        _at_least(group, 1, f"{FLAGS_FILE}: --offload-group-size")
        _at_least(flags.get("--offload-prefetch-step", 1), 1, f"{FLAGS_FILE}: --offload-prefetch-step")
        if not 1 <= inside <= group:
            raise InputError(f"{FLAGS_FILE}: --offload-num-in-group", inside, f"not from 1 to {group}", "emit again")


def _at_least(value: int, least: int, field: str) -> None:
    if value < least:
        raise InputError(field, value, f"below {least}", "emit again")


def _modules(model: ModelSpec) -> set[str]:
    """Return every module of the model that a map must name, leaves inside MoE layers, whole layers elsewhere."""
    block, others = FAMILIES[model.family]
    inside = ["self_attn", "input_layernorm", "post_attention_layernorm", *(f"{block}.{name}" for name in others)]
    inside += [f"{block}.experts.{expert}" for expert in range(model.num_experts)]
    names = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        names |= {f"{prefix}.{name}" for name in inside} if layer in model.moe_layers else {prefix}
    return names
