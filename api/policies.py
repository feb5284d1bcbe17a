"""What a policy file imports: how rules are registered, what they return, what they see.

Modelled: nothing of its own; the rules stand in `sim.policies.rules`. Ignored: how a file is run (`--policy`, `simulate(policy=…)`).
"""

from __future__ import annotations

from ..sim.policies.rules import (
    CORES,
    FETCH,
    Expert,
    Guess,
    Miss,
    Now,
    merit,
    miss_choice,
    prefetch_score,
    victim_score,
)

__all__ = [
    "CORES",
    "FETCH",
    "Expert",
    "Guess",
    "Miss",
    "Now",
    "merit",
    "miss_choice",
    "prefetch_score",
    "victim_score",
]
