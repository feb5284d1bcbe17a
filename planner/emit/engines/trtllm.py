"""TensorRT-LLM, expert parallel: the `moe_load_balancer` file and the extra options that name it.

Modelled: `MoeLoadBalancerConfig` with a static assignment of every MoE layer by its absolute index (`layer_updates_per_iter` 0), on a
back end that every version since 1.2 has. The engine sets the balancer up only for some models and only with attention data
parallelism, and says nothing where it ignores it: there, none is written. Ignored: online rebalancing, precision and kernel options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ....base.errors import InputError
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import placed, read_yaml, row_length, text_of, typed
from ..choices import Emission, EpChoice, Placement, as_run, int_rows, left_out
from ..drafting import TRTLLM_CONFIG, ep_facts, trtllm_config
from ..flags import BOOLEAN, TEXT, WHOLE
from ..flags import TABLE as NESTED
from ..parallel_notes import (
    COMMON,
    OWN_EXCHANGE,
    exchange_kind,
    exchange_notes,
    micro_batch_notes,
    moved,
    normal_mode,
    own_exchange_notes,
    plain,
    replica_notes,
)
from ..table import DEPRECATED, EngineTable, check_keys, names, row
from ..target import ParallelTarget, Target

BALANCER_FILE, OPTIONS_FILE = "moe_load_balancer.yaml", "extra_llm_api_options.yaml"
ENVIRONMENT_FILE = "trtllm.env"
"""Variables of the environment, which alone say what carries tokens to experts: `NAME=value` lines."""
# libyaml's writer where PyYAML was built with it, else the same in Python.
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_OPTIONS, _MOE, _BALANCER = OPTIONS_FILE, "moe_config", BALANCER_FILE

TABLE = EngineTable(
    engine="TensorRT-LLM 1.2.1",
    checked="2026-11-28",
    how="keys compared with the published classes and the wide-EP guide, variables with the communication factory at 03c36d62 (read, "
    "not installed: the package needs a GPU's libraries)",
    source="TensorRT-LLM: MoeLoadBalancerConfig, MoeConfig; examples/wide_ep/README.md as of pull request 18626; pull request 17797; "
    "CommunicationFactory at 03c36d62 and select_alltoall_method_type of 1.2 for the environment",
    keys={
        f"{_OPTIONS}.tensor_parallel_size": row(WHOLE, "devices", least=1),
        f"{_OPTIONS}.moe_expert_parallel_size": row(WHOLE, "devices that experts are spread over", least=1),
        f"{_OPTIONS}.gpus_per_node": row(WHOLE, "devices of a node", least=1),
        f"{_OPTIONS}.enable_attention_dp": row(BOOLEAN, "each device has its own requests in attention"),
        f"{_OPTIONS}.moe_config": row(NESTED, "how MoE layers run"),
        f"{_OPTIONS}.{TRTLLM_CONFIG}": row(NESTED, "what drafts"),
        f"{TRTLLM_CONFIG}.decoding_type": row(names("MTP"), "the model's own draft layer"),
        f"{TRTLLM_CONFIG}.num_nextn_predict_layers": row(WHOLE, "guesses of a step", least=1),
        f"{_MOE}.backend": row(
            names("AUTO", "CUTLASS", "CUTEDSL", "TRTLLM", "DEEPGEMM", "DENSEGEMM", "VANILLA", "TRITON", "MARLIN", "MEGAMOE_DEEPGEMM"),
            "kernels; WIDEEP, of 1.2 and before, was removed in August 2026 (pull request 17797): CUTLASS, TRTLLM and CUTEDSL balance "
            "too (pull request 8886), DEEPGEMM since pull request 10617; VANILLA, TRITON and MARLIN do not"),
        f"{_MOE}.max_num_tokens": row(WHOLE, "tokens of one call", least=1),
        f"{_MOE}.load_balancer": row(TEXT, "the balancer's file"),
        f"{_BALANCER}.num_slots": row(WHOLE, "slots of a layer", least=1),
        f"{_BALANCER}.initial_global_assignments": row(NESTED, "absolute layer to one expert per slot"),
        f"{_BALANCER}.layer_updates_per_iter": row(WHOLE, "0: the assignment stays", least=0),
        f"{ENVIRONMENT_FILE}.TRTLLM_FORCE_COMM_METHOD": row(
            names("DEEPEP", "DEEPEPLOWLATENCY", "NVLINK_ONE_SIDED", "NVLINK_TWO_SIDED", "ALLGATHER"),
            "all-to-all of MoE layers; unset, the engine takes the first of its list that the machine has"),
        f"{ENVIRONMENT_FILE}.TRTLLM_CAN_USE_DEEP_EP": row(
            names("1", "0"), "DeepEP may be taken: off as 1.2 comes, on in later versions"),
        f"{_OPTIONS}.load_balancer": row(TEXT, "misplaced", standing=DEPRECATED, instead="moe_config.load_balancer"),
    },
    # moe_model_arch_list, as the guide lists it.
    places=frozenset(
        {"deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "gpt_oss", "kimi_k2", "kimi_k25", "mixtral", "llama4",
         "nemotron_h", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp"}
    ),
)  # fmt: skip
_BALANCING = ("CUTLASS", "TRTLLM", "CUTEDSL", "DEEPGEMM")


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the load balancer's file and the options file that names it; the options alone where the engine would ignore it."""
    data = choice.schedule.parallel.attention == "data"
    known = model.family in (TABLE.places or ())
    honoured = known and data and choice.placement.num_ranks > 1
    placement = choice.placement if honoured else plain(choice)
    moe: dict[str, Any] = {"backend": "CUTLASS"}
    files = {}
    notes = exchange_notes(choice) if honoured else own_exchange_notes(choice, "TensorRT-LLM")
    changes = {"all_to_all__kind": exchange_kind(choice), "all_to_all__tiers": "together", "replica__choice": "even",
               "pipeline__micro_batches": 1}  # fmt: skip
    if honoured:
        moe["load_balancer"] = f"./{BALANCER_FILE}"
        rows = dict(zip(model.moe_layers, placement.physical_to_logical.tolist(), strict=True))
        if choice.draft is not None:  # the draft layer's experts, in their order
            rows[model.num_layers] = [slot % model.num_experts for slot in range(placement.num_slots)]
        files[BALANCER_FILE] = _yaml(
            {"num_slots": placement.num_slots, "initial_global_assignments": rows, "layer_updates_per_iter": 0}
        )
        notes += replica_notes(choice, "even", "TensorRT-LLM spreads tokens evenly over an expert's copies")
    else:
        why = (
            f"for {model.family} models"
            if not known
            else "without attention data parallelism"
            if not data
            else "on one device"
        )
        notes.insert(0, f"placement: TensorRT-LLM ignores a placement {why}, without a word: experts stay in their order, without "
                     "copies, and no balancer is written")  # fmt: skip
    options = {
        "tensor_parallel_size": placement.num_ranks,
        "moe_expert_parallel_size": placement.num_ranks,
        "gpus_per_node": placement.ranks_per_node,
        "enable_attention_dp": data,
        "moe_config": moe,
    }
    if choice.draft is not None:
        options[TRTLLM_CONFIG] = trtllm_config(choice.draft)
    notes += [*micro_batch_notes(choice, 1), *left_out(choice.schedule, COMMON)]
    shared = choice.schedule.parallel.group(placement.ranks_per_node)
    if not data and shared != placement.num_ranks:
        notes.append(
            f"parallel.attention=tensor: all {placement.num_ranks} ranks share each attention layer here, not {shared}"
        )
    files[OPTIONS_FILE] = _yaml(options)
    usage = [f"pass --extra_llm_api_options {OPTIONS_FILE}"]
    if honoured:
        method = "DEEPEP" if normal_mode(choice) else "DEEPEPLOWLATENCY"
        files[ENVIRONMENT_FILE] = f"TRTLLM_CAN_USE_DEEP_EP=1\nTRTLLM_FORCE_COMM_METHOD={method}\n"
        usage[0] += f"; {BALANCER_FILE} is named relative to the working folder"
        usage.append(
            f"set the variables of {ENVIRONMENT_FILE} on every node (set -a; . ./{ENVIRONMENT_FILE}; or --env-file)"
        )
    return Emission(
        engine=TABLE.engine, files=files, usage=tuple(usage), notes=tuple(notes),
        facts=(*_facts(model, honoured, drafts=choice.draft is not None), *ep_facts(choice.draft)),
        runs=as_run(choice.schedule, (*COMMON, "pipeline.shared_overlap"), **moved(choice, changes)) if honoured else None,
        unlike="" if honoured else OWN_EXCHANGE,
    )  # fmt: skip


