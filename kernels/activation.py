"""The functions between an expert's two matrices, as data that kernels, references and the CPU path share.

Modelled: gated functions of two halves (SwiGLU; the clamped variant of gpt-oss) and plain ones (GELU, ReLU). Ignored:
functions with learned parameters. The rows of a gated matrix are all gates first, then all ups, as transformers stores
`gate_up_proj`; gpt-oss checkpoints interleave the two and are reordered when they are loaded
(`expert_weights.deinterleave_gate_up`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..base.errors import UnknownName

NONE, SWIGLU, CLAMPED_SWIGLU, GELU, RELU = range(5)
"""Codes by which compiled kernels know the functions; NONE is the identity of a matrix without a function after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A function between an expert's matrices."""

    name: str
    code: int
    gated: bool
    """It takes two halves, gate and up."""
    alpha: float = 1.0
    """Factor inside the sigmoid of a gate."""
    limit: float = 0.0
    """Bound that gates (above) and ups (both sides) are clamped to; only read by clamped functions."""

    @property
    def halves(self) -> int:
        """Rows of the first matrix for each value that comes out."""
        return 2 if self.gated else 1


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        function.name: function
        for function in (
            Activation(name="swiglu", code=SWIGLU, gated=True),
            # alpha and limit: openai/gpt-oss-20b, config.json (`swiglu_limit`) and the model's MLP.
            Activation(name="clamped-swiglu", code=CLAMPED_SWIGLU, gated=True, alpha=1.702, limit=7.0),
            Activation(name="gelu", code=GELU, gated=False),
            Activation(name="relu", code=RELU, gated=False),
        )
    }
)
"""Every activation, by name."""


def activation(name: str) -> Activation:
    """Return the activation called `name`; raises UnknownName for any other."""
    found = ACTIVATIONS.get(name)
    if found is None:
        raise UnknownName("activation", name, ACTIVATIONS)
    return found
