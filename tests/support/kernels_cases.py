"""What the tests of kernels share: poisoned outputs, a check of every element, how long to search, small random experts."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

from moeplan.kernels.error_bounds import worst_ratio

LONG = os.environ.get("MOEPLAN_LONG", "") not in ("", "0")
"""Search widely (minutes) rather than briefly (seconds)."""


def searching(brief: int, long: int) -> settings:
    """Return hypothesis settings for a slow subject: `brief` examples, or `long` ones where MOEPLAN_LONG is set."""
    return settings(
        max_examples=long if LONG else brief,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def generator(seed: int) -> torch.Generator:
    """Return torch's own random numbers from `seed`, apart from any global state."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal random numbers of `shape`, rounded to `dtype`."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an output full of NaN, so that an element a kernel forgets is seen."""
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_within(result: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Check every element of `result`; the message names the worst one and where it is."""
    assert result.shape == expected.shape
    ratio = worst_ratio(result, expected, bound)
    if ratio <= 1:
        return
    off = torch.nan_to_num((result.double() - expected).abs() / bound, nan=float("inf"))
    where = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    raise AssertionError(
        f"element {list(where)} is {result[where].item()}, expected {expected[where].item()} ± {bound[where].item()}; "
        f"{int((off > 1).sum())} of {off.numel()} elements are outside"
    )
