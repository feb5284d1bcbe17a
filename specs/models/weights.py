"""How weight matrices are stored: a name, the bits of a value, and what packing and metadata add to it.

Modelled: the formats that kernels run, by short names; those that checkpoints come in, by names that say them: `int4-g128`,
`int4-g128-zero`, `fp8-g16384`, `nvfp4`, `mxfp8`, `nf4-g64` … (value, weights that share a scale, what else is stored).
Ignored: padding at the end of a row, constants of a whole matrix or of one row of it where groups are shorter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from types import MappingProxyType

from ...base.errors import UnknownName
from . import gguf_types as gguf
from .mixes.names import mix as find_mix

BITS_PER_BYTE = 8
_CODEBOOK = re.compile(r"(?:UD-)?IQ[123]_(?:XXS|XS|S|M)(?![A-Z0-9]|_R)", re.IGNORECASE)
_REPACKED = re.compile(r"Q4_0(?![A-Z0-9_])", re.IGNORECASE)
_DECIMALS = 10**12
"""Names of formats state bits of a weight to a part in so many."""
_PLAIN_DENOMINATOR = 10**7
"""Blocks and groups have smaller ones; a larger one is of a decimal that was cut off."""
# Norms, biases, routers and embeddings are never stored below this width, whatever the experts use (arXiv 2312.17238 §3.3).
_UNQUANTISED_BITS = 16
# A multiplication and an addition for every weight a token meets.
FLOPS_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way of storing weight matrices."""

    name: str
    """What the command line calls it."""
    bits: int
    """Width of one stored value."""
    bits_per_weight: Fraction
    """Storage of one weight, packing and quantisation metadata included."""
    group: int | None
    """Weights that share a scale; None for unquantised formats."""
    description: str
    source: str
    """Where packing and metadata are documented."""
    like: str | None = None
    """The format, of those that profiles measure, whose expansion costs a kernel as much; None: this one is among them."""
    embedding_bits: Fraction | None = None
    """Bits of a weight of the token embedding, where it is stored in its own way beside matrices of this format; None: 16 or more."""
    head_bits: Fraction | None = None
    """The same of the output matrix."""

    @property
    def quantised(self) -> bool:
        """Whether weights are expanded before they are multiplied."""
        return self.group is not None

    def num_bytes(self, num_weights: int) -> int:
        """Return the bytes of a matrix of `num_weights`, rounded up to whole bytes."""
        return _whole_bytes(self.bits_per_weight, num_weights)

    def vector_bytes(self, num_values: int) -> int:
        """Return the bytes of values that stay unquantised (norms, biases, routers, embeddings) beside such matrices."""
        return num_values * max(self.bits, _UNQUANTISED_BITS) // BITS_PER_BYTE

    def embedding_bytes(self, num_values: int) -> int:
        """Return the bytes of a token embedding of `num_values` beside such matrices."""
        return self._outer_bytes(self.embedding_bits, num_values)

    def head_bytes(self, num_values: int) -> int:
        """Return the bytes of an output matrix of `num_values` beside such matrices."""
        return self._outer_bytes(self.head_bits, num_values)

    def _outer_bytes(self, bits: Fraction | None, num_values: int) -> int:
        return self.vector_bytes(num_values) if bits is None else _whole_bytes(bits, num_values)


def _whole_bytes(bits: Fraction, count: int) -> int:
    """Return the bytes of `count` values, rounded up, but for what names of formats lose beyond their last decimal."""
    exact = bits * count / BITS_PER_BYTE
    nearest, cut_off = round(exact), bits.denominator > _PLAIN_DENOMINATOR
    return nearest if cut_off and abs(exact - nearest) * _DECIMALS * BITS_PER_BYTE <= count else math.ceil(exact)


# HQQ stores a scale and a zero point of 8 bits for each group of weights; those are quantised themselves, with two 16-bit
# constants for each 128 of them.
_SCALES_PER_GROUP = 2
_SCALE_BITS = 8
_SCALE_GROUP = 128
_SCALE_OF_SCALES_BITS = 2 * 16
_HQQ = "HQQ packing as used by Mixtral-offloading (arXiv 2312.17238 §3.3; github.com/mobiusml/hqq)"


def _hqq(bits: int, packed_bits: Fraction, group: int, description: str) -> WeightFormat:
    """Return an HQQ format; `packed_bits` is what a value takes after packing."""
    scale_bits = _SCALE_BITS + Fraction(_SCALE_OF_SCALES_BITS, _SCALE_GROUP)
    return WeightFormat(
        name=str(bits), bits=bits, bits_per_weight=packed_bits + _SCALES_PER_GROUP * scale_bits / group, group=group,
        description=description, source=_HQQ,
    )  # fmt: skip


