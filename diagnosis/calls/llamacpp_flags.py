"""Flags of llama.cpp's and ik_llama.cpp's programs, one a line (`flags` says how they are written).

Modelled: the flags that llama-server, llama-cli and llama-bench list of themselves (ggml-org/llama.cpp: tools/server/README.md,
tools/llama-bench/README.md, as of September 2026, and names of 2025 that commands still have), and those of ik_llama.cpp
(common/common.cpp and examples/llama-bench of August 2026). Ignored: which build brought or dropped a flag.
"""

from __future__ import annotations

DRAFTS = "!drafted tokens are not predicted"
_SEVERAL = "!several machines or cards take part"

# What speed and memory depend on.
MATTERS = f"""
-m --model N : model
-hf -hfr --hf-repo N : repository
-hff --hf-file N : file
-ngl --gpu-layers --n-gpu-layers N : gpu_layers
-ncmoe --n-cpu-moe N : n_cpu_moe
-ot --override-tensor N* : overrides
-b --batch-size N : batch
-ub --ubatch-size N : ubatch
-ctk --cache-type-k N : keys
-ctv --cache-type-v N : values
-t --threads N : threads
-dev --device N : device
-sm --split-mode N : split_mode
-mg --main-gpu N : main_card
-ts --tensor-split N : tensor_split
--rpc -rpc N {": " + _SEVERAL}
"""

_PROGRAM = """
-cmoe --cpu-moe : cpu_moe
-c --ctx-size N : context
-np --parallel N : slots
-fa --flash-attn ?on,off,auto,0,1 : flash_attn
-nkvo --no-kv-offload : !keys and values in host memory are not predicted
-kvo --kv-offload
--op-offload : op_offload
-nopo --no-op-offload : no_op_offload
-tb --threads-batch N
-fit --fit ?on,off,0,1 : fit
-fitt --fit-target N : fit_target
-fitc --fit-ctx N : fit_ctx
-ncffn --n-cpu-ffn N : !dense layers in host memory are not predicted
-n --predict --n-predict N : reply
"""

_INDIFFERENT = """
-h --help --usage
--version
-C --cpu-mask N
-Cr --cpu-range N
--cpu-strict N
--prio N
--poll N
-Cb --cpu-mask-batch N
-Crb --cpu-range-batch N
--cpu-strict-batch N
--prio-batch N
--poll-batch N
--keep N
--swa-full
--perf
--no-perf
-e --escape
--no-escape
--rope-scaling N
--rope-scale N
--rope-freq-base N
--rope-freq-scale N
--yarn-orig-ctx N
--yarn-ext-factor N
--yarn-attn-factor N
--yarn-beta-slow N
--yarn-beta-fast N
--repack
-nr --no-repack
--no-host
-dt --defrag-thold N
-lm --load-mode N
-lzm --lazy-mode N
--mlock
--mmap
--no-mmap
--direct-io -dio
--numa N
--list-devices
--check-tensors
--override-kv N
--lora N
--lora-scaled N
--control-vector N
--control-vector-scaled N
--control-vector-layer-range N N
-mu --model-url N
-dr --docker-repo N
-hft --hf-token N
--log-disable
--log-file N
--log-jsonl
--no-log-jsonl
--log-colors ?on,off,auto
-v --verbose --log-verbose
--offline
-lv --verbosity --log-verbosity N
--log-prefix
--no-log-prefix
--log-timestamps
--no-log-timestamps
--samplers N
-s --seed N
--sampler-seq --sampling-seq N
--ignore-eos
--temp --temperature N
--top-k N
--top-p N
--min-p N
--top-nsigma --top-n-sigma N
--xtc-probability N
--xtc-threshold N
--typical --typical-p N
--repeat-last-n N
--repeat-penalty N
--presence-penalty N
--frequency-penalty N
--dry-multiplier N
--dry-base N
--dry-allowed-length N
--dry-penalty-last-n N
--dry-sequence-breaker N*
--adaptive-target N
--adaptive-decay N
--dynatemp-range N
--dynatemp-exp N
--mirostat N
--mirostat-lr N
--mirostat-ent N
-l --logit-bias N*
--grammar N
--grammar-file N
-j --json-schema N
-jf --json-schema-file N
-bs --backend-sampling
--no-warmup
--warmup
--spm-infill
-r --reverse-prompt N*
-sp --special
"""

