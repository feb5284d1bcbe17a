"""SGLang: `--init-expert-location` with the placement of every hidden layer, and flags; experts paged from host memory (`sglang_paging`).

Modelled: the map of SGLang 0.5.23 (`srt/eplb/expert_location.py`): one row per hidden layer, dense ones included and trivial
there; static replica choice, which is nearest-first; DeepEP modes; two-batch overlap. For models whose class does not say where its
experts are, the engine takes no placement, and none is written. Ignored: SGLang's own balancer, which stays off so that the planned
placement is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ....base.errors import InputError
from ....base.json_files import parse_json
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import exact_keys, needed, placed, row_length, text_of
from ..choices import Emission, EpChoice, Placement, as_run, int_rows, left_out
from ..drafting import SGLANG, ep_facts, sglang_flags
from ..flags import FLAGS_FILE, JSON, NUMBER, SWITCH, TEXT, USE_FLAGS, WHOLE, FlagValue, flag_lines
from ..parallel_notes import (
    COMMON,
    attention_groups,
    exchange_kind,
    exchange_notes,
    micro_batch_notes,
    moved,
    normal_mode,
    plain,
    replica_notes,
)
from ..table import DEPRECATED, EngineTable, flags_of, names, row
from ..target import OffloadTarget, ParallelTarget, Target
from .sglang_paging import check_offload, render_offload

LOCATION_FILE = "expert_location.json"

TABLE = EngineTable(
    engine="SGLang 0.5.23",
    checked="2026-11-28",
    how="every flag of this table and its values compared with the argument definitions in the released wheel (read, not started)",
    source="sglang 0.5.23: srt/arg_groups/fields/exec_.py, parallel.py, server_args.py; srt/eplb/expert_location.py; srt/models",
    flags={
        "--tp-size": row(WHOLE, "devices of the whole server", least=1),
        "--ep-size": row(WHOLE, "devices that experts are spread over", least=1),
        "--attn-dp-size": row(WHOLE, "groups of devices with their own requests in attention", least=1, since="0.5.23 or before"),
        "--dp-size": row(WHOLE, "replicas of the whole model", least=1),
        "--enable-dp-attention": row(SWITCH, "old spelling", standing=DEPRECATED, instead="--attn-dp-size N (removed after 2026-12-31)"),
        "--disable-cuda-graph": row(SWITCH, "old spelling", standing=DEPRECATED, instead="--cuda-graph-backend-decode disabled"),
        "--nnodes": row(WHOLE, "nodes", least=1),
        "--init-expert-location": row(TEXT, "trivial, or a file: physical_to_logical_map alone, or logical_count"),
        "--ep-num-redundant-experts": row(WHOLE, "slots of a layer beyond one per expert", least=0),
        "--ep-dispatch-algorithm": row(names("static", "dynamic", "fake", "lp"), "which copy of an expert a token takes"),
        "--enable-eplb": row(SWITCH, "rebalance while serving"),
        "--eplb-algorithm": row(TEXT, "auto, deepseek, deepseek_hierarchical, elasticity_aware …"),
        "--eplb-rebalance-num-iterations": row(WHOLE, "passes between rebalancings", least=1),
        **SGLANG,
        "--moe-a2a-backend": row(
            names("none", "deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer", "megamoe", "deepep_v2", "pplx",
                  "ascend_tp", "flashinfer_megamoe"), "how tokens travel to experts"),
        "--deepep-mode": row(names("auto", "normal", "low_latency"),
                             "auto: low_latency for decode batches, normal for prefill batches; normal: no CUDA graphs at all"),
        "--deepep-config": row(JSON, "multiprocessors and buffers of normal mode"),
        "--enable-two-batch-overlap": row(SWITCH, "two micro-batches in alternation"),
        "--tbo-token-distribution-threshold": row(NUMBER, "when to split by chunks instead", least=0, most=1),
        "--enable-single-batch-overlap": row(SWITCH, "exchanges under compute of one batch"),
        "--cuda-graph-backend-prefill": row(names("full", "breakable", "disabled"), "graphs of prefill"),
        "--cuda-graph-backend-decode": row(names("full", "breakable", "disabled"), "graphs of decode"),
        "--cpu-offload-gb": row(WHOLE, "weights in host memory, whatever they are", least=0),
        "--offload-group-size": row(WHOLE, "layers of a group", least=1),
        "--offload-num-in-group": row(WHOLE, "the last layers of a group that are fetched", least=1),
        "--offload-prefetch-step": row(WHOLE, "layers fetched ahead", least=1),
        "--enable-paged-experts": row(SWITCH, "a least-recently-used pool of experts in each layer; one device", source="sglang#29971"),
        "--paged-experts-num-resident": row(WHOLE, "experts of a layer on the device", least=1, source="sglang#29971"),
    },
    # Classes with get_model_config_for_expert_location.
    places=frozenset(
        {"bailing_moe", "bailing_moe_v2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "exaone_moe",
         "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm5_next", "gpt_oss", "kimi_k2", "kimi_k25", "longcat_flash", "mimo_v2_flash",
         "minimax_m2", "minimax_m3_vl",
         "nemotron_h", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp", "step3p5"}
    ),
)  # fmt: skip


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the expert-location file and the flags that load it; without the file for a model that takes no placement."""
    honoured = model.family in (TABLE.places or ())
    planned, pipeline = choice.placement, choice.schedule.pipeline
    placement = planned if honoured else plain(choice)
    _, data = attention_groups(choice)
    dynamic = choice.schedule.replica.choice == "even"
    flags: dict[str, FlagValue] = {
        "--tp-size": placement.num_ranks, "--ep-size": placement.num_ranks, "--nnodes": placement.num_nodes,
    }  # fmt: skip
    if data > 1:
        flags["--attn-dp-size"] = data
    files, usage = {}, [USE_FLAGS, "add --node-rank and --dist-init-addr on every node where there are several"]
    how = "SGLang's static choice is nearest first: own device, own node, then spread evenly"
    notes = [*micro_batch_notes(choice, 2)]
    facts = _facts(choice, model)
    changes: dict[str, object] = {"pipeline__micro_batches": min(pipeline.micro_batches, 2)}
    if honoured:
        trivial = [slot % model.num_experts for slot in range(placement.num_slots)]
        rows = [trivial] * model.num_layers
        for layer, one in zip(model.moe_layers, placement.physical_to_logical.tolist(), strict=True):
            rows[layer] = one
        files[LOCATION_FILE] = json.dumps({"physical_to_logical_map": rows}) + "\n"
        usage.insert(1, f"{LOCATION_FILE} is named relative to the folder the server starts in")
        flags |= {
            "--moe-a2a-backend": "deepep",
            "--deepep-mode": "normal" if normal_mode(choice) else "auto" if choice.decode else "low_latency",
            "--init-expert-location": LOCATION_FILE,
            "--ep-num-redundant-experts": placement.num_redundant,
            "--ep-dispatch-algorithm": "dynamic" if dynamic else "static",
        }
        notes = [*exchange_notes(choice), *replica_notes(choice, "even" if dynamic else "nearest", how), *notes]
        changes |= {"all_to_all__kind": exchange_kind(choice), "all_to_all__tiers": "together",
                    "replica__choice": "even" if dynamic else "nearest"}  # fmt: skip
    else:
        notes.insert(0, f"placement: SGLang takes no placement for {model.family} models: experts stay in their order, without copies, "
                     "and none is asked for, because a file would end the start at the first MoE layer")  # fmt: skip
    flags["--enable-two-batch-overlap"] = pipeline.micro_batches > 1
    notes += left_out(choice.schedule, COMMON, {"pipeline.all_to_all_sm_fraction": "set num_sms in --deepep-config"})
    files[FLAGS_FILE] = flag_lines(flags | sglang_flags(choice.draft))
    facts += ep_facts(choice.draft)
    kept = (*COMMON, "pipeline.shared_overlap")
    runs = as_run(choice.schedule, kept, **moved(choice, changes)) if honoured else None
    return Emission(
        engine=TABLE.engine, files=files, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts), runs=runs,
        unlike="" if honoured else "without an all-to-all back end ranks add up their experts' results, which no schedule describes",
    )  # fmt: skip