def _plain(bits: int, description: str) -> WeightFormat:
    return WeightFormat(
        name=str(bits),
        bits=bits,
        bits_per_weight=Fraction(bits),
        group=None,
        description=description,
        source="IEEE 754; bfloat16",
    )


WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            _plain(32, "float32"),
            _plain(16, "float16 or bfloat16"),
            WeightFormat(
                name="8", bits=8, bits_per_weight=8 + Fraction(32, 128 * 128), group=128 * 128,
                description="8-bit values, one float32 scale per 128x128 block",
                source="DeepSeek-V3 technical report §3.3.2 (arXiv 2412.19437)",
            ),
            _hqq(4, Fraction(4), 64, "4-bit values in groups of 64, two per byte"),
            WeightFormat(
                name="mxfp4", bits=4, bits_per_weight=4 + Fraction(8, 32), group=32,
                description="4-bit floating point in blocks of 32 with an 8-bit exponent",
                source="OCP Microscaling Formats (MX) Specification v1.0 §5",
            ),
            _hqq(3, Fraction(32, 10), 64, "3-bit values in groups of 64, ten per int32"),
            _hqq(2, Fraction(2), 16, "2-bit values in groups of 16, four per byte"),
        )
    }
)  # fmt: skip
"""Every way of storing expert weights that can be chosen, by name."""

_CHECKPOINT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            WeightFormat(
                name="nvfp4", bits=4, bits_per_weight=4 + Fraction(8, 16), group=16, like="mxfp4",
                description="4-bit floating point in blocks of 16 with an 8-bit scale",
                source="NVIDIA TensorRT Model Optimizer, NVFP4 (block size 16, FP8 scales)",
            ),
            WeightFormat(
                name="mxfp8", bits=8, bits_per_weight=8 + Fraction(8, 32), group=32, like="8",
                description="8-bit floating point in blocks of 32 with an 8-bit exponent",
                source="OCP Microscaling Formats (MX) Specification v1.0 §5",
            ),
        )
    }
)  # fmt: skip
# What stands beside the values in formats that quantisers write: bits of a scale, bits of a bias, what it is, who writes it so.
_STORED: Mapping[str, tuple[int, int, str, str]] = MappingProxyType(
    {
        "int": (16, 0, "integers with a 16-bit scale", "checkpoints of compressed-tensors, GPTQ and AWQ"),
        "fp": (32, 0, "floats with a 32-bit scale", "transformers FineGrainedFP8Config; compressed-tensors"),
        "nf": (32, 0, "normal floats with a 32-bit largest value", "bitsandbytes, bnb_4bit_quant_type"),
        "nfd": (8, 0, "normal floats with an 8-bit largest value, itself quantised", "bitsandbytes, double quantisation"),
        "mlx": (16, 16, "integers with a 16-bit scale and a 16-bit bias", "mlx.core.quantize (affine)"),
    }
)  # fmt: skip
_STORED_NAME = re.compile(r"(int|fp|nfd|nf|mlx)([2-8])-g([1-9][0-9]{0,9})(-zero)?")
# bitsandbytes quantises the largest values of blocks in blocks of 256 with a 32-bit constant (its functional.py).
_DOUBLE_QUANT_BLOCK = 256


@cache
def _checkpoint_format(name: str) -> WeightFormat | None:
    """Return a format of checkpoints: `nvfp4`, `mxfp8`, or one whose name says it (`int4-g128-zero`); None for another name."""
    found = _STORED_NAME.fullmatch(name)
    if found is None:
        return _CHECKPOINT_FORMATS.get(name)
    kind, bits, group = found[1], int(found[2]), int(found[3])
    scale, bias, what, source = _STORED[kind]
    beside = Fraction(scale + bias + (bits if found[4] else 0), group)
    if kind == "nfd":
        beside += Fraction(32, group * _DOUBLE_QUANT_BLOCK)
    return WeightFormat(
        name=name, bits=bits, bits_per_weight=bits + beside, group=group, like="8" if bits > 4 else str(bits),
        description=f"{bits}-bit {what}{' and a zero point' if found[4] else ''} for {group} weights", source=source,
    )  # fmt: skip


