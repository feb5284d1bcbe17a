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

_OTHER_NAMES = {
    "llama.cpp": "llamacpp", "ik_llama.cpp": "llamacpp", "ktransformers": "kt-kernel", "tensorrt-llm": "trtllm",
}  # fmt: skip


def emit_name(engine: str) -> str:
    """Return the name that `--for` takes for a serving engine of `moeplan engine list`; one of its own is returned as it is."""
    return _OTHER_NAMES.get(engine, engine)
