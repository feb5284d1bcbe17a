"""Where a missing expert runs: fetched to the device, or computed by the host's cores where it lies.

Modelled: `cpu` leaves every miss to the cores; `cheaper` compares, expert by expert, the cores with a copy and a launch
(Fiddler, arXiv 2402.07033); `balanced` divides a visit's misses so that the cores and the link end as early as they can
(HybriMoE, arXiv 2504.05897): experts with few tokens go to the cores, one by one, while that brings the later of the two
ends forward. Costs are the predicted ones. Ignored: experts that the cores would have to read from disk first; they are
fetched.
"""

from __future__ import annotations

from ...base.jit import jit_inner
from .state import (
    MISS_BALANCED, MISS_CPU, Decision, PolicyConfig, PolicyState,
)  # fmt: skip


@jit_inner
def send_misses_to_cores(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> int:
    """Move the misses that the cores compute from the items to the cores' list, keeping both orders; return how many."""
    # Misses are not waiting yet: their `key` holds the choice until they are.
    keys, prices, work_ns, items, cores, size = (
        state.keys,
        state.prices,
        state.work_ns,
        out.items,
        out.cores,
        out.size[0],
    )
    for at in range(num_hits, size.items):
        items[at].key = int(config.miss == MISS_CPU)
        if config.miss != MISS_CPU and keys[base + items[at].expert].in_host:
            fmt, tokens = items[at].format, items[at].tokens
            fetched = prices[fmt].copy_ns + work_ns[fmt, tokens].on_device
            items[at].key = int(config.miss != MISS_BALANCED and work_ns[fmt, tokens].on_cores < fetched)
    if config.miss == MISS_BALANCED:
        _balance(state, out, base, num_hits)
    kept = num_hits
    for at in range(num_hits, size.items):
        if items[at].key:
            place = size.cores
            cores[place].expert = items[at].expert
            cores[place].tokens = items[at].tokens
            cores[place].format = items[at].format
            size.cores = place + 1
        else:
            items[kept] = items[at]
            kept += 1
    size.items = kept
    return int(size.cores)


@jit_inner
def _balance(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark misses for the cores, fewest tokens first, while the later end of cores and link comes forward."""
    keys, prices, work_ns, items, size = state.keys, state.prices, state.work_ns, out.items, out.size[0]
    link = cores = 0
    for at in range(num_hits, size.items):
        link += prices[items[at].format].copy_ns
    while True:
        best = -1
        for at in range(num_hits, size.items):
            open_ = items[at].key == 0 and keys[base + items[at].expert].in_host == 1
            if open_ and (best < 0 or items[at].tokens < items[best].tokens):
                best = at
        if best < 0:
            return
        fmt = items[best].format
        there = cores + work_ns[fmt, items[best].tokens].on_cores
        if max(there, link - prices[fmt].copy_ns) >= max(cores, link):
            return
        items[best].key = 1
        cores = there
        link -= prices[fmt].copy_ns
