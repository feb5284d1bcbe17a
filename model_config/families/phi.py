"""Phi-3.5-MoE (Microsoft).

Ignored: jitter of routers, how far positions stretch.
"""

from ..family import Family

FAMILIES = {"phimoe": Family(norm_width=2, window_everywhere=True)}
