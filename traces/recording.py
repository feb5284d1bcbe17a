"""The two nouns of this room: a recording of every choice of experts, and a recording of expert loads alone.

Modelled: which experts each token of each request chose in each MoE layer, with the router's weights and early guesses
where they were recorded; or, for sources that only counted, how many tokens each expert got. Ignored: the text itself,
timings, and everything a model computes besides routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PREFILL, DECODE = 0, 1  # values of RoutingTrace.phase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Every expert choice of a recording, one row per token, sorted by request and then by position.

    Arrays may be memory-mapped and read-only. `experts[t, l]` keeps the order in which the source recorded the choices.
    """

    experts: npt.NDArray[np.unsignedinteger]
    """uint8 or uint16 [num_tokens, num_layers, top_k]: logical expert ids."""
    request: npt.NDArray[np.int32]
    """int32 [num_tokens]: the request a token belongs to; not decreasing."""
    position: npt.NDArray[np.int32]
    """int32 [num_tokens]: position in the sequence; strictly increasing within a request."""
    phase: npt.NDArray[np.uint8]
    """uint8 [num_tokens]: 0 prefill, 1 decode; decode never precedes prefill within a request."""
    num_experts: int
    """Logical experts per MoE layer."""
    model: str
    """Model name, or "" when unknown."""
    layer_ids: tuple[int, ...]
    """Model layer of each column, strictly increasing; dense layers are left out."""
    source: str
    """Where the recording comes from."""
    licence: str
    """Licence of the recording, or "" when unknown."""
    weights: npt.NDArray[np.float16] | None = None
    """float16 [num_tokens, num_layers, top_k]: what the router gave each choice, as recorded."""
    predicted: npt.NDArray[np.int16] | None = None
    """int16 [num_tokens, num_layers, distance, width]: `[t, l, d - 1]` = guesses for column l made d columns earlier,
    best first; −1 where there is none (always where l < d)."""
    predicted_prob: npt.NDArray[np.float16] | None = None
    """float16, shaped like `predicted`: the probability the early gate gave each guess; 0 where there is none."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further strings, e.g. "domains" as JSON."""

    @property
    def num_tokens(self) -> int:
        """Number of rows."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """Number of MoE layers recorded."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts chosen per token and layer."""
        return int(self.experts.shape[2])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadProfile:
    """Tokens per expert from a source that recorded counts only: no order, no request, no co-occurrence is known."""

    counts: npt.NDArray[np.int64]
    """int64 [num_layers, num_experts]: tokens that chose each expert."""
    model: str
    """Model name, or "" when unknown."""
    layer_ids: tuple[int, ...]
    """Model layer of each row, strictly increasing; dense layers are left out."""
    source: str
    """Where the recording comes from."""
    licence: str
    """Licence of the recording, or "" when unknown."""
    top_k: int | None = None
    """Experts chosen per token, where the source says."""
    windows: npt.NDArray[np.int64] | None = None
    """int64 [num_windows, num_layers, num_experts].

    The same counts split over time, requests or ranks; sums to `counts`.
    """
    window_unit: str = ""
    """What one window is ("forward pass", "iteration", "request", …), "" without windows."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further strings."""

    @property
    def num_layers(self) -> int:
        """Number of MoE layers recorded."""
        return int(self.counts.shape[0])

    @property
    def num_experts(self) -> int:
        """Logical experts per MoE layer."""
        return int(self.counts.shape[1])
