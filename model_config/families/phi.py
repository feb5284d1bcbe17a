"""Phi-3.5-MoE (Microsoft)."""

from ..family import Family

FAMILIES = {"phimoe": Family(norm_width=2, window_everywhere=True)}
