"""A model's weights under the name that a quantiser gives a file: the bytes of experts, of the rest and of the outer matrices.

Modelled: every matrix in its own type, vectors at 32 bits as GGUF files keep them; what that comes to is spread over the weights of a
kind. Other quantisers leave the token embedding and the output matrix at 16 bits; MLX does not. Ignored: that layers differ (experts
take the mean of the layers' types).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .. import gguf_types as gguf
from ..model import ModelSpec
from ..weights import BITS_PER_BYTE, WeightFormat, format_with_bits, stated_format, weight_format
from .names import fitting, mix, num_bytes
from .tensors import EMBEDDING, EXPERTS, HEAD, Matrix, matrices_of, shape_of

_COUNTED, _KEPT = 2, 4
"""Bytes of a vector's value: as it is counted beside matrices, and as files keep it."""

TRAINED_SMALL = {"mxfp4": "MXFP4_MOE"}
"""Formats that checkpoints are trained in and nobody stores whole models in: files that are called by one have experts in it, and
everything else at 8 bits."""


@dataclass(slots=True)
class _Part:
    weights: int = 0
    num_bytes: int = 0

    def add(self, one: Matrix, kind: str) -> None:
        self.weights += one.weights
        self.num_bytes += num_bytes(kind, one)

    def bits(self, vectors: int = 0) -> Fraction:
        """Return bits per weight, with what `vectors` values take in a file beyond what is counted for them."""
        total = self.num_bytes + vectors * (_KEPT - _COUNTED)
        return Fraction(BITS_PER_BYTE * total, self.weights) if self.weights else Fraction(16)


@lru_cache(maxsize=256)
def quantised_as(experts: str, dense: str | None, model: ModelSpec) -> tuple[WeightFormat, WeightFormat]:
    """Return how a file of `model` stores experts and everything else, by the names quantisers give them; raises UnknownName.

    dense: the name of everything else, where it is another.
    """
    if dense in (None, experts) and experts.lower() in TRAINED_SMALL:
        experts, dense = TRAINED_SMALL[experts.lower()], None
    name = experts if dense is None else dense
    of_experts, fmt = weight_format(experts), weight_format(name)
    found = _types(experts, model, whole=True)
    if found is not None:
        part, biases = _Part(), model.num_routed_experts * model.expert_vector_parameters
        for one, kind in found:
            if one.name.endswith(EXPERTS):
                part.add(one, kind)
        of_experts = format_with_bits(of_experts.name, part.bits(biases))
    elif (dynamic := mix(experts)) is not None:
        of_experts = weight_format(dynamic.name)
    found = _types(name, model, whole=name == experts)
    if found is not None:
        return of_experts, _rest(model, found)
    if (other := mix(name)) is not None and other.dynamic is not None:
        return of_experts, stated_format(other.dynamic.dense, other.dynamic.dense, Fraction(8 * 210, 256))
    if name.startswith("mlx"):
        return of_experts, stated_format(*(fmt.bits_per_weight,) * 3)
    return of_experts, fmt


def _rest(model: ModelSpec, types: Iterable[tuple[Matrix, str]]) -> WeightFormat:
    """Return the format of everything but experts."""
    parts = {EMBEDDING: _Part(), HEAD: _Part()}
    rest = _Part()
    for one, kind in types:
        if not one.name.endswith(EXPERTS):
            parts.get(one.name, rest).add(one, kind)
    embedding, head = parts[EMBEDDING], parts[HEAD]
    return stated_format(
        rest.bits(model.vector_parameters), embedding.bits(), (embedding if model.tied_embeddings else head).bits()
    )  # fmt: skip


def _types(name: str, model: ModelSpec, *, whole: bool) -> list[tuple[Matrix, str]] | None:
    """Return the type of every matrix; None for a name that is no recipe and no type of GGUF files.

    whole: the name is that of the file. Otherwise it is that of a part, and a type's name means that type everywhere.
    """
    found, one_type = mix(name), gguf.named_type(name) if gguf.block_bits(name) is not None else None
    if one_type is not None and (found is None or not whole):
        return [(one, fitting(one_type.name, one.row)) for one in matrices_of(model)]
    return (
        None if found is None or found.dynamic is not None else list(found.types(shape_of(model), matrices_of(model)))
    )
