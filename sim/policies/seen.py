"""What rules see of the state, and who may leave the cache at all.

Modelled: values by name, copied from the records at the moment of a decision. Ignored: what is made of them (`caching`, `custom`).
"""

from __future__ import annotations

from ...base.jit import jit_inline
from ...base.records import Array
from .rules import Expert, Now

# Rounds of the search for a victim: first among experts that neither this layer step uses nor a guess awaits, then among awaited
# ones, last among the layer step's own.
FREE_ROUND, AWAITED_ROUND, OWN_ROUND, ALL_ROUNDS = range(4)


@jit_inline
def seen_expert(num_experts: int, keys: Array, key: int) -> Expert:
    """Return what rules see of an expert."""
    line = keys[key]
    return Expert(
        layer=int(key // num_experts), expert=int(key % num_experts), tokens=int(line.frequency), stay_tokens=int(line.stay_tokens),
        last_used=int(line.touched), next_use=int(line.next_use), merit=float(line.merit),
    )  # fmt: skip


@jit_inline
def seen_moment(num_layers: int, num_experts: int, pools: Array, pool: int, layer_step: int) -> Now:
    """Return what rules see of the moment."""
    return Now(
        layer_step=layer_step,
        layer=layer_step % num_layers,
        num_layers=num_layers,
        num_experts=num_experts,
        age=float(pools[pool].age),
    )


@jit_inline
def may_leave(keys: Array, key: int, layer_step: int, search: int) -> bool:
    """Return whether `key` may go in this round of the search."""
    if keys[key].touched == layer_step:
        return search == OWN_ROUND
    if keys[key].used == 0 and keys[key].target > layer_step:
        return search == AWAITED_ROUND
    return search == FREE_ROUND