def _facts(model: ModelSpec, honoured: bool, *, drafts: bool) -> list[str]:
    backend = ("backend CUTLASS: the one with a balancer in 1.2 and in versions that no longer have WIDEEP; write DEEPGEMM for FP8 "
               "checkpoints with block scales where the version balances there (pull request 10617)")  # fmt: skip
    facts = [backend]
    if honoured:
        facts.append("without CUDA graphs DeepEP's normal kernels may be taken in decode too; its low-latency ones need IBGDA "
                     "(InfiniBand) between nodes")  # fmt: skip
        facts.append("layer_updates_per_iter 0: the assignment is in force from the first token and stays")
        if drafts:
            facts.append(f"layer {model.num_layers} of {BALANCER_FILE} is the draft (MTP) layer: its experts stay in their order, since "
                         "a plan has no loads of it")  # fmt: skip
        elif has_drafts(model):
            facts.append("draft (MTP) layers need entries of their own, which a plan does not have: with MTP decoding the start ends "
                         "in an error at the first of them; leave MTP off, or add its layers to the balancer's file")  # fmt: skip
    return facts


def _yaml(table: dict[str, Any]) -> str:
    """Return `table` as YAML: keys in order, lists of numbers on one line."""
    return str(yaml.dump(table, Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=2**20))


