"""OLMoE and FlexOlmo (Ai2).

Ignored: clipping of queries, keys and values.
"""

from ..family import Family

FAMILIES = {"olmoe": Family(qk_norm="full"), "flex_olmo": Family(qk_norm="full")}