def _facts(choice: EpChoice, model: ModelSpec) -> list[str]:
    facts = []
    if model.family in (TABLE.places or ()):
        facts.append(f"{LOCATION_FILE} is loaded at the start, before weights: the placement is in force from the first token; "
                     "a key beside physical_to_logical_map would end the start")  # fmt: skip
        if normal_mode(choice):
            facts.append("--deepep-mode normal turns CUDA graphs off, in decode too: for servers that only do prefill; "
                         "write auto where one server does both")  # fmt: skip
        elif choice.decode:
            facts.append("--deepep-mode auto: decode batches take the low-latency kernels and keep their CUDA graphs, at most "
                         "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK (128 unless set) tokens a rank")  # fmt: skip
        if has_drafts(model):
            facts.append("draft (MTP) layers are outside the map: with --speculative-algorithm they keep their experts in order, "
                         "without the planned placement")  # fmt: skip
    return facts


def check(files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return the placement of the model's MoE layers that SGLang would load, None where it is told none.

    Raises InputError where it would refuse the files or ignore the placement.
    """
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    if "--init-expert-location" not in flags:
        for name in ("--ep-num-redundant-experts", "--ep-dispatch-algorithm"):
            if name in flags:
                raise InputError(
                    f"{FLAGS_FILE}: {name}", flags[name], "without a placement", "add --init-expert-location"
                )
        if model.family in (TABLE.places or ()):
            needed(flags, "--init-expert-location", FLAGS_FILE)
        return None
    name = str(flags["--init-expert-location"])
    if model.family not in (TABLE.places or ()):
        raise InputError(f"{FLAGS_FILE}: --init-expert-location", name, f"{TABLE.engine} takes no placement for {model.family}",
                         "leave it out")  # fmt: skip
    if not name.endswith(".json"):
        raise InputError(f"{FLAGS_FILE}: --init-expert-location", name, "not the name of a JSON file", "name one")
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"physical_to_logical_map"})
    rows = int_rows(table["physical_to_logical_map"], f"{name}: physical_to_logical_map")
    if len(rows) != model.num_layers:
        raise InputError(f"{name}: physical_to_logical_map", len(rows), f"{model.name} has {model.num_layers} hidden layers",
                         "give one row per hidden layer, dense ones included")  # fmt: skip
    slots = model.num_experts + flags.get("--ep-num-redundant-experts", 0)
    row_length(len(rows[0]), slots, f"{name}: physical_to_logical_map")
    ranks, nodes = needed(flags, "--ep-size", FLAGS_FILE), flags.get("--nnodes", 1)
    placed(rows, model, ranks, nodes)  # dense layers' rows must be valid too
    return placed([rows[layer] for layer in model.moe_layers], model, ranks, nodes)


TARGET = Target(
    table=TABLE,
    parallel=ParallelTarget(render=render, check=check),
    readable=True,
    offload=OffloadTarget(
        render=lambda choice, model: render_offload(choice, model, TABLE),
        check=lambda files, model: check_offload(files, model, TABLE),
    ),
)
