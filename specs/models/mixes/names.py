"""Every name of a mix, and what experts take by it where no model is at hand.

Modelled: the recipe of llama.cpp or of its fork, applied to a plain model (48 layers, 128 experts, 8 heads that share keys and values), or
what files of a dynamic mix come to. Ignored: shapes of a model; `stored` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from .. import gguf_types as gguf
from . import ik_llama_cpp, llama_cpp, unsloth
from .tensors import EXPERTS, Matrix, Shape

_PLAIN = Shape(num_layers=48, num_experts=128, heads_per_kv=8, tied=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What a name stands for."""

    name: str
    experts: Fraction
    """Bits per weight of experts in a plain model."""
    dynamic: unsloth.Dynamic | None
    """What files come to, where no recipe is published."""
    source: str

    @property
    def exact(self) -> bool:
        """Whether the name is a published recipe."""
        return self.dynamic is None

    def types(self, shape: Shape, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, str]]:
        """Yield each matrix with its type, by the recipe; rows that are no whole blocks have another one already."""
        mine = self.name in ik_llama_cpp.DEFAULTS
        for one, kind in (ik_llama_cpp if mine else llama_cpp).types(self.name, shape, matrices):
            yield one, fitting(kind, one.row, fork=mine)


def fitting(kind: str, row: int, *, fork: bool = False) -> str:
    """Return the type in which a matrix with rows of `row` weights is stored that is meant for `kind`."""
    found = gguf.named_type(kind)
    if found is None or row % found.block_weights == 0:
        return kind
    plain = found.name
    other = ({"Q5_K": "Q6_0"} | dict(ik_llama_cpp.FALLBACKS)).get(plain) if fork else None
    other = other or llama_cpp.FALLBACKS.get(plain, "F16")
    smaller = gguf.named_type(other)
    return other if smaller is not None and row % smaller.block_weights == 0 else "F16"


def num_bytes(kind: str, one: Matrix) -> int:
    """Return the bytes of a matrix stored as `kind`."""
    found = gguf.named_type(kind)
    size = None if found is None else found.num_bytes((one.row, one.rows))
    if size is None:
        raise ValueError(f"{one.name} of rows of {one.row} cannot be stored as {kind}")
    return size


@cache
def mix(name: str) -> Mix | None:
    """Return the mix called `name` (Q4_K_M, UD-Q2_K_XL, IQ4_KS, MXFP4_MOE …), None for another name."""
    upper = name.upper()
    if upper in unsloth.DYNAMIC:
        dynamic = unsloth.DYNAMIC[upper]
        return Mix(name=upper, experts=dynamic.experts, dynamic=dynamic, source=unsloth.SOURCE)
    mine = upper in ik_llama_cpp.DEFAULTS
    if not mine and upper not in llama_cpp.DEFAULTS and upper not in llama_cpp.RAISED:
        return None
    source = ik_llama_cpp.SOURCE if mine else llama_cpp.SOURCE
    found = Mix(name=upper, experts=Fraction(0), dynamic=None, source=source)
    weights = total = 0
    for one, kind in found.types(_PLAIN, _plain_matrices()):
        if one.name.endswith(EXPERTS):
            weights, total = weights + one.weights, total + num_bytes(kind, one)
    return Mix(name=upper, experts=Fraction(8 * total, weights), dynamic=None, source=source)


def mix_names() -> tuple[str, ...]:
    """Return the names of all mixes and types, for messages."""
    names = (llama_cpp.DEFAULTS, llama_cpp.RAISED, ik_llama_cpp.DEFAULTS, unsloth.DYNAMIC, gguf.type_names())
    return tuple(sorted({name for group in names for name in group}))


def _plain_matrices() -> Iterator[Matrix]:
    """Yield the experts of a model of whole blocks; rows are so long that a scale before them does not count."""
    for layer in range(_PLAIN.num_layers):
        for part in ("down", "gate", "up"):
            yield Matrix(name=f"ffn_{part}{EXPERTS}", layer=layer, row=1 << 20, rows=1, stacked=True)
