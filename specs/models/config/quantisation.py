"""How a checkpoint stores its experts and its attention, from what its quantiser wrote.

Modelled: compressed-tensors, ModelOpt (FP8, NVFP4, MXFP, mixed), AWQ, GPTQ and AutoRound, bitsandbytes, MLX, FP8 by tensor, channel
or block, MXFP4; modules that are left out or stored otherwise; scales and zero points. Ignored: permutations of columns (GPTQ's
`g_idx`, 32 bits a column), scales of whole matrices beside finer ones, how activations and caches are quantised. A method that is
not known is refused: guessing a width would change every figure after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....base.errors import InputError
from .checkpoint import Checkpoint, left_out, matches, same_module, searches

_BLOCK = 128 * 128
_NVFP4, _MXFP4, _MXFP8, _BLOCKED_FP8 = "nvfp4", "mxfp4", "mxfp8", "8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Weight formats of a checkpoint, by name."""

    experts: str
    dense: str
    remarks: list[str] = field(default_factory=list)


def stored_as(
    flat: Mapping[str, Any], beside: Mapping[str, Any] | None, name: str, fields: Mapping[str, Any], where: str
) -> Stored:
    """Return how the experts and the attention of a checkpoint are stored.

    beside: the `hf_quant_config.json` of its folder. A name that states a format (…-NVFP4) counts where no file does, and a
    remark says so. Raises InputError for a quantiser that is not known, and for a name that states less than a format.
    """
    remarks: list[str] = []
    dtypes = [value for value in (flat.get("torch_dtype"), flat.get("dtype")) if isinstance(value, str)]
    plain = "32" if any("float32" in one and "bfloat" not in one for one in dtypes) else "16"
    hidden, width = (
        fields.get("expert_hidden_size") or fields.get("hidden_size", 1),
        fields.get("expert_intermediate_size", 1),
    )
    into = 2 if fields.get("gated", True) else 1
    row = max(1, (into + 1) * hidden * width // (into * width + hidden))
    table, key = flat.get("quantization_config"), "quantization_config"
    if table is None and isinstance(beside, Mapping):
        inner = beside.get("quantization")
        if isinstance(inner, Mapping):
            table, key = {"quant_method": "modelopt", **inner}, "quantization"
    if table is None:
        table, key = flat.get("quantization"), "quantization"
    layers = fields.get("moe_layers") or (0,)
    facts = Checkpoint(table or {}, plain, row, hidden * width, layers[len(layers) // 2], where, key)
    if table is None:
        expert_dtype = flat.get("expert_dtype")
        if expert_dtype in ("fp4", "mxfp4"):
            return Stored(experts=_MXFP4, dense=plain)
        return _from_name(name, facts)
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: {key}", table, "not a table", "correct the file")
    method = (
        str(table.get("quant_method", "mlx" if "group_size" in table and "bits" in table else ""))
        .lower()
        .replace("_", "-")
    )
    rule = next((rule for known, rule in _METHODS.items() if method == known or method.startswith(known + "-")), None)
    if rule is None:
        raise facts.refuse(
            "quant_method", table.get("quant_method", "(absent)"), "a way of storing weights that is not known"
        )
    experts, dense = rule(facts, "experts"), rule(facts, "attention")
    expert_dtype = table.get("expert_dtype") or flat.get("expert_dtype")
    if expert_dtype in ("fp4", "mxfp4"):
        experts = _MXFP4
    elif fields.get("family") == "deepseek_v4" and method == "fp8" and expert_dtype is None:
        remarks.append(
            "expert_dtype is absent: experts are taken to be stored like the rest; published instruct checkpoints store them in 4 bits"
        )
    return Stored(experts=experts or plain, dense=dense or plain, remarks=remarks)


def _from_name(name: str, facts: Checkpoint) -> Stored:
    """Return what a checkpoint's name says where no file says anything."""
    words = set(re.split(r"[-_. ]+", name.lower()))
    found = (
        _NVFP4
        if "nvfp4" in words
        else _MXFP4
        if "mxfp4" in words
        else f"fp8-g{facts.matrix_weights}"
        if "fp8" in words
        else None
    )
    if found is not None:
        says = f"its name says {found.split('-')[0]}; neither config.json nor hf_quant_config.json beside it says how it is stored"
        return Stored(experts=found, dense=facts.plain, remarks=[says])
    vague = words & {"awq", "gptq", "int4", "int8", "w4a16", "w8a8", "4bit", "8bit", "3bit", "bnb"}
    if vague:
        word = sorted(vague)[0]
        rule = f"absent, while the name says {word} and not in which groups"
        raise InputError(f"{facts.where}: quantization_config", "(absent)", rule, "add the quantiser's table")
    return Stored(experts=facts.plain, dense=facts.plain)


# --- what is left out ------------------------------------------------------------------------------------------------


# --- one rule for each quantiser: the format of modules of a kind, None for those left alone --------------------------


def _fp8(facts: Checkpoint, kind: str) -> str | None:
    if left_out(facts, kind, "modules_to_not_convert", "ignored_layers", "ignore"):
        return None
    block = facts.table.get("weight_block_size")
    if block is None:
        return f"fp8-g{facts.matrix_weights}"
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(one, int) and one > 0 for one in block):
        raise facts.refuse("weight_block_size", block, "not two numbers of weights")
    return _BLOCKED_FP8 if block[0] * block[1] == _BLOCK else f"fp8-g{block[0] * block[1]}"


def _fbgemm(facts: Checkpoint, kind: str) -> str | None:
    return None if left_out(facts, kind, "modules_to_not_convert") else f"fp8-g{facts.row_weights}"


def _mxfp4(facts: Checkpoint, kind: str) -> str | None:
    # OpenAI's checkpoints list what is left out; their attention always is.
    return _MXFP4 if kind == "experts" and not left_out(facts, kind, "modules_to_not_convert") else None


def _awq(facts: Checkpoint, kind: str) -> str | None:
    if left_out(facts, kind, "modules_to_not_convert"):
        return None
    zero = "-zero" if facts.table.get("zero_point", True) else ""
    return f"int{facts.bits(facts.table.get('bits', facts.table.get('w_bit', 4)))}-g{facts.group(facts.table.get('group_size', 128))}{zero}"


def _gptq(facts: Checkpoint, kind: str) -> str | None:
    dynamic = facts.table.get("dynamic") or {}
    bits, group = facts.table.get("bits", 4), facts.table.get("group_size", 128)
    if not isinstance(dynamic, Mapping):
        raise facts.refuse("dynamic", dynamic, "not a table of modules")
    for pattern, changes in dynamic.items():
        if any(searches(str(pattern).removeprefix("-:").removeprefix("+:"), module) for module in facts.named(kind)):
            if str(pattern).startswith("-:"):
                return None
            if isinstance(changes, Mapping):
                bits, group = changes.get("bits", bits), changes.get("group_size", group)
    if left_out(facts, kind, "modules_to_not_convert"):
        return None
    # Zero points are stored whether or not they are all alike.
    return f"int{facts.bits(bits)}-g{facts.group(group)}-zero"


def _auto_round(facts: Checkpoint, kind: str) -> str | None:
    extra = facts.table.get("extra_config") or {}
    bits, group = facts.table.get("bits", 4), facts.table.get("group_size", 128)
    if isinstance(extra, Mapping):
        for pattern, changes in extra.items():
            if isinstance(changes, Mapping) and any(
                matches(str(pattern), module) or searches(str(pattern), module) for module in facts.named(kind)
            ):
                bits, group = changes.get("bits", bits), changes.get("group_size", group)
    if bits in (16, 32):
        return None
    return f"int{facts.bits(bits)}-g{facts.group(group)}-zero"


def _bitsandbytes(facts: Checkpoint, kind: str) -> str | None:
    if left_out(facts, kind, "llm_int8_skip_modules"):
        return None
    if facts.table.get("load_in_8bit") or facts.table.get("_load_in_8bit"):
        return f"int8-g{facts.row_weights}"
    if not (facts.table.get("load_in_4bit") or facts.table.get("_load_in_4bit")):
        raise facts.refuse("load_in_4bit", "(absent)", "neither 4 nor 8 bits")
    return f"{'nfd' if facts.table.get('bnb_4bit_use_double_quant') else 'nf'}4-g64"


def _mlx(facts: Checkpoint, kind: str) -> str | None:
    table: Mapping[str, Any] = facts.table
    prefixes = ("model", "language_model.model", "model.language_model") if kind == "experts" else ()
    switched = [f"{prefix}.layers.{facts.moe_layer}.mlp.switch_mlp.gate_proj" for prefix in prefixes]
    for pattern, changes in facts.table.items():
        if (
            isinstance(pattern, str)
            and "." in pattern
            and any(matches(pattern, module) for module in [*facts.named(kind), *switched])
        ):
            if changes is False:
                return None
            if isinstance(changes, Mapping):
                table = {**table, **changes}
    mode = table.get("mode", "affine")
    if mode != "affine":
        if mode not in (_NVFP4, _MXFP4, _MXFP8):
            raise facts.refuse("mode", mode, "a way of storing weights that is not known")
        return str(mode)
    return f"mlx{facts.bits(table.get('bits', 4))}-g{facts.group(table.get('group_size', 64))}"


def _scheme(facts: Checkpoint, weights: object, layout: str = "") -> str:
    """Return the format that a table of compressed-tensors (or of ModelOpt, which took it over) describes."""
    if not isinstance(weights, Mapping):
        raise facts.refuse("config_groups", weights, "no table of weights")
    bits, kind, strategy = (
        facts.bits(weights.get("num_bits"), "config_groups.weights.num_bits"),
        weights.get("type", "int"),
        weights.get("strategy"),
    )
    group = weights.get("group_size")
    if kind not in ("int", "float"):
        raise facts.refuse("config_groups.weights.type", kind, "neither int nor float")
    if kind == "float" and bits == 4:
        return _MXFP4 if layout.startswith("mx") or group == 32 else _NVFP4
    if kind == "float" and (layout.startswith("mx") or group == 32) and bits == 8:
        return _MXFP8
    block = weights.get("block_structure")
    if strategy == "block" or isinstance(block, list):
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(one, int) and one > 0 for one in block):
            raise facts.refuse("config_groups.weights.block_structure", block, "not two numbers of weights")
        size = block[0] * block[1]
        return (
            _BLOCKED_FP8
            if size == _BLOCK and kind == "float"
            else f"{'fp' if kind == 'float' else 'int'}{bits}-g{size}"
        )
    size = facts.matrix_weights if strategy == "tensor" else facts.group(group, "config_groups.weights.group_size")
    zero = "-zero" if kind == "int" and weights.get("symmetric") is False else ""
    return f"{'fp' if kind == 'float' else 'int'}{bits}-g{size}{zero}"


def _grouped(facts: Checkpoint, kind: str, groups: Mapping[str, Any]) -> str | None:
    """Return the format of the group whose targets mean modules of `kind`; groups that name modules go before `Linear`."""
    modules, general = facts.named(kind), None
    for group in groups.values():
        if not isinstance(group, Mapping):
            raise facts.refuse("config_groups", group, "not a table of groups")
        targets = group.get("targets", ["Linear"])
        targets = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
        layout = str(group.get("format") or facts.table.get("format") or "")
        if any(matches(target, module) for target in targets for module in modules):
            return _scheme(facts, group.get("weights"), layout)
        if "Linear" in targets or not targets or (kind == "experts" and any("MoE" in target for target in targets)):
            general = (group.get("weights"), layout)
    return None if general is None else _scheme(facts, *general)


def _compressed(facts: Checkpoint, kind: str) -> str | None:
    if left_out(facts, kind, "ignore"):
        return None
    groups = facts.table.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise facts.refuse("config_groups", groups if groups is not None else "(absent)", "not a table of groups")
    return _grouped(facts, kind, groups)


def _modelopt(facts: Checkpoint, kind: str) -> str | None:
    if left_out(facts, kind, "exclude_modules", "ignore"):
        return None
    layers = facts.table.get("quantized_layers")
    if isinstance(layers, Mapping) and layers:
        for pattern, changes in layers.items():
            if any(matches(str(pattern), module) or same_module(str(pattern), module) for module in facts.named(kind)):
                return _algorithm(facts, changes if isinstance(changes, Mapping) else {})
        return None
    groups = facts.table.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        return _grouped(facts, kind, groups)
    return _algorithm(facts, facts.table)


def _quark(facts: Checkpoint, kind: str) -> str | None:
    """Return what AMD Quark's tables say: one for all modules, others by pattern."""
    if left_out(facts, kind, "exclude"):
        return None
    chosen, layers = facts.table.get("global_quant_config"), facts.table.get("layer_quant_config")
    for pattern, changes in layers.items() if isinstance(layers, Mapping) else ():
        if any(matches(str(pattern), module) for module in facts.named(kind)):
            chosen = changes
    weight = chosen.get("weight") if isinstance(chosen, Mapping) else None
    weight = weight[0] if isinstance(weight, list) and weight else weight
    if not isinstance(weight, Mapping):
        raise facts.refuse("global_quant_config", chosen if chosen is not None else "(absent)", "no table of weights")
    dtype, scheme, group = str(weight.get("dtype")), weight.get("qscheme"), weight.get("group_size")
    size = (
        facts.matrix_weights
        if scheme == "per_tensor"
        else facts.group(group if scheme == "per_group" else None, "group_size")
    )
    if dtype in ("fp4", "fp8_e4m3", "mxfp4") and group == 32 and scheme == "per_group":
        return _MXFP8 if dtype == "fp8_e4m3" else _MXFP4
    known = {
        "fp8_e4m3": f"fp8-g{size}",
        "int8": f"int8-g{size}",
        "int4": f"int4-g{size}",
        "uint4": f"int4-g{size}-zero",
    }
    if dtype not in known:
        raise facts.refuse("global_quant_config.weight.dtype", dtype, "a way of storing weights that is not known")
    return known[dtype]


def _algorithm(facts: Checkpoint, table: Mapping[str, Any]) -> str:
    """Return the format that ModelOpt's `quant_algo` names."""
    algorithm = str(table.get("quant_algo", "")).upper()
    named = {"FP8": f"fp8-g{facts.matrix_weights}", "FP8_PER_CHANNEL_PER_TOKEN": f"fp8-g{facts.row_weights}", "FP8_PB_WO": _BLOCKED_FP8,
             "FP8_PB_REAL_QUANT": _BLOCKED_FP8, "NVFP4": _NVFP4, "NVFP4_AWQ": _NVFP4, "W4A16_NVFP4": _NVFP4, "MXFP4": _MXFP4,
             "W4A8_MXFP4_FP8": _MXFP4, "W4A16_MXFP4": _MXFP4, "MXFP8": _MXFP8, "INT8_SQ": f"int8-g{facts.row_weights}",
             "W8A16": f"int8-g{facts.row_weights}"}  # fmt: skip
    if algorithm in named:
        return named[algorithm]
    if algorithm in ("W4A16_AWQ", "W4A16", "W4A8_AWQ", "W4A16_GPTQ", "INT4_AWQ"):
        return f"int4-g{facts.group(table.get('group_size', 128))}{'-zero' if table.get('has_zero_point') else ''}"
    raise facts.refuse("quant_algo", table.get("quant_algo", "(absent)"), "a way of storing weights that is not known")


_METHODS = {
    "compressed-tensors": _compressed, "modelopt": _modelopt, "nvfp4": _modelopt, "awq": _awq, "gptq": _gptq, "auto-round": _auto_round,
    "autoround": _auto_round, "intel/auto-round": _auto_round, "bitsandbytes": _bitsandbytes, "mlx": _mlx, "fp8": _fp8,
    "fbgemm-fp8": _fbgemm, "mxfp4": _mxfp4, "finegrained-fp8": _fp8,
    "quark": _quark,
}  # fmt: skip
