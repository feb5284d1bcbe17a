"""Packed weights: words and back exactly, bytes as promised, errors as small as the width allows."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from long_runs import examples  # noqa: E402
from moeplan.base.errors import InputError  # noqa: E402
from moeplan.kernels.packing import (  # noqa: E402
    dequantise,
    pack,
    pack_words,
    quantise,
    scale_and_zero,
    scale_of_code,
    unpack,
    unpack_words,
)
from moeplan.kernels.slot_layout import PACKED_FORMATS, packed_format  # noqa: E402
from moeplan.specs.models import weight_format  # noqa: E402

BITS = (4, 3, 2)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=examples(60), deadline=None)
@given(
    bits=st.sampled_from(BITS), num_groups=st.integers(1, 30), num_rows=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_words_and_back_is_exact(bits, num_groups, num_rows, seed):
    fmt = packed_format(bits)
    num_columns = num_groups * fmt.group
    values = torch.randint(0, 2**bits, (2, num_rows, num_columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    words = pack_words(values, fmt)
    assert words.dtype == torch.int32 and words.shape == (2, num_rows, fmt.num_words(num_columns))
    assert torch.equal(unpack_words(words, fmt, num_columns), values)


@pytest.mark.parametrize(
    ("bits", "num_columns", "num_words"),
    # Full blocks (32 words of 256 or 320 columns, 8 of 128); tails (16 words of 128); a rest too long for a tail.
    [
        (4, 256, 32),
        (4, 384, 48),
        (4, 448, 64),
        (4, 64, 16),
        (3, 320, 32),
        (3, 384, 48),
        (3, 448, 48),
        (3, 512, 64),
        (2, 128, 8),
        (2, 144, 16),
    ],
)
def test_words_of_a_row(bits, num_columns, num_words):
    assert packed_format(bits).num_words(num_columns) == num_words


def test_a_word_bit_by_bit():
    """Column 2·c + half of plane p lies at bit 16·half + p·bits of word c."""
    fmt = packed_format(4)
    values = torch.zeros(1, 256, dtype=torch.uint8)
    for column, value in ((0, 1), (1, 2), (2, 3), (64, 4), (65, 5), (128, 6), (192, 7), (255, 15)):
        values[0, column] = value
    words = pack_words(values, fmt)[0].tolist()
    assert words[0] == 1 | 2 << 16 | 4 << 4 | 5 << 20 | 6 << 8 | 7 << 12
    assert words[1] == 3
    assert words[31] == (15 << 28) - 2**32  # the last column, in the sign's bits
    assert words[2:31] == [0] * 29


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_hqqs_within_a_percent_and_a_half(bits):
    """Mixtral-8x7B's experts: 93.7, 76.1 and 66.7 MB in Mixtral-offloading; ours differ by padding and simpler metadata."""
    fmt = packed_format(bits)
    ours = fmt.num_bytes(2 * 14336, 4096) + fmt.num_bytes(4096, 14336)
    theirs = weight_format(bits).num_bytes(3 * 4096 * 14336)
    assert ours == {4: 93_716_480, 3: 76_939_264, 2: 66_191_360}[bits]
    assert abs(ours / theirs - 1) < 0.015


@pytest.mark.parametrize("bits", BITS)
def test_packed_parts_have_the_promised_bytes(bits):
    packed = pack(normal(0, 3, 10, 640), bits)
    parts = (packed.words, packed.codes, packed.row_scale)
    assert sum(part.numel() * part.element_size() for part in parts) == 3 * packed.format.num_bytes(10, 640)
    assert (packed.num_slots, packed.num_rows, packed.num_columns) == (3, 10, 640)


