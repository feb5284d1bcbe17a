"""MiniMax: lightning attention in most layers (01), grouped attention (M2), sparse attention by blocks (M3).

Ignored: factors of residuals, which blocks sparse attention takes, draft layers.
"""

from __future__ import annotations

from ...family import Draft, Family
from ...keys import Keys


def _m3(keys: Keys, draft: Draft) -> None:
    keys.known("index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")


FAMILIES = {
    "minimax": Family(linear="lightning", harmless=("block_size",)),
    "minimax_text_01": Family(linear="lightning"),
    "minimax_m1": Family(linear="lightning"),
    "minimax_m2": Family(qk_norm="full", harmless=("num_mtp_modules", "mtp_transformer_layers")),
    "minimax_m3_vl": Family(qk_norm="head", finish=_m3),
}
