"""vLLM's flags and the keys of `--eplb-config`, released and proposed.

Modelled: version 0.33.0, and open pull requests of 2026 that would load a placement. Ignored: flags that are never written.
"""

from __future__ import annotations

from ..drafting import VLLM
from ..flags import BOOLEAN, JSON, NUMBER, SWITCH, TEXT, WHOLE
from ..table import PENDING, EngineTable, names, row

EPLB = "eplb_config"

TABLE = EngineTable(
    engine="vLLM 0.33.0",
    checked="2026-11-28",
    how="every released row compared with the argument and configuration classes in the wheel (read, not started)",
    source="vllm 0.33.0: config, engine/arg_utils.py, distributed/eplb, model_executor/models; open pull requests as of September 2026",
    flags={
        "--tensor-parallel-size": row(WHOLE, "devices that share each attention layer", least=1),
        "--data-parallel-size": row(WHOLE, "groups of devices with their own requests", least=1),
        "--enable-expert-parallel": row(SWITCH, "experts whole on devices, over tensor x data parallel size"),
        "--enable-eplb": row(SWITCH, "balance experts"),
        "--eplb-config": row(JSON, "how"),
        "--expert-placement-strategy": row(
            names("linear", "round_robin"),
            "the order of experts; round_robin only with several expert groups, no copies, no balancing, and DeepEP low latency or NIXL"),
        "--all2all-backend": row(
            names("naive", "pplx", "deepep_high_throughput", "deepep_low_latency", "deepep_v2", "mori_high_throughput",
                  "mori_low_latency", "moonep", "nixl_ep", "allgather_reducescatter", "flashinfer_all2allv",
                  "flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided"),
            "how tokens travel; deepep_high_throughput turns CUDA graphs off"),
        **VLLM,
        "--enable-dbo": row(SWITCH, "two micro-batches, with DeepEP or NIXL"),
        "--ubatch-size": row(WHOLE, "micro-batches", least=0),
        "--dbo-decode-token-threshold": row(WHOLE, "tokens from which decode is split", least=0),
        "--dbo-prefill-token-threshold": row(WHOLE, "tokens from which prefill is split", least=0),
        "--offload-backend": row(names("auto", "uva", "prefetch"), "how weights in host memory are used"),
        "--cpu-offload-gb": row(NUMBER, "GiB in host memory for each device", least=0),
        "--cpu-offload-params": row(TEXT, "segments of parameters' names"),
        "--offload-group-size": row(WHOLE, "layers of a group", least=1),
        "--offload-num-in-group": row(WHOLE, "the last layers of a group that are fetched", least=1),
        "--offload-prefetch-step": row(WHOLE, "layers fetched ahead", least=1),
        "--offload-params": row(TEXT, "segments of parameters' names"),
        "--expert-placement-file": row(TEXT, 'a file {"expert_to_ep_rank": […]}, one for all layers; excludes --enable-eplb',
                                       standing=PENDING, since="pull request 34811, open"),
    },
    keys={
        f"{EPLB}.window_size": row(WHOLE, "passes whose loads are kept", least=1),
        f"{EPLB}.step_interval": row(WHOLE, "passes between rebalancings", least=1),
        f"{EPLB}.num_redundant_experts": row(WHOLE, "slots of a layer beyond one per expert", least=0),
        f"{EPLB}.log_balancedness": row(BOOLEAN, "log how even ranks are"),
        f"{EPLB}.log_balancedness_interval": row(WHOLE, "passes between logs", least=1),
        f"{EPLB}.use_async": row(BOOLEAN, "move experts while serving; only with policy default"),
        f"{EPLB}.policy": row(names("default"), "who rebalances"),
        f"{EPLB}.communicator": row(names("torch_nccl", "torch_gloo", "torch_xccl", "nixl", "pynccl"), "how experts move"),
        f"{EPLB}.enable_migration_batching": row(BOOLEAN, "one peer at a time"),
        f"{EPLB}.initial_expert_map_path": row(TEXT, "JSON: slots' experts, one list or one for each MoE layer", standing=PENDING,
                                               since="pull request 49572, open"),
        f"{EPLB}.initial_mapping_path": row(TEXT, "JSON line of record_type eplb_initial_mapping", standing=PENDING,
                                            since="pull request 41141, open"),
        f"{EPLB}.disable_online_rebalancing": row(BOOLEAN, "the mapping stays", standing=PENDING, since="pull request 41141, open"),
        f"{EPLB}.expert_load_stats_path": row(TEXT, "where loads are written, JSON lines", standing=PENDING,
                                              since="pull request 41141, open"),
        f"{EPLB}.expert_map_path": row(TEXT, "slots' experts for each MoE layer, DeepSeek V4 only", standing=PENDING,
                                       since="pull request 53022, open"),
    },
    # Classes that implement MixtureOfExperts.
    places=frozenset(
        {"afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "gemma4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
         "glm5_next", "kimi_k2", "kimi_k25", "kimi_linear", "lfm2_moe", "llama4", "mimo_v2_flash", "mixtral", "nemotron_h", "qwen3_moe",
         "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp", "step3p5"}
    ),
)  # fmt: skip