_SERVER = """
--kv-unified-per-slot N
-ctxcp --ctx-checkpoints --swa-checkpoints N
-cms --checkpoint-min-step N
-cram --cache-ram N
-kvu --kv-unified
-no-kvu --no-kv-unified
--cache-idle-slots
--no-cache-idle-slots
--context-shift
--no-context-shift
--pooling N
-cb --cont-batching
-nocb --no-cont-batching
-mm --mmproj N
-mmu --mmproj-url N
--mmproj-auto
--no-mmproj --no-mmproj-auto
--mmproj-offload
--no-mmproj-offload
-mmdev --mmproj-device N
--image-min-tokens N
--image-max-tokens N
--mtmd-batch-max-tokens N
-a --alias N
--tags N
--embd-normalize N
--host N
--port N
--reuse-port
--path N
--cors-origins N
--api-prefix N
--ui-config --webui-config N
--ui-config-file --webui-config-file N
--ui-mcp-proxy --webui-mcp-proxy
--tools N
--mcp-servers-config N
--mcp-servers-json N
-ag --agent
--ui --webui
--no-ui --no-webui
--embedding --embeddings : !embeddings are not predicted
--rerank --reranking : !rankings are not predicted
--api-key N
--api-key-file N
--ssl-key-file N
--ssl-cert-file N
--chat-template-kwargs N
-to --timeout N
--sse-ping-interval N
--threads-http N
--cache-prompt
--no-cache-prompt
--cache-reuse N
--metrics
--props
--slots
--no-slots
--slot-save-path N
--media-path N
--models-dir N
--models-preset N
--models-max N
--jinja
--no-jinja
--reasoning-format N
-rea --reasoning N
--reasoning-effort N
--reasoning-budget N
--reasoning-budget-message N
--reasoning-preserve
--no-reasoning-preserve
--chat-template N
--chat-template-file N
--skip-chat-parsing
--prefill-assistant
--no-prefill-assistant
-sps --slot-prompt-similarity N
--lora-init-without-apply
--sleep-idle-seconds N
-lcs --lookup-cache-static N
-lcd --lookup-cache-dynamic N
"""

_CLI = """
-p --prompt N
-f --file N
-bf --binary-file N
-sys --system-prompt N
-sysf --system-prompt-file N
-cnv --conversation
-no-cnv --no-conversation
-st --single-turn
-i --interactive
-if --interactive-first
-mli --multiline-input
-co --color ?on,off,auto
--simple-io
--no-display-prompt
--show-timings
--prompt-cache N
--prompt-cache-all
--prompt-cache-ro
--in-prefix N
--in-suffix N
--in-prefix-bos
"""

_DRAFTING = "".join(
    f"{names} : {DRAFTS}\n"
    for names in (
        "-md --model-draft --spec-draft-model N", "-hfd -hfrd --hf-repo-draft --spec-draft-hf N", "--spec-type N", "--spec-default",
        "-mtp --multi-token-prediction", "--spec-stage N*", "-draft --draft-params N",
    )
)  # fmt: skip
# They count beside a model that drafts, which is refused.
_OF_DRAFTS = """
--draft --draft-n --draft-max --spec-draft-n-max N
--draft-min --draft-n-min --spec-draft-n-min N
--draft-p-min --spec-draft-p-min N
--draft-p-split --spec-draft-p-split N
-ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl N
-devd --device-draft --spec-draft-device N
-td --threads-draft --spec-draft-threads N
-tbd --threads-batch-draft --spec-draft-threads-batch N
-ctkd --cache-type-k-draft --spec-draft-type-k N
-ctvd --cache-type-v-draft --spec-draft-type-v N
-cd --ctx-size-draft N
-cmoed --cpu-moe-draft --spec-draft-cpu-moe
-ncmoed --n-cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe N
-otd --override-tensor-draft --spec-draft-override-tensor N
"""
_CACHE = """
--moe-cache-mib N : moe_cache
"""

