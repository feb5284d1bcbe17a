"""What expert-parallel engines accept, written from their loaders: files in, the placement they would load out.

Modelled: required and unknown keys, shapes, types, every expert present, slots divisible by ranks, flags with their types (SGLang
0.5.23, vLLM 0.33.0, vLLM on Ascend, TensorRT-LLM's strict `MoeLoadBalancerConfig`). Ignored: whether an engine was ever started
with them; what a model needs besides its experts' placement.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from ...errors import InputError, UnknownName
from ...specs import ModelSpec
from ...specs_io import parse_json
from .choices import Placement, int_rows
from .flags import FLAGS_FILE, JSON, NUMBER, SWITCH, TEXT, WHOLE, Kind, one_of, read_flags

_SGLANG_A2A = ("none", "deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer", "megamoe", "deepep_v2", "pplx",
               "ascend_tp", "flashinfer_megamoe")  # fmt: skip
_EPLB_ALGORITHMS = ("auto", "deepseek", "deepseek_hierarchical", "deepseek_vec", "deepseek_vec_hierarchical", "elasticity_aware",
                    "elasticity_aware_hierarchical")  # fmt: skip
SGLANG_FLAGS: Mapping[str, Kind] = {
    "--tp-size": WHOLE, "--ep-size": WHOLE, "--dp-size": WHOLE, "--nnodes": WHOLE, "--enable-dp-attention": SWITCH,
    "--init-expert-location": TEXT, "--ep-num-redundant-experts": WHOLE,
    "--ep-dispatch-algorithm": one_of("static", "dynamic", "fake", "lp"), "--eplb-algorithm": one_of(*_EPLB_ALGORITHMS),
    "--enable-eplb": SWITCH, "--eplb-rebalance-num-iterations": WHOLE, "--eplb-rebalance-layers-per-chunk": WHOLE,
    "--eplb-min-rebalancing-utilization-threshold": NUMBER, "--moe-a2a-backend": one_of(*_SGLANG_A2A),
    "--deepep-mode": one_of("auto", "normal", "low_latency"), "--deepep-config": TEXT, "--enable-two-batch-overlap": SWITCH,
    "--tbo-token-distribution-threshold": NUMBER, "--enable-single-batch-overlap": SWITCH,
}  # fmt: skip
_VLLM_A2A = ("naive", "pplx", "deepep_high_throughput", "deepep_low_latency", "deepep_v2", "mori_high_throughput",
             "mori_low_latency", "moonep", "nixl_ep", "allgather_reducescatter", "flashinfer_all2allv",
             "flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided", "passthrough")  # fmt: skip
VLLM_FLAGS: Mapping[str, Kind] = {
    "--tensor-parallel-size": WHOLE, "--data-parallel-size": WHOLE, "--enable-expert-parallel": SWITCH, "--enable-eplb": SWITCH,
    "--eplb-config": JSON, "--expert-placement-strategy": one_of("linear", "round_robin"), "--all2all-backend": one_of(*_VLLM_A2A),
    "--enable-dbo": SWITCH, "--ubatch-size": WHOLE, "--dbo-decode-token-threshold": WHOLE, "--dbo-prefill-token-threshold": WHOLE,
}  # fmt: skip
# Keys of vLLM's EPLBConfig with the types it takes.
_EPLB_CONFIG: Mapping[str, tuple[type, ...]] = {
    "window_size": (int,), "step_interval": (int,), "num_redundant_experts": (int,), "log_balancedness": (bool,),
    "log_balancedness_interval": (int,), "use_async": (bool,), "policy": (str,), "communicator": (str, type(None)),
    "enable_migration_batching": (bool,),
}  # fmt: skip
_COMMUNICATORS = ("torch_nccl", "torch_gloo", "torch_xccl", "nixl", "pynccl", None)
_BLOCKING_COMMUNICATORS = ("torch_nccl", "pynccl")
ASCEND_FLAGS: Mapping[str, Kind] = {
    "--tensor-parallel-size": WHOLE, "--data-parallel-size": WHOLE, "--enable-expert-parallel": SWITCH, "--additional-config": JSON,
}  # fmt: skip
_REBALANCE_ARGUMENTS = [
    "cls",
    "weight",
    "num_replicas",
    "num_groups",
    "num_nodes",
    "num_ranks",
    "old_global_expert_indices",
]
_TRTLLM_BACKENDS = ("AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "DENSEGEMM", "VANILLA", "TRITON", "MARLIN",
                    "MEGAMOE_DEEPGEMM")  # fmt: skip
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_sglang(files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement of the model's MoE layers that SGLang would load; raises InputError where it would not."""
    flags = read_flags(text_of(files, FLAGS_FILE), SGLANG_FLAGS, FLAGS_FILE)
    name = str(needed(flags, "--init-expert-location", FLAGS_FILE))
    if not name.endswith(".json"):
        raise InputError(f"{FLAGS_FILE}: --init-expert-location", name, "not the name of a JSON file", "name one")
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"physical_to_logical_map"})
    rows = int_rows(table["physical_to_logical_map"], f"{name}: physical_to_logical_map")
    if len(rows) != model.num_layers:
        raise InputError(f"{name}: physical_to_logical_map", len(rows), f"{model.name} has {model.num_layers} hidden layers",
                         "give one row per hidden layer, dense ones included")  # fmt: skip
    slots = model.num_experts + flags.get("--ep-num-redundant-experts", 0)
    _row_length(len(rows[0]), slots, f"{name}: physical_to_logical_map")
    ranks, nodes = needed(flags, "--ep-size", FLAGS_FILE), flags.get("--nnodes", 1)
    _placed(rows, model, ranks, nodes)  # dense layers' rows must be valid too
    return _placed([rows[layer] for layer in model.moe_layers], model, ranks, nodes)


