"""Granite (IBM): experts, shared experts, Mamba-2 layers, windows.

Ignored: multipliers of residuals and logits.
"""

from ..family import Family

FAMILIES = {
    "granitemoe": Family(),
    "granitemoeshared": Family(defaults={"num_shared_experts": 1}),
    "granitemoehybrid": Family(defaults={"num_shared_experts": 1}, linear="mamba2"),
    "granitemoe_swa": Family(defaults={"num_shared_experts": 1}, sinks=True),
}
