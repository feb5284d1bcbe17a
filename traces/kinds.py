"""The kinds of files that recordings are read from: what `--from` takes, and where each is read.

Modelled: names only, so that help is shown without importing numpy. Ignored: options of a kind (its function's signature).
"""

from __future__ import annotations

from collections.abc import Mapping

# A new source is a function in a module below `readers/` and a line here; it is imported when the kind is asked for.
READERS: Mapping[str, str] = {
    "csv": "files.token_rows.read_csv",
    "hf-router-logits": "files.router_logits.read_router_logits",
    "jsonl": "files.token_rows.read_jsonl",
    "llama-csv": "engines.llamacpp.read_llama_csv",
    "llama-imatrix": "engines.llamacpp.read_llama_imatrix",
    "megatron": "engines.megatron.read_megatron",
    "moe-infinity": "engines.moe_infinity.read_moe_infinity",
    "npy": "files.npy_layers.read_npy_layers",
    "npz": "files.npz.read_npz_trace",
    "parquet": "files.parquet.read_parquet",
    "sglang-per-pass": "engines.sglang.read_sglang_per_pass",
    "sglang-per-token": "engines.sglang.read_sglang_per_token",
    "sglang-routed-experts": "engines.sglang_routed_experts.read_sglang_routed_experts",
    "sglang-stat": "engines.sglang.read_sglang_stat",
    "trtllm": "engines.trtllm.read_trtllm",
    "verl": "engines.verl.read_verl",
    "vllm-eplb-stats": "engines.vllm_load_stats.read_vllm_load_stats",
    "vllm-routed-experts": "engines.vllm_routed_experts.read_vllm_routed_experts",
}
"""Kind → module below `readers/` and function in it."""