def _check_environment(files: Mapping[str, str]) -> None:
    """Return nothing; raises InputError for a variable or a value that the engine would not know."""
    if ENVIRONMENT_FILE not in files:
        return
    pairs = [line.partition("=") for line in files[ENVIRONMENT_FILE].splitlines() if line.strip()]
    for name, equals, value in pairs:
        if not equals or not name or value != value.strip():
            raise InputError(
                f"{ENVIRONMENT_FILE}", f"{name}{equals}{value}", "not NAME=value", "write one variable a line"
            )
    check_keys({name: value for name, _, value in pairs}, TABLE, ENVIRONMENT_FILE, set())


def check(files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return the placement that TensorRT-LLM would load, None where it is told none.

    Raises InputError where it would refuse the files or ignore the placement.
    """
    where = OPTIONS_FILE
    _check_environment(files)
    options = read_yaml(text_of(files, where), where)
    check_keys(options, TABLE, _OPTIONS,
               {"tensor_parallel_size", "moe_expert_parallel_size", "gpus_per_node", "enable_attention_dp", "moe_config"})  # fmt: skip
    ranks, per_node = options["moe_expert_parallel_size"], options["gpus_per_node"]
    if ranks % per_node:
        raise InputError(
            f"{where}: gpus_per_node", per_node, f"does not divide {ranks} ranks", "give every node as many"
        )
    moe = typed(options, "moe_config", dict, where)
    check_keys(moe, TABLE, _MOE, {"backend"})
    if "load_balancer" not in moe:
        return None
    if not options["enable_attention_dp"]:
        raise InputError(
            f"{where}: enable_attention_dp", False, "the balancer is ignored without", "leave load_balancer out"
        )
    if model.family not in (TABLE.places or ()):
        raise InputError(
            f"{where}: load_balancer", moe["load_balancer"], f"ignored for {model.family} models", "leave it out"
        )
    if moe["backend"] not in _BALANCING:
        raise InputError(
            f"{where}: backend", moe["backend"], "takes no balancer", f"use one of: {', '.join(_BALANCING)}"
        )
    name = moe["load_balancer"].removeprefix("./")
    table = read_yaml(text_of(files, name), name)
    check_keys(table, TABLE, _BALANCER, {"num_slots", "initial_global_assignments", "layer_updates_per_iter"})
    assigned = typed(table, "initial_global_assignments", dict, name)
    if TRTLLM_CONFIG in options:
        check_keys(options[TRTLLM_CONFIG], TABLE, TRTLLM_CONFIG, {"decoding_type", "num_nextn_predict_layers"})
        if assigned.pop(model.num_layers, None) is None:
            raise InputError(f"{name}: initial_global_assignments", list(assigned), f"the draft layer, {model.num_layers}, has no entry",
                             "add one, or leave speculative_config out")  # fmt: skip
    if list(assigned) != list(model.moe_layers):
        raise InputError(f"{name}: initial_global_assignments", list(assigned), f"the MoE layers are {list(model.moe_layers)}",
                         "give every MoE layer by its absolute index")  # fmt: skip
    rows = int_rows(list(assigned.values()), f"{name}: initial_global_assignments")
    row_length(len(rows[0]), table["num_slots"], name)
    return placed(rows, model, ranks, ranks // per_node)


TARGET = Target(table=TABLE, parallel=ParallelTarget(render=render, check=check), readable=True)