SERVER = MATTERS + _PROGRAM + _INDIFFERENT + _SERVER + _DRAFTING + _OF_DRAFTS + _CACHE
CLI = MATTERS + _PROGRAM + _INDIFFERENT + _CLI + _DRAFTING + _OF_DRAFTS + _CACHE

BENCH = (
    MATTERS
    + """
-h --help
-p --n-prompt N : prompt
-n --n-gen N : reply
-pg N : both
-d --n-depth N : depth
-fa --flash-attn N : flash_attn
-nkvo --no-kv-offload N : no_kv_offload
-nopo --no-op-offload N : no_op_offload
-fitt --fit-target N : fit_target
-fitc --fit-ctx N : fit_ctx
-embd --embeddings N
-r --repetitions N
-o --output N
-oe --output-err N
-v --verbose
-C --cpu-mask N
--cpu-strict N
--poll N
--numa N
--prio N
--delay N
--list-devices
--progress
--no-warmup
--n-gen-warmup N
-mmp --mmap N
-dio --direct-io N
-lm --load-mode N
-lzm --lazy-mode N
--no-host N
--repack N
-nr --no-repack
-hft --hf-token N
--offline
--moe-cache N : moe_cache
"""
)

# Only ik_llama.cpp has these: a command with one of them is of that engine.
_IK = """
-mla --mla-use N : ik
-amb --attention-max-batch N : ik
-fmoe --fused-moe : ik
-no-fmoe --no-fused-moe : ik
-ger --grouped-expert-routing : ik
-no-fug --no-fused-up-gate : ik
-no-mmad --no-fused-mul-multiadd : ik
-rcache --rope-cache : ik
-gr --graph-reuse : ik
-no-gr --no-graph-reuse : ik
-rtr --run-time-repack : repack
-thp --transparent-huge-pages : ik
-mqkv --merge-qkv : ik
-muge --merge-up-gate-experts : ik
-khad --k-cache-hadamard : ik
-vhad --v-cache-hadamard : ik
-sas --scheduler-async : ik
-cuda --cuda-params N : ik
-no-ooae --no-offload-only-active-experts : ik
-fdn --fused-delta-net N : ik
-wgt --worst-graph-tokens N : ik
-vq --validate-quants : ik
-ictk --indexer-cache-type-k N : ik
-op --offload-policy N : !rules of single operations (-op) are not predicted
-ser --smart-expert-reduction N : !leaving out experts (-ser) is not predicted
-smgs --split-mode-graph-scheduling : ik
-no-mtp --no-multi-token-prediction
-no-fa --no-flash-attn : no_flash_attn
--fit-margin N : fit_target
--defer-experts
--prefetch-experts
-ctx-ckpt N
-cram-n-min --cache-ram-n-min N
-crs --cache-ram-similarity N
"""
IK_SERVER = SERVER + _CLI + _IK
IK_BENCH = BENCH + "\n".join(
    {"-fmoe --fused-moe : ik": "-fmoe --fused-moe N : ik", "-ger --grouped-expert-routing : ik": "-ger --grouped-expert-routing N : ik",
     "-gr --graph-reuse : ik": "-gr --graph-reuse N : ik", "-rtr --run-time-repack : repack": "-rtr --run-time-repack N : repack",
     "-no-fug --no-fused-up-gate : ik": "-no-fug --no-fused-up-gate N : ik",
     "-no-ooae --no-offload-only-active-experts : ik": "-no-ooae --no-offload-only-active-experts N : ik",
     "-mla --mla-use N : ik": "-mla --mla-use --mla-attn N : ik",
     "-rcache --rope-cache : ik": "-rcache --rope-cache N : ik",
     "-thp --transparent-huge-pages : ik": "-thp --transparent-huge-pages N : ik",
     "-mqkv --merge-qkv : ik": "-mqkv --merge-qkv N : ik", "-muge --merge-up-gate-experts : ik": "-muge --merge-up-gate-exps N : ik",
     "-sas --scheduler-async : ik": "-sas --scheduler-async N : ik"}.get(line, line)
    for line in _IK.splitlines()
) + "\n-tgb --threads-gen-batch N\n-w --warmup N\n-gp N : after\n--fit N : fit\n"  # fmt: skip
