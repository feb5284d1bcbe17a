"""Hunyuan (Tencent)."""

from __future__ import annotations

from ..family import Draft, Family
from ..keys import Keys
from .deepseek import add_hyper_connections


def _v4(keys: Keys, draft: Draft) -> None:
    """Residual streams."""
    add_hyper_connections(keys, draft, rows=2 * keys.need("hc_mult"), head=True)


FAMILIES = {
    "hunyuan_v1_moe": Family(defaults={"num_shared_experts": 1}, qk_norm="head"),
    "hy_v3": Family(qk_norm="head"),
    "hy_v4": Family(sinks=True, gate="full", finish=_v4),
}
