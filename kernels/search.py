"""The search for launch configurations on a GPU, outside the kernels: try candidates, keep the fastest that is right.

    tune(candidates(key, rows_per_expert, capability), run, measure, is_right) ──► Tuned(best, seconds, refused)

`run(config)` launches the kernel once and returns its result, `measure(call)` returns the seconds of one call, and
`is_right(config, result)` judges a result. How a time is measured is the caller's business (benchmarks and
calibration have one harness for everything), and so is what right means.

Modelled: a short list of candidates for each kernel and number of rows, drawn from what fits the device's registers and shared
memory. Ignored: exhaustive grids; a candidate costs seconds of compiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from ..base.errors import InputError
from .tuning import KERNELS, Config, DequantConfig, GroupedConfig, TuningKey

_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a search found."""

    best: Config
    best_s: float
    seconds: Mapping[Config, float]
    """Every candidate that ran and was right."""
    refused: Mapping[Config, str]
    """Every candidate that was not taken, and why: it did not compile, did not fit, or was wrong."""


def candidates(key: TuningKey, rows_per_expert: int, capability: tuple[int, int] | None) -> tuple[Config, ...]:
    """Return the configurations worth trying, likeliest first."""
    if key.kernel not in KERNELS:
        raise InputError("kernel", key.kernel, f"one of {', '.join(KERNELS)}", "check its spelling")
    if key.kernel.startswith("dequant"):
        return _dequant_candidates(rows_per_expert, is_down=key.kernel == "dequant_down")
    hopper = capability is not None and capability >= _HOPPER
    return _grouped_candidates(
        rows_per_expert, is_down=key.kernel == "grouped_down", hopper=hopper, narrow=key.weights == "8"
    )


def tune(
    options: Sequence[Config],
    run: Callable[[Config], torch.Tensor],
    measure: Callable[[Callable[[], object]], float],
    is_right: Callable[[Config, torch.Tensor], bool],
    *,
    deadline_s: float | None = None,
) -> Tuned:
    """Return the fastest of `options` whose result is right; `deadline_s` on time.monotonic() ends the search early.

    The first option is tried whatever the time. Raises InputError where none works.
    """
    seconds: dict[Config, float] = {}
    refused: dict[Config, str] = {}
    for config in options:
        if deadline_s is not None and time.monotonic() > deadline_s and seconds:
            refused[config] = "out of time"
            continue
        try:
            right = is_right(config, run(config))
        except (TritonError, RuntimeError) as error:  # does not compile, needs more shared memory than there is
            refused[config] = f"{type(error).__name__}: {error}"[:200]
            continue
        if not right:
            refused[config] = "its result is wrong"
            continue
        seconds[config] = measure(lambda config=config: run(config))  # type: ignore[misc]
    if not seconds:
        raise InputError(
            "candidates", len(options), f"none of them works: {sorted(set(refused.values()))}", "add others"
        )
    best = min(seconds, key=lambda config: seconds[config])
    return Tuned(best=best, best_s=seconds[best], seconds=seconds, refused=refused)


def _grouped_candidates(rows: int, *, is_down: bool, hopper: bool, narrow: bool) -> tuple[GroupedConfig, ...]:
    found: list[GroupedConfig] = []

    def add(
        block_m: int,
        block_n: int,
        block_k: int,
        num_warps: int,
        num_stages: int,
        per_sm: int | None = None,
        flatten: bool = False,
    ) -> None:
        found.append(
            GroupedConfig(
                block_m=block_m,
                block_n=block_n,
                block_k=block_k * (2 if narrow and block_k == 64 else 1),
                group_m=8 if block_m >= 64 else 1,
                num_warps=num_warps,
                num_stages=num_stages,
                descriptors=hopper,
                programs_per_sm=per_sm,
                flatten=flatten,
            )
        )

    if rows <= 32:
        block_m = 16 if rows <= 16 else 32
        for block_n, block_k, num_warps, num_stages in (
            (64, 128, 4, 4), (32, 128, 4, 4), (64, 128, 4, 3), (32, 256, 4, 3), (128, 64, 4, 4), (64, 64, 4, 5), (128, 128, 4, 3),
        ):  # fmt: skip
            add(block_m, block_n, block_k, num_warps, num_stages)
        return tuple(found)
    if rows <= 96:
        add(64, 128, 64, 4, 4)
        add(64, 64, 64, 4, 4)
        add(64, 128, 64, 4, 4, per_sm=1, flatten=True)
        add(64, 256 if is_down and not narrow else 128, 64, 8, 3)
        add(128, 128, 64, 8, 3)
        return tuple(found)
    # Sums that leave the matrix unit early, as float8's do, take twice the registers.
    wide = 256 if is_down and not narrow else 128
    add(128, wide, 64, 8, 4)
    add(128, wide, 64, 8, 3)
    add(128, wide, 64, 8, 4, per_sm=1)
    add(128, wide, 64, 8, 4, per_sm=1, flatten=True)
    add(128, wide, 64, 8, 3, per_sm=1, flatten=True)
    add(128, wide // 2, 64, 8, 4)
    add(64, wide, 64, 4, 3)
    if is_down and not narrow:
        add(256, 128, 64, 8, 3)
        add(256, 128, 64, 8, 4, per_sm=1, flatten=True)
    return tuple(found)


def _dequant_candidates(rows: int, *, is_down: bool) -> tuple[DequantConfig, ...]:
    found: list[DequantConfig] = []
    if rows <= 16:
        block_m = 8 if rows <= 8 else 16
        splits = (8, 4, 16) if is_down else (1, 2, 4)
        shapes = ((32, 2, 4), (32, 2, 3), (16, 1, 4), (64, 4, 3), (64, 2, 3))
        for split_k in splits:
            for block_n, num_warps, num_stages in shapes if split_k == splits[0] else shapes[:3]:
                found.append(
                    DequantConfig(
                        block_m=block_m,
                        block_n=block_n,
                        split_k=split_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        scale_first=False,
                    )
                )
        found.append(
            DequantConfig(
                block_m=block_m,
                block_n=32,
                split_k=splits[0],
                num_warps=2,
                num_stages=4,
                scale_first=False,
                sums_inside=True,
            )
        )
        return tuple(found)
    block_ms = (32,) if rows <= 32 else (64,) if rows <= 64 else (128, 64)
    for block_m in block_ms:
        for block_n, num_warps, num_stages in ((128, 8, 3), (128, 8, 2), (64, 4, 3), (64, 4, 2)):
            found.append(
                DequantConfig(
                    block_m=block_m,
                    block_n=block_n,
                    split_k=1,
                    num_warps=num_warps,
                    num_stages=num_stages,
                    scale_first=True,
                )
            )
    return tuple(found)
