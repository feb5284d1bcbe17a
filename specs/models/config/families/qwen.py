"""Qwen 2 and 3 (Alibaba) with grouped attention.

Ignored: vision and audio towers, routers' losses.
"""

from ..family import Family

_NO_WINDOW = {"use_sliding_window": False}
FAMILIES = {
    "qwen2_moe": Family(defaults=_NO_WINDOW | {"qkv_bias": True}, bias="qkv", shared_gate=True, window_everywhere=True),
    "qwen3_moe": Family(defaults=_NO_WINDOW, qk_norm="head", window_everywhere=True),
    "qwen3_vl_moe": Family(defaults=_NO_WINDOW, qk_norm="head", window_everywhere=True),
    "qwen3_omni_moe": Family(defaults=_NO_WINDOW, qk_norm="head", window_everywhere=True),
}
