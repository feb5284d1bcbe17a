"""Where a measured line's experts were: on the card, on the cores, or layer by layer on both.

Modelled: `--n-cpu-moe`, `--cpu-moe` and patterns of tensors' names (`-ot`) that put whole layers' experts on the cores. Ignored: layers
that are on the cores altogether, other tensors moved: not predicted, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ....calibrate.imports.bench_line import BenchLine
from ....specs.machines.profile import Profile
from ....specs.models import ModelSpec
from ..machine import NotExpressible

_MATRICES = ("gate", "up", "down")
_MOST_PATTERN, _MOST_REPEATS = 200, 6


def placement_of(line: BenchLine, model: ModelSpec, profile: Profile) -> Mapping[str, Any]:
    """Return where a line's experts are; raises NotExpressible for placements that are not predicted."""
    if profile.device.kind == "cpu":
        return {"kind": "cpu"}
    if line.gpu_layers is not None and 0 <= line.gpu_layers < model.num_layers:
        where = (
            "the cores alone" if line.gpu_layers == 0 else f"{line.gpu_layers} of {model.num_layers} layers on the card"
        )
        raise NotExpressible(f"{where} (-ngl {line.gpu_layers}): whole layers on the cores are not predicted")
    first = {layer for layer in model.moe_layers if layer < line.cpu_moe_layers}
    on_cores = len(first | _overridden(line, model))
    how = {} if line.uploads else {"prefill_compute": "cpu"}
    if not on_cores:
        return {"kind": "gpu"}
    if on_cores == model.num_moe_layers:
        return {"kind": "cpu-moe", **how}
    return {"kind": "n-cpu-moe", "cpu_layers": on_cores, **how}


def _overridden(line: BenchLine, model: ModelSpec) -> set[int]:
    """Return the layers whose experts patterns put on the cores; raises NotExpressible where they put anything else there."""
    if not line.overrides:
        return set()
    patterns = [(_pattern(pattern), buffer) for pattern, buffer in line.overrides]

    def place(name: str) -> str | None:
        return next((buffer for pattern, buffer in patterns if pattern.search(name)), None)

    found = set()
    for layer in range(model.num_layers):
        for other in (f"blk.{layer}.attn_q.weight", f"blk.{layer}.ffn_norm.weight", f"blk.{layer}.attn_output.weight"):
            if str(place(other) or "").upper().startswith("CPU"):
                raise NotExpressible("-ot puts more than experts on the cores")
        if layer not in model.moe_layers:
            continue
        places = {
            str(place(f"blk.{layer}.ffn_{matrix}_exps.weight") or "").upper().startswith("CPU") for matrix in _MATRICES
        }
        if len(places) > 1:
            raise NotExpressible("-ot puts a part of a layer's experts on the cores")
        if places == {True}:
            found.add(layer)
    return found


def _pattern(text: str) -> re.Pattern[str]:
    """Return a pattern of tensors' names; raises NotExpressible for what is none, or could take for ever."""
    repeats = len(re.findall(r"[*+{]", text))
    if len(text) > _MOST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)\s*[*+{]", text):
        raise NotExpressible("the pattern of -ot is too involved")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        raise NotExpressible("the pattern of -ot is none") from None
