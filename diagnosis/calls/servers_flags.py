"""Flags of vLLM, SGLang and KTransformers that commands for one card have, one a line (`flags` says how they are written).

Modelled: flags of vLLM 0.33, SGLang 0.5.23 with kt-kernel 0.7.2, and KTransformers' local_chat (their arguments' definitions and
documentation). Ignored: flags of clusters, adapters, tools and towers that such commands do not have.
"""

from __future__ import annotations

_DRAFTS = "!drafted tokens are not predicted"

VLLM = f"""
--model N : model
--served-model-name N*
--tokenizer N
--tokenizer-mode N
--trust-remote-code
--dtype N
--quantization -q N : quantization
--kv-cache-dtype N : kv
--max-model-len N : context
--max-num-batched-tokens N : pass_tokens
--max-num-seqs N
--gpu-memory-utilization N
--kv-cache-memory-bytes N
--tensor-parallel-size -tp N : tensor
--pipeline-parallel-size -pp N : pipeline
--data-parallel-size -dp N : data
--enable-expert-parallel -ep
--cpu-offload-gb N : offload
--enforce-eager
--enable-prefix-caching
--no-enable-prefix-caching
--enable-chunked-prefill
--no-enable-chunked-prefill
--swap-space N
--block-size N
--seed N
--host N
--port N
--api-key N
--uvicorn-log-level N
--disable-log-requests
--enable-log-requests
--disable-log-stats
--load-format N
--download-dir N
--revision N
--chat-template N
--chat-template-content-format N
--reasoning-parser N
--enable-auto-tool-choice
--tool-call-parser N
--enable-reasoning
--generation-config N
--override-generation-config N
--hf-config-path N
--hf-overrides N
--limit-mm-per-prompt N
--language-model-only
--mm-encoder-tp-mode N
--attention-backend N
--async-scheduling
--no-async-scheduling
--compilation-config -O N
--cuda-graph-sizes N
--max-seq-len-to-capture N
--root-path N
--speculative-config N : {_DRAFTS}
--speculative-model N : {_DRAFTS}
--num-speculative-tokens N : {_DRAFTS}
--device N
--kv-transfer-config N
--moe-backend N
--optimization-level N
"""

SGLANG = f"""
--model --model-path N : model
--tokenizer-path N
--served-model-name N
--trust-remote-code
--dtype N
--quantization N : quantization
--kv-cache-dtype N : kv
--context-length N : context
--chunked-prefill-size N : pass_tokens
--max-prefill-tokens N
--max-running-requests N
--max-total-tokens N
--mem-fraction-static N
--tensor-parallel-size --tp-size --tp N : tensor
--pipeline-parallel-size --pp-size --pp N : pipeline
--data-parallel-size --dp-size --dp N : data
--expert-parallel-size --ep-size --ep N
--cpu-offload-gb N : offload
--attention-backend N
--prefill-attention-backend N
--decode-attention-backend N
--sampling-backend N
--moe-runner-backend N
--disable-cuda-graph
--cuda-graph-max-bs N
--cuda-graph-bs N
--disable-radix-cache
--enable-mixed-chunk
--enable-p2p-check
--disable-shared-experts-fusion
--disable-chunked-prefix-cache
--schedule-policy N
--schedule-conservativeness N
--random-seed N
--host N
--port N
--api-key N
--log-level N
--log-requests
--enable-metrics
--show-time-cost
--load-format N
--download-dir N
--chat-template N
--reasoning-parser N
--tool-call-parser N
--watchdog-timeout N
--device N
--page-size N
--stream-interval N
--enable-torch-compile
--enable-paged-experts : !a pool of experts is not predicted from a command yet
--paged-experts-num-resident N
--speculative-algorithm N : {_DRAFTS}
--speculative-draft-model-path N
--speculative-num-steps N
--speculative-eagle-topk N
--speculative-num-draft-tokens N
--kt-method N : kt_method
--kt-weight-path --kt-amx-weight-path N : kt_path
--kt-num-gpu-experts N : kt_experts
--kt-cpuinfer N : kt_threads
--kt-threadpool-count N
--kt-max-deferred-experts-per-token N
--kt-gpu-experts-ratio N : !give the number of experts of each layer (--kt-num-gpu-experts)
--kt-expert-placement-strategy N
--kt-enable-dynamic-expert-update
--kt-gpu-prefill-token-threshold N
"""

KTRANSFORMERS = """
--model_path --model-path --model_name --model-name N : model
--gguf_path --gguf-path N : gguf
--optimize_config_path --optimize-config-path N
--cpu_infer --cpu-infer N : kt_threads
--max_new_tokens --max-new-tokens N : reply
--cache_lens --cache-lens N : context
--chunk_size --chunk-size N : pass_tokens
--prompt_file --prompt-file N
--use_cuda_graph --use-cuda-graph N
--mode N
--force_think --force-think
--temperature N
--top_p --top-p N
--max_batch_size --max-batch-size N
--backend_type --backend-type N
--port N
--host N
--web N
--type N
--page_size --page-size N
"""
