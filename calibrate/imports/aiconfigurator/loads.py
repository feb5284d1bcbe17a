"""Tables of experts as loads of the expert form.

Modelled: what the collector gave the fullest rank, all tokens of the group entering there, or those with a choice there. Ignored:
shared experts and communication, which the tables leave out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...costs.gpu.experts import TILE_HEIGHTS, ExpertLoad, ExpertShape
from .routing import heaviest_rank

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8-block", "int4_wo": "int4", "w4a16_mxfp4": "mxfp4",
           "nvfp4": "nvfp4"}  # fmt: skip
"""Number formats by their names in the tables."""
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8-block": 1.0, "int4": 0.5, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
"""Bytes of a weight; the scales of blocks count where they are many."""
ACTIVATION_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8-block": 1.0, "int4": 2.0, "mxfp4": 2.0, "nvfp4": 0.5 + 1 / 16}


def expert_work(rows: pd.DataFrame, number: str, *, others: bool = False) -> tuple[ExpertShape, ExpertLoad]:
    """Return the shape and load of every row; others: as `routing.heaviest_rank` has it."""
    columns = {name: rows[name].to_numpy(float) for name in (
        "hidden_size", "inter_size", "moe_tp_size", "num_tokens", "topk", "num_experts", "moe_ep_size",
    )}  # fmt: skip
    keys = zip(
        *(rows[name] for name in ("num_tokens", "num_experts", "topk", "moe_ep_size", "distribution")), strict=True
    )
    features = np.array([heaviest_rank(int(n), int(e), int(k), int(r), str(kind), others) for n, e, k, r, kind in keys])
    shape = ExpertShape(
        hidden=columns["hidden_size"], intermediate=np.floor(columns["inter_size"] / columns["moe_tp_size"]), gated=True,
        weight_bytes=WEIGHT_BYTES[number], activation_bytes=ACTIVATION_BYTES[number],
    )  # fmt: skip
    load = ExpertLoad(
        active=features[:, 0], rows=features[:, 1], tiles=tuple(features[:, 2 + at] for at in range(len(TILE_HEIGHTS))),
        tokens=features[:, -1], all_rows=features[:, -1] * columns["topk"],
        num_experts=columns["num_experts"] / columns["moe_ep_size"], choices=features[:, -1] * columns["topk"],
        all_experts=columns["num_experts"],
    )  # fmt: skip
    return shape, load