@settings(max_examples=examples(40), deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**31), spread=st.floats(-6, 6))
def test_every_weight_is_within_its_groups_step(bits, seed, spread):
    """Half a step of rounding, a scale at most 1/32 above what the range needs, a zero point off by half of its own step."""
    fmt = packed_format(bits)
    weights = normal(seed, 3, 5 * fmt.group)
    weights[:, : fmt.group] *= 10**spread / 100  # one group far from the others
    groups = weights.unflatten(-1, (-1, fmt.group))
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**bits - 1)
    # A group below the smallest scale of its row (2**-7 of 1.97) is coarser: it takes that one.
    step = torch.maximum(step * (1 + 2**-5), step.amax(-1, keepdim=True) * 2.0**-7 / (2 - 2**-5)) * (1 + 1e-5)
    error = (unpack(pack(weights, bits))[0] - weights).unflatten(-1, (-1, fmt.group)).abs().amax(-1)
    assert (error <= step * (0.5 + 2.0 ** (bits - 9))).all()


def test_codes_expand_to_what_the_docstring_says():
    assert scale_of_code(torch.tensor([0, 31, 32, 255])).tolist() == [2**-7, 2**-7 * (1 + 31 / 32), 2**-6, 1 + 31 / 32]
    scale, zero = scale_and_zero(torch.tensor([0x10E0, -1], dtype=torch.int16), 4)
    assert scale.tolist() == [1.0, 1 + 31 / 32]
    assert zero.tolist() == [1.0, 255 / 16]


def test_dequantise_is_whole_number_less_zero_times_scale():
    fmt = PACKED_FORMATS[2]
    values = torch.arange(16).remainder(4).to(torch.uint8).unsqueeze(0)
    code = 224 | 64 << 8  # scale 1, zero 64/64
    weights = dequantise(values, torch.tensor([[code]], dtype=torch.int16), torch.tensor([0.5]), fmt, torch.float32)
    assert weights[0, :4].tolist() == [-0.5, 0.0, 0.5, 1.0]


def test_zero_weights_stay_zero():
    for bits in BITS:
        assert torch.equal(unpack(pack(torch.zeros(2, 3, 128), bits)), torch.zeros(2, 3, 128))


def test_one_sided_groups_keep_zero_exact():
    """Ranges include zero, so positive weights have zero point 0 and zeros among them stay zeros."""
    weights = normal(2, 1, 128).abs()
    weights[0, ::7] = 0
    for bits in BITS:
        assert (unpack(pack(weights, bits))[0, 0, ::7] == 0).all()


def test_quantise_covers_the_largest_weights():
    for bits in BITS:
        values, codes, row_scale = quantise(normal(3, 2, 256), packed_format(bits))
        assert int(values.max()) == 2**bits - 1
        assert codes.dtype == torch.int16 and row_scale.shape == (2,)


def test_refusals_name_the_argument():
    good = pack(normal(0, 2, 64), 4)
    for call, field in (
        (lambda: pack(normal(0, 2, 100), 4), "num_columns"),
        (lambda: pack(normal(0, 64), 4), "weights"),
        (lambda: pack(normal(0, 2, 64), 5), "bits"),
        (lambda: pack(torch.full((2, 64), float("inf")), 4), "weights"),
        (lambda: unpack(dataclasses.replace(good, num_columns=320)), "packed.words"),
        (lambda: unpack(dataclasses.replace(good, words=good.words.long())), "packed.words"),
        (lambda: unpack(dataclasses.replace(good, codes=good.codes[:, :, :1])), "packed.codes"),
        (lambda: unpack(dataclasses.replace(good, row_scale=good.row_scale.double())), "packed.row_scale"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert refusal.value.field == field


@pytest.mark.parametrize("bits", BITS)
def test_a_fitted_zero_point_leaves_no_more_error_over_in_any_group(bits):
    weights = normal(4, 2, 24, 384) * torch.linspace(0.1, 3, 384) + 0.05
    group = packed_format(bits).group

    def errors(rounding):
        return (unpack(pack(weights, bits, rounding)) - weights).square().unflatten(-1, (-1, group)).sum(-1)

    nearest, fitted = errors("nearest"), errors("half-quadratic")
    assert bool((fitted <= nearest * (1 + 1e-5)).all())
    assert float(fitted.sum()) < float(nearest.sum())


def test_roundings_are_known_by_name():
    with pytest.raises(InputError, match="half-quadratic"):
        pack(normal(0, 2, 64), 4, "up")
