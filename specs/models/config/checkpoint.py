"""What a checkpoint's quantiser wrote, as the rules of each quantiser ask for it: widths, groups, and which modules are meant.

Modelled: names that a module of either kind has in some published checkpoint, patterns as quantisers write them. Ignored: what a
quantiser does with its fields (`quantisation`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....base.errors import InputError

# Names that a module of either kind has in some published checkpoint: what patterns are tried on.
_EXPERT = (
    "model.layers.{n}.mlp.experts.0.gate_proj", "model.layers.{n}.mlp.experts.0.down_proj", "model.layers.{n}.mlp.experts",
    "model.layers.{n}.mlp.experts.gate_up_proj", "layers.{n}.ffn.experts.0.w1",
    "model.layers.{n}.block_sparse_moe.experts.0.w1", "model.language_model.layers.{n}.mlp.experts.0.gate_proj",
    "language_model.model.layers.{n}.mlp.experts.0.gate_proj", "language_model.layers.{n}.feed_forward.experts.0.gate_proj",
    "backbone.layers.{n}.mixer.experts.0.up_proj", "model.layers.{n}.feed_forward.experts.0.w1",
    "language_model.model.layers.{n}.feed_forward.experts.gate_up_proj",
)  # fmt: skip


_ATTENTION = (
    "model.layers.{n}.self_attn.q_proj", "model.layers.{n}.self_attn.o_proj", "model.layers.{n}.self_attn.kv_b_proj",
    "model.layers.{n}.self_attn.q_b_proj", "model.layers.{n}.self_attn", "layers.{n}.attn.wq_b",
    "model.language_model.layers.{n}.self_attn.q_proj", "language_model.model.layers.{n}.self_attn.q_proj",
    "backbone.layers.{n}.mixer.q_proj",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the rules below need to know."""

    table: Mapping[str, Any]
    plain: str
    """Format of modules that are left alone."""
    row_weights: int
    """Weights of an expert's matrices that share a scale when each row has one."""
    matrix_weights: int
    """Weights of one matrix of an expert."""
    moe_layer: int
    where: str
    key: str = "quantization_config"

    def refuse(self, field_name: str, value: object, rule: str) -> InputError:
        """Return the error of a field of the quantiser's table."""
        return InputError(
            f"{self.where}: {self.key}.{field_name}",
            value,
            rule,
            "remove it and name the format with moeplan plan --bits",
        )

    def bits(self, value: object, field_name: str = "bits") -> int:
        """Return a width; raises InputError for anything but 2 to 8."""
        if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
            raise self.refuse(field_name, value, "not a width of 2 to 8 bits")
        return value

    def group(self, value: object, field_name: str = "group_size") -> int:
        """Return the weights that share a scale: −1 and none stand for a row."""
        if value is None or value == -1:
            return self.row_weights
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**9:
            raise self.refuse(field_name, value, "not a number of weights")
        return value

    def named(self, kind: str) -> list[str]:
        """Return names that a module of `kind` may have."""
        return [name.format(n=self.moe_layer) for name in (_EXPERT if kind == "experts" else _ATTENTION)]


def listed(facts: Checkpoint, *fields: str) -> list[str]:
    """Return the names and patterns of modules under `fields`; raises InputError for anything but a list of text."""
    found: list[str] = []
    for field_name in fields:
        value = facts.table.get(field_name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise facts.refuse(field_name, value, "not a list of modules")
        found += value
    return found


def matches(pattern: str, module: str) -> bool:
    """Return whether a name or pattern of a quantiser means `module`."""
    if pattern.startswith("re:"):
        return searches(pattern[3:], module, whole=True)
    if any(mark in pattern for mark in "*?["):
        return fnmatch.fnmatchcase(module, pattern)
    return pattern == module or module.startswith(pattern + ".") or f".{pattern}." in f".{module}."


def searches(pattern: str, module: str, *, whole: bool = False) -> bool:
    """Return whether a regular expression finds a module's name, or is it; one that is none finds nothing."""
    try:
        return (re.match if whole else re.search)(pattern, module) is not None
    except re.error:
        return False


def left_out(facts: Checkpoint, kind: str, *fields: str) -> bool:
    """Return whether modules of `kind` are left as they were."""
    patterns = listed(facts, *fields)
    return any(matches(pattern, module) for pattern in patterns for module in facts.named(kind))


def same_module(pattern: str, module: str) -> bool:
    """Return whether two names differ in numbers only: layers and experts are listed one by one."""
    return re.sub(r"\d+", "0", pattern) == re.sub(r"\d+", "0", module)
