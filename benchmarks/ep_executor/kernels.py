"""Which kernel for a stage's experts: all in one batched product (grouped), or one after the other (dense)?

Modelled: both measured in turns on one core for shapes, numbers of experts and rows with uneven routing; laws straight in launches,
experts, operations (of padded rows where rows are padded) and bytes, those of products with one row and with few rows apart, fitted
without the shape whose choices are then told. Ignored: cards, whose kernels differ (`make gpu`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.devices.stores.host import expert_activation
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.kernels.cpu import Scratch, run_rows, run_rows_batched
from moeplan.kernels.expert_weights import slot_views, write_slot

_SHAPES = ((256, 192), (256, 768), (512, 256), (512, 1024))
_EXPERTS, _ROWS = (4, 8, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Experts of a stage, and rows of each in the mean."""
_SKEW = 0.7
_VALUE = 4
_FEW_ROWS = 8


def run(repeats: int, seed: int = 0) -> dict[str, Any]:
    """Return every size with both times, what is predicted of them, and how often the choice is the faster one."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(seed)
    cases: list[dict[str, Any]] = []
    for hidden, inner in _SHAPES:
        model = made_up_model("shape", hidden=hidden, intermediate=inner, num_experts=max(_EXPERTS))
        layout = expert_layout(model, "32")
        weights = slot_views(
            torch.zeros(max(_EXPERTS) * layout.slot_bytes, dtype=torch.uint8), layout, expert_activation(model)
        )
        for slot in range(max(_EXPERTS)):
            shapes = layout.shape.matrices
            write_slot(weights, slot, *(torch.randn(*shapes[name]) * 0.05 for name in ("gate_up", "down")))
        for experts in _EXPERTS:
            for mean in _ROWS:
                chance = np.arange(1, experts + 1) ** -_SKEW
                counts = draw.multinomial(experts * mean, draw.permutation(chance / chance.sum()))
                offsets = [0, *np.cumsum(counts).tolist()]
                rows = torch.randn(offsets[-1], hidden)
                cases.append(
                    {"hidden": hidden, "inner": inner, "experts": experts, "counts": counts.tolist()}
                    | _time(rows, weights, offsets, repeats)
                )
    _predict(cases)
    right = [one["chosen"] == one["faster"] for one in cases]
    told = [one for one in cases if abs(one["grouped_s"] / one["dense_s"] - 1) > one["noise"]]
    return {
        "cases": cases,
        "right": float(np.mean(right)),
        "right_beyond_noise": float(np.mean([one["chosen"] == one["faster"] for one in told])) if told else None,
        "beyond_noise": len(told),
        "lost": float(
            np.mean([one[f"{one['chosen']}_s"] / min(one["grouped_s"], one["dense_s"]) - 1 for one in cases])
        ),
        "grouped_is_faster": float(np.mean([one["faster"] == "grouped" for one in cases])),
    }


def _time(rows: torch.Tensor, weights: Any, offsets: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return the medians of both kernels, measured in turns, and what halves of the runs differ by."""
    scratch, out = Scratch(), torch.empty_like(rows)
    found: dict[str, list[float]] = {"dense": [], "grouped": []}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for name, kernel in (("dense", run_rows), ("grouped", run_rows_batched)):
                began = time.perf_counter()
                kernel(rows, weights, offsets, out=out, scratch=scratch)
                if number:
                    found[name].append(time.perf_counter() - began)
    halves = [abs(float(np.median(each[0::2]) / np.median(each[1::2])) - 1) for each in found.values()]
    seconds = {f"{name}_s": float(np.median(each)) for name, each in found.items()}
    faster = "grouped" if seconds["grouped_s"] < seconds["dense_s"] else "dense"
    return seconds | {"noise": max(halves), "faster": faster}


def _features(case: dict[str, Any], kernel: str) -> list[float]:
    counts = np.array(case["counts"])
    active, per_row = int((counts > 0).sum()), 3 * case["hidden"] * case["inner"]
    rows = int(counts.sum()) if kernel == "dense" else active * int(counts.max())
    # A product with one row is one with a vector, and one with fewer rows than a tile fills none: both read weights at other speeds.
    lengths = counts[counts > 0] if kernel == "dense" else np.full(active, counts.max())
    vectors, few = int((lengths == 1).sum()), int(((lengths > 1) & (lengths <= _FEW_ROWS)).sum())
    moved = rows * (2 * case["hidden"] + 3 * case["inner"]) * _VALUE
    weights = per_row * _VALUE
    return [
        1.0,
        active,
        2 * rows * per_row,
        (active - vectors - few) * weights,
        vectors * weights,
        few * weights,
        moved,
    ]


def _predict(cases: list[dict[str, Any]]) -> None:
    """Add to every case what laws fitted without its shape say."""
    for hidden, inner in _SHAPES:
        mine = [one for one in cases if (one["hidden"], one["inner"]) == (hidden, inner)]
        others = [one for one in cases if (one["hidden"], one["inner"]) != (hidden, inner)]
        for kernel in ("dense", "grouped"):
            seconds = np.array([one[f"{kernel}_s"] for one in others])
            features = np.array([_features(one, kernel) for one in others])
            scale = np.maximum(features.max(axis=0), 1.0)
            law = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale
            for one in mine:
                one[f"{kernel}_predicted_s"] = float(np.array(_features(one, kernel)) @ law)
        for one in mine:
            one["chosen"] = "grouped" if one["grouped_predicted_s"] < one["dense_predicted_s"] else "dense"


def print_kernels(found: dict[str, Any]) -> None:
    """Print how often the choice was right."""
    print(f"kernels: {len(found['cases'])} sizes; grouped is the faster one in {found['grouped_is_faster']:.0%}; the chosen one is in "
          f"{found['right']:.0%}, where they differ by more than noise ({found['beyond_noise']}) in "
          f"{found['right_beyond_noise'] or 0:.0%}; the choice costs {found['lost']:.1%} in the mean")  # fmt: skip
