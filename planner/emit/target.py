"""What an engine's module offers: its table, and for each kind of plan it takes a rendering and a check.

Modelled: the two kinds of plans. Ignored: which engines there are (`targets`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...specs.models import ModelSpec
from .choices import Emission, EpChoice, OffloadChoice, Placement
from .table import EngineTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelTarget:
    """How an engine takes expert-parallel plans."""

    render: Callable[[EpChoice, ModelSpec], Emission]
    check: Callable[[Mapping[str, str], ModelSpec], Placement | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadTarget:
    """How an engine takes offload plans."""

    render: Callable[[OffloadChoice, ModelSpec], Emission]
    check: Callable[[Mapping[str, str], ModelSpec], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine that plans can be written for."""

    table: EngineTable
    parallel: ParallelTarget | None = None
    offload: OffloadTarget | None = None
    readable: bool = False
    """Its files hold node counts too, so that a placement read back is the one that was written."""
