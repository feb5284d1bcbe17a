"""The bounds themselves: honest arithmetic stays inside, a single wrong element does not."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from moeplan.kernels import reference  # noqa: E402
from moeplan.kernels.activation import ACTIVATIONS  # noqa: E402
from moeplan.kernels.error_bounds import Arithmetic, expert_bound, rounding, worst_ratio  # noqa: E402
from moeplan.kernels.expert_weights import DenseMatrix  # noqa: E402
from moeplan.kernels.packing import pack, unpack  # noqa: E402

OFFSETS = torch.tensor([0, 5])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(x, weights, function):
    """The same computation by torch in float32, rounded once."""
    product = x.float() @ weights.float().T
    gate, up = product.chunk(2, dim=-1) if function is not None and function.gated else (product, None)
    return reference.activate(gate, up, function).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [None, *ACTIVATIONS.values()])
def test_float32_arithmetic_is_inside_and_little_else(dtype, function):
    x, weights = normal(0, 5, 256).to(dtype), normal(1, 64, 256).to(dtype) / 16
    matrix = DenseMatrix(values=weights.unsqueeze(0))
    expected = reference.expert_matmul(x, matrix, OFFSETS, function)
    bound = expert_bound(x, matrix, OFFSETS, function, Arithmetic(out_dtype=dtype))
    result = plain(x, weights, function)
    assert worst_ratio(result, expected, bound) <= 1
    # One column of inputs left out, as a wrong tail would do.
    short = x.clone()
    short[:, 255] = 0
    assert worst_ratio(plain(short, weights, function), expected, bound) > 5
    # Cutting instead of rounding doubles the last error, so it must be declared.
    assert rounding(dtype, cut=True) == 2 * rounding(dtype)


@pytest.mark.parametrize("scale_first", [True, False])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_packed_arithmetic_is_inside_and_a_wrong_zero_is_not(bits, scale_first):
    x = normal(0, 5, 320).to(torch.bfloat16)
    packed = pack(normal(1, 1, 32, 320), bits)
    expected = reference.expert_matmul(x, packed, OFFSETS)
    bound = expert_bound(x, packed, OFFSETS, None, Arithmetic(out_dtype=torch.bfloat16, scale_first=scale_first))
    weights = unpack(packed)[0]
    assert worst_ratio(plain(x, weights.bfloat16() if scale_first else weights, None), expected, bound) <= 1
    packed.codes[0, 0, 0] ^= 64 << 8  # the zero point of one group, by a quarter of its range
    assert worst_ratio(plain(x, unpack(packed)[0], None), expected, bound) > 1


def test_a_missing_element_is_infinitely_wrong():
    result = torch.tensor([1.0, float("nan")])
    assert worst_ratio(result, torch.ones(2).double(), torch.ones(2).double()) == float("inf")
    assert worst_ratio(torch.empty(0), torch.empty(0).double(), torch.empty(0).double()) == 0.0
