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
    COPY_NS, IN_HOST, ITEM_EXPERT, ITEM_FORMAT, ITEM_KEY, ITEM_TOKENS, MISS_BALANCED, MISS_CPU, ON_CORES, ON_DEVICE,
    SIZE_CPU, SIZE_ITEMS,
    Decision, PolicyConfig, PolicyState,
)  # fmt: skip


@jit_inner
def send_misses_to_cores(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> int:
    """Move the misses that the cores compute from the items to the cores' list, keeping both orders; return how many."""
    # Misses are not waiting yet: the column ITEM_KEY holds the choice until they are.
    keys, prices, work_ns, items, cores, size = state.keys, state.prices, state.work_ns, out.items, out.cores, out.size
    for at in range(num_hits, size[SIZE_ITEMS]):
        items[at, ITEM_KEY] = int(config.miss == MISS_CPU)
        if config.miss != MISS_CPU and keys[IN_HOST, base + items[at, ITEM_EXPERT]]:
            fmt, tokens = items[at, ITEM_FORMAT], items[at, ITEM_TOKENS]
            fetched = prices[fmt, COPY_NS] + work_ns[fmt, tokens, ON_DEVICE]
            items[at, ITEM_KEY] = int(config.miss != MISS_BALANCED and work_ns[fmt, tokens, ON_CORES] < fetched)
    if config.miss == MISS_BALANCED:
        _balance(state, out, base, num_hits)
    kept = num_hits
    for at in range(num_hits, size[SIZE_ITEMS]):
        if items[at, ITEM_KEY]:
            place = size[SIZE_CPU]
            cores[place, ITEM_EXPERT] = items[at, ITEM_EXPERT]
            cores[place, ITEM_TOKENS] = items[at, ITEM_TOKENS]
            cores[place, ITEM_FORMAT] = items[at, ITEM_FORMAT]
            size[SIZE_CPU] = place + 1
        else:
            items[kept, ITEM_EXPERT] = items[at, ITEM_EXPERT]
            items[kept, ITEM_TOKENS] = items[at, ITEM_TOKENS]
            items[kept, ITEM_FORMAT] = items[at, ITEM_FORMAT]
            kept += 1
    size[SIZE_ITEMS] = kept
    return int(size[SIZE_CPU])


@jit_inner
def _balance(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark misses for the cores, fewest tokens first, while the later end of cores and link comes forward."""
    keys, prices, work_ns, items, size = state.keys, state.prices, state.work_ns, out.items, out.size
    link = cores = 0
    for at in range(num_hits, size[SIZE_ITEMS]):
        link += prices[items[at, ITEM_FORMAT], COPY_NS]
    while True:
        best = -1
        for at in range(num_hits, size[SIZE_ITEMS]):
            open_ = items[at, ITEM_KEY] == 0 and keys[IN_HOST, base + items[at, ITEM_EXPERT]] == 1
            if open_ and (best < 0 or items[at, ITEM_TOKENS] < items[best, ITEM_TOKENS]):
                best = at
        if best < 0:
            return
        fmt = items[best, ITEM_FORMAT]
        there = cores + work_ns[fmt, items[best, ITEM_TOKENS], ON_CORES]
        if max(there, link - prices[fmt, COPY_NS]) >= max(cores, link):
            return
        items[best, ITEM_KEY] = 1
        cores = there
        link -= prices[fmt, COPY_NS]
