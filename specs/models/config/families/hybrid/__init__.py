"""Families that mix attention with layers of another kind: recurrent, convolved, linear or narrow.

A new one is a file with `FAMILIES = {model_type: Family(...)}` and its name in `_FILES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...family import Family
from . import bailing, kimi, lfm, minimax, nemotron, qwen_next, zaya

_FILES = (bailing, kimi, lfm, minimax, nemotron, qwen_next, zaya)

FAMILIES: Mapping[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