def check_vllm(files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return the placement that vLLM's policy file holds, or None where a flag alone says it; raises InputError otherwise."""
    flags = read_flags(text_of(files, FLAGS_FILE), VLLM_FLAGS, FLAGS_FILE)
    needed(flags, "--enable-expert-parallel", FLAGS_FILE)
    if "--enable-eplb" not in flags:
        needed(flags, "--expert-placement-strategy", FLAGS_FILE)
        return None
    config = needed(flags, "--eplb-config", FLAGS_FILE)
    _check_eplb_config(config)
    policies = [name for name in files if name.endswith(".py")]
    if len(policies) != 1:
        raise InputError("files", policies, "not one policy file", "emit again")
    rows, ranks = _policy_rows(files[policies[0]], policies[0])
    _row_length(len(rows[0]), model.num_experts + config.get("num_redundant_experts", 0), policies[0])
    if len(rows) != model.num_moe_layers:
        raise InputError(
            policies[0], len(rows), f"{model.name} has {model.num_moe_layers} MoE layers", "give one row for each"
        )
    sizes = flags.get("--tensor-parallel-size", 1), flags.get("--data-parallel-size", 1)
    if sizes[0] * sizes[1] != ranks:
        raise InputError(
            f"{FLAGS_FILE}: tensor and data parallel size", sizes, f"the policy is for {ranks} ranks", "emit again"
        )
    return _placed(rows, model, ranks, 1)


def check_vllm_ascend(files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement that vLLM on Ascend would load; raises InputError where it would not."""
    flags = read_flags(text_of(files, FLAGS_FILE), ASCEND_FLAGS, FLAGS_FILE)
    needed(flags, "--enable-expert-parallel", FLAGS_FILE)
    additional = needed(flags, "--additional-config", FLAGS_FILE)
    exact_keys(additional, "--additional-config", {"eplb_config"})
    config = typed(additional, "eplb_config", dict, "--additional-config")
    exact_keys(config, "eplb_config", {"expert_map_path", "num_redundant_experts"})
    name = typed(config, "expert_map_path", str, "eplb_config")
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"moe_layer_count", "layer_list"})
    count, layers = typed(table, "moe_layer_count", int, name), typed(table, "layer_list", list, name)
    if count != model.num_moe_layers or len(layers) != count:
        raise InputError(f"{name}: moe_layer_count", count, f"{len(layers)} layers listed, {model.name} has {model.num_moe_layers}",
                         "emit again")  # fmt: skip
    rows, ranks = [], flags.get("--tensor-parallel-size", 1) * flags.get("--data-parallel-size", 1)
    for index, layer in enumerate(layers):
        where = f"{name}: layer {index}"
        exact_keys(layer, where, {"layer_id", "device_count", "device_list"})
        devices = typed(layer, "device_list", list, where)
        for device in devices:
            exact_keys(device, where, {"device_id", "device_expert"})
        ids = [typed(device, "device_id", int, where) for device in devices]
        given = (typed(layer, "layer_id", int, where), typed(layer, "device_count", int, where), ids)
        if given != (index, ranks, list(range(ranks))):
            raise InputError(where, given, f"not layer {index} with devices 0 to {ranks - 1} in order", "emit again")
        rows.append([expert for held in int_rows([d["device_expert"] for d in devices], where) for expert in held])
    _row_length(len(rows[0]), model.num_experts + typed(config, "num_redundant_experts", int, "eplb_config"), name)
    return _placed(rows, model, ranks, 1)


def check_trtllm(files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement that TensorRT-LLM would load; raises InputError where it would not."""
    where = "extra_llm_api_options.yaml"
    options = _read_yaml(text_of(files, where), where)
    exact_keys(
        options,
        where,
        {"tensor_parallel_size", "moe_expert_parallel_size", "gpus_per_node", "enable_attention_dp", "moe_config"},
    )
    typed(options, "enable_attention_dp", bool, where)
    typed(options, "tensor_parallel_size", int, where)
    ranks, per_node = (
        typed(options, "moe_expert_parallel_size", int, where),
        typed(options, "gpus_per_node", int, where),
    )
    moe = typed(options, "moe_config", dict, where)
    exact_keys(moe, f"{where}: moe_config", {"backend", "load_balancer"}, {"max_num_tokens"})
    if moe["backend"] not in _TRTLLM_BACKENDS:
        raise UnknownName(f"{where}: moe_config.backend", moe["backend"], _TRTLLM_BACKENDS)
    name = typed(moe, "load_balancer", str, where).removeprefix("./")
    table = _read_yaml(text_of(files, name), name)
    exact_keys(table, name, {"num_slots", "initial_global_assignments", "layer_updates_per_iter"})
    if typed(table, "layer_updates_per_iter", int, name) < 0:
        raise InputError(
            f"{name}: layer_updates_per_iter",
            table["layer_updates_per_iter"],
            "below zero",
            "give 0 for a fixed placement",
        )
    assigned = typed(table, "initial_global_assignments", dict, name)
    if list(assigned) != list(model.moe_layers):
        raise InputError(f"{name}: initial_global_assignments", list(assigned), f"the MoE layers are {list(model.moe_layers)}",
                         "give every MoE layer by its absolute index")  # fmt: skip
    rows = int_rows(list(assigned.values()), f"{name}: initial_global_assignments")
    _row_length(len(rows[0]), typed(table, "num_slots", int, name), name)
    if ranks < 1 or per_node < 1 or ranks % per_node:
        raise InputError(
            f"{where}: gpus_per_node", per_node, f"does not divide {ranks} ranks", "give every node as many"
        )
    return _placed(rows, model, ranks, ranks // per_node)


# --- parts of files ------------------------------------------------------------------------------------------------------


def text_of(files: Mapping[str, str], name: str) -> str:
    """Return the text of a file; raises InputError where it is not among `files`."""
    if name not in files:
        raise InputError("files", sorted(files), f"{name} is absent", "emit again")
    return files[name]


def needed(flags: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a flag's value; raises InputError where it was not given."""
    if name not in flags:
        raise InputError(f"{where}: {name}", "(absent)", "the flag is needed", "add it")
    return flags[name]


def exact_keys(table: object, where: str, required: set[str], optional: Sequence[str] | set[str] = ()) -> None:
    """Return nothing; raises for something that is no table, for an absent key and for one outside both sets."""
    if not isinstance(table, Mapping):
        raise InputError(where, table, "not a table", "write the file anew")
    for key in table:
        if key not in required and key not in optional:
            raise UnknownName(f"{where}: key", key, required | set(optional))
    for key in sorted(required):
        if key not in table:
            raise InputError(f"{where}: {key}", "(absent)", "a key is absent", "add it")


def typed(table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """Return a value of exactly the type `kind` (a truth value is no number); raises InputError otherwise."""
    if type(table.get(key)) is not kind:
        raise InputError(f"{where}: {key}", table.get(key), f"not of type {kind.__name__}", "write the file anew")
    return table[key]


def _placed(rows: list[list[int]], model: ModelSpec, num_ranks: int, num_nodes: int) -> Placement:
    """Return rows as a placement, whose own rules an engine asserts too: ids in range, none absent, slots divisible by ranks."""
    return Placement(physical_to_logical=np.array(rows, dtype=np.int32), num_logical=model.num_experts, num_ranks=num_ranks,
                     num_nodes=num_nodes)  # fmt: skip


def _row_length(given: int, slots: int, where: str) -> None:
    if given != slots:
        raise InputError(where, given, f"the configuration has {slots} slots a layer", "give every slot an expert")


def _check_eplb_config(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in _EPLB_CONFIG:
            raise UnknownName("--eplb-config: key", key, _EPLB_CONFIG)
        if type(value) not in _EPLB_CONFIG[key]:
            raise InputError(
                f"--eplb-config: {key}", value, f"not of type {_EPLB_CONFIG[key][0].__name__}", "correct it"
            )
    if config.get("policy", "default") != "default":
        raise UnknownName("--eplb-config: policy", config["policy"], ["default"])
    communicator = config.get("communicator")
    if communicator not in _COMMUNICATORS:
        raise UnknownName("--eplb-config: communicator", communicator, [name for name in _COMMUNICATORS if name])
    if config.get("use_async", True) and communicator in _BLOCKING_COMMUNICATORS:
        raise InputError("--eplb-config: communicator", communicator, "not with use_async", "choose another")


def _policy_rows(source: str, where: str) -> tuple[list[list[int]], int]:
    """Return the placement and ranks of a policy file, read without running it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        raise InputError(where, "(text)", "not Python", "emit again") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                raise InputError(
                    f"{where}: {node.targets[0].id}", "(code)", "not a plain value", "emit again"
                ) from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = [base.id for node in classes for base in node.bases if isinstance(base, ast.Name)]
    methods = [
        node
        for one in classes
        for node in one.body
        if isinstance(node, ast.FunctionDef) and node.name == "rebalance_experts"
    ]
    if bases != ["AbstractEplbPolicy"] or len(methods) != 1:
        raise InputError(where, bases, "not one subclass of AbstractEplbPolicy with rebalance_experts", "emit again")
    names = [argument.arg for argument in methods[0].args.args]
    if names != _REBALANCE_ARGUMENTS:
        raise InputError(
            f"{where}: rebalance_experts", names, f"vLLM calls it with {_REBALANCE_ARGUMENTS}", "emit again"
        )
    return int_rows(values.get("PHYSICAL_TO_LOGICAL"), f"{where}: PHYSICAL_TO_LOGICAL"), typed(
        values, "NUM_RANKS", int, where
    )


def _read_yaml(text: str, where: str) -> dict[Any, Any]:
    try:
        table = yaml.load(text, Loader=_LOADER)  # noqa: S506 - a safe loader, the compiled one where there is one
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(where, "(text)", "not YAML", "write the file anew") from None
    if not isinstance(table, dict):
        raise InputError(where, table, "not a table", "write the file anew")
    return table
