"""The engines there are, by the name `--target` takes. A new one is a line here and a module of `engines/`, `-` written as `_`.

Modelled: names only, so that help is shown without importing numpy. Ignored: which kinds of plans an engine takes (its module).
"""

ENGINES = (
    "accelerate",
    "kt-kernel",
    "llamacpp",
    "lmdeploy",
    "mixtral-offloading",
    "moe-infinity",
    "sglang",
    "trtllm",
    "vllm",
    "vllm-ascend",
    "vllm-hygon",
)