@cache
def _gguf_format(name: str) -> WeightFormat | None:
    """Return a type of GGUF files (Q4_K, IQ4_XS, MXFP4), or what a mix of them (Q4_K_M) stores experts in; None for another name."""
    mix, block = find_mix(name), gguf.block_bits(name)
    if mix is not None:
        bits, group, per_weight, source = round(mix.experts), None, mix.experts, mix.source
        what = "mix, as its experts are stored"
        if mix.dynamic is not None:
            what = (
                f"mix without a published recipe: {float(per_weight):.4g} bits per weight, ± {mix.dynamic.spread:.0%}"
            )
    elif block is not None:
        bits, per_weight, group = block
        what, source = f"blocks of {group}", gguf.source()
    else:
        return None
    like = "8" if bits > 4 else str(max(bits, 2))
    return WeightFormat(
        name=name, bits=max(bits, 2), bits_per_weight=per_weight, group=group or 256, like=like,
        description=f"GGUF {name.upper()}: {what}", source=source,
    )  # fmt: skip


_NUMBER = r"([0-9]{1,2}(?:\.[0-9]{1,12})?)"
_STATED = re.compile(rf"(?:([A-Za-z0-9][A-Za-z0-9_.-]{{0,39}})@)?{_NUMBER}bpw(?:-e{_NUMBER}-h{_NUMBER})?")
_MOST_STATED_BITS = 40
"""Matrices of 32 bits, with what norms and biases take above the 16 bits that are counted for them."""


def is_codebook(name: str) -> bool:
    """Return whether a format's blocks are looked up in a codebook (llama.cpp's IQ1_S to IQ3_S, in files of any mix)."""
    return _CODEBOOK.match(name) is not None


def is_repacked(name: str) -> bool:
    """Return whether llama.cpp lays a format's blocks out anew for matrix instructions of Arm's cores (`ggml-cpu/repack.cpp`: Q4_0)."""
    return _REPACKED.match(name) is not None


def stated_format(
    per_weight: Fraction, embedding: Fraction | None = None, head: Fraction | None = None
) -> WeightFormat:
    """Return a format of which only the bits of a weight are known, and those of the token embedding and the output matrix."""
    outer = "" if embedding is None or head is None else f"-e{_decimal(embedding)}-h{_decimal(head)}"
    return weight_format(f"{_decimal(per_weight)}bpw{outer}")


def _decimal(bits: Fraction) -> str:
    return f"{float(bits):.12f}".rstrip("0").rstrip(".")


@cache
def _stated_format(name: str) -> WeightFormat | None:
    """Return a format of which only the bits of a weight are known (`4.58bpw`), those of the token embedding and the output matrix
    where they are given too (`4.58bpw-e4.5-h6.5625`), and what a file calls it (`Q4_K_M@4.85bpw`); None for another name.
    """
    found = _STATED.fullmatch(name)
    if found is None:
        return None
    per_weight, embedding, head = (None if one is None else Fraction(one) for one in found.groups()[1:])
    if per_weight is None or any(
        one is not None and not 1 <= one <= _MOST_STATED_BITS for one in (per_weight, embedding, head)
    ):
        return None
    outer = "" if found[3] is None else f"; token embedding {float(found[3]):.4g}, output matrix {float(found[4]):.4g}"
    what = f"{float(per_weight):.4g} bits per weight{outer}"
    base = None if found[1] is None else _known_format(found[1])
    if base is not None:
        return dataclasses.replace(
            base, name=name, bits_per_weight=per_weight, description=f"{base.description.split(':')[0]}; as stored {what}",
            embedding_bits=embedding, head_bits=head,
        )  # fmt: skip
    if found[1] is not None:
        return None
    bits = max(2, min(16, round(per_weight)))
    return WeightFormat(
        name=name, bits=bits, bits_per_weight=per_weight, group=256, like="8" if bits > 4 else str(bits), description=what,
        source="a mix of types, or given by the user", embedding_bits=embedding, head_bits=head,
    )  # fmt: skip


def _known_format(name: str) -> WeightFormat | None:
    """Return the format of which `name` alone says everything, None for another name."""
    return WEIGHT_FORMATS.get(name) or _checkpoint_format(name) or _gguf_format(name)


def format_with_bits(
    name: str, per_weight: Fraction, embedding: Fraction | None = None, head: Fraction | None = None
) -> WeightFormat:
    """Return the format called `name` with the bits of a weight that files come to, and of the outer matrices where they are given."""
    stated, base = stated_format(per_weight, embedding, head), weight_format(name)
    return (
        base
        if head is None and stated.bits_per_weight == base.bits_per_weight
        else weight_format(f"{name}@{stated.name}")
    )


def weight_format(name: str | int) -> WeightFormat:
    """Return the weight format called `name` ("16", 4, "mxfp4", "int4-g128"); raises UnknownName for any other."""
    found = _known_format(str(name)) or _stated_format(str(name))
    if found is None:
        raise UnknownName("bits", name, WEIGHT_FORMATS)
    return found
