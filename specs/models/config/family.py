"""What the code of a model family fixes and its configuration does not say: a table, and two hooks for what no table can say.

Modelled: names, defaults, norms, biases, gates, and what linear layers are. Ignored: sizes, which every configuration gives itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .keys import Keys


@dataclass(slots=True)
class Draft:
    """A model in the making: what `ModelSpec` will be built from, and what differs in single layers."""

    fields: dict[str, Any]
    """Arguments of `ModelSpec`."""
    differ: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Arguments of `LayerVariant`, by layer."""
    remarks: list[str] = field(default_factory=list)

    def vary(self, layers: Any, **changes: Any) -> None:
        """Set what differs in `layers`; counts of parameters add to what is there."""
        for layer in layers:
            held = self.differ.setdefault(layer, {})
            for key, value in changes.items():
                held[key] = held.get(key, 0) + value if key.endswith("_parameters") else value

    @property
    def all_layers(self) -> range:
        """All decoder layers."""
        return range(self.fields["num_layers"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys a configuration may omit because they equal the family's own default."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that a family gives to what `read.NAMES` lists, in place of the usual ones."""
    harmless: tuple[str, ...] = ()
    """Keys that look like sizes and change none."""
    gated: bool = True
    expert_bias: bool = False
    dense_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    norm_width: int = 1
    num_norms: int = 2
    bias: str = "qkvo"
    """Projections that have a bias where the configuration asks for one."""
    qk_norm: str = "none"
    """Norms of queries and keys: none, head (one head wide), full (all heads wide) or option (as `use_qk_norm` says)."""
    sinks: bool = False
    gate: str = "none"
    """Output gate of attention: none, query (the query projection yields it), head (one value a head), full (one a value)."""
    window_everywhere: bool = False
    """Where `sliding_window` is set and no key says which layers have it, all have; other families are refused then."""
    linear: str = "delta"
    """What `linear_attention` layers are: delta, kda, kda-full, lightning, mamba or mamba2."""
    prepare: Callable[[Keys], None] | None = None
    """Puts the family's own spellings under the usual names, before anything is read."""
    finish: Callable[[Keys, Draft], None] | None = None
    """Adds what no table says, after everything else was read."""
    refused: str | None = None
    """Why models of this family cannot be described."""
