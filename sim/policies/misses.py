"""Where a missing expert runs: fetched to the device, or computed by the host's cores where it lies.

Modelled: `cpu` leaves every miss to the cores; `cheaper` compares, expert by expert, the cores with a copy and a launch
(Fiddler, arXiv 2402.07033); `balanced` divides a visit's misses so that the cores and the link end as early as they can
(HybriMoE, arXiv 2504.05897): experts with few tokens go to the cores, one by one, while that brings the later of the two
ends forward. Costs are the predicted ones. Ignored: experts that the cores would have to read from disk first; they are
fetched.
"""

from __future__ import annotations

from ...jit import jit_lean
from .state import (
    MISS_BALANCED, MISS_CPU, SIZE_CPU, SIZE_ITEMS,
    Decision, PolicyConfig, PolicyState,
)  # fmt: skip


@jit_lean
def send_misses_to_cores(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> int:
    """Move the misses that the cores compute from the items to the cores' list, keeping both orders; return how many."""
    chosen = out.item_wait_key  # misses are not waiting yet: the column holds the choice until they are
    for at in range(num_hits, out.size[SIZE_ITEMS]):
        chosen[at] = int(config.miss == MISS_CPU)
        if config.miss != MISS_CPU and state.in_host[base + out.item_expert[at]]:
            fmt, tokens = out.item_format[at], out.item_tokens[at]
            fetched = state.prices.copy_ns[fmt] + state.prices.device_ns[fmt, tokens]
            chosen[at] = int(config.miss != MISS_BALANCED and state.prices.cpu_ns[fmt, tokens] < fetched)
    if config.miss == MISS_BALANCED:
        _balance(state, out, base, num_hits)
    kept = num_hits
    for at in range(num_hits, out.size[SIZE_ITEMS]):
        if chosen[at]:
            place = out.size[SIZE_CPU]
            out.cpu_expert[place] = out.item_expert[at]
            out.cpu_tokens[place] = out.item_tokens[at]
            out.cpu_format[place] = out.item_format[at]
            out.size[SIZE_CPU] = place + 1
        else:
            out.item_expert[kept] = out.item_expert[at]
            out.item_tokens[kept] = out.item_tokens[at]
            out.item_format[kept] = out.item_format[at]
            kept += 1
    out.size[SIZE_ITEMS] = kept
    return int(out.size[SIZE_CPU])


@jit_lean
def _balance(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark misses for the cores, fewest tokens first, while the later end of cores and link comes forward."""
    chosen = out.item_wait_key
    link = cores = 0
    for at in range(num_hits, out.size[SIZE_ITEMS]):
        link += state.prices.copy_ns[out.item_format[at]]
    while True:
        best = -1
        for at in range(num_hits, out.size[SIZE_ITEMS]):
            open_ = chosen[at] == 0 and state.in_host[base + out.item_expert[at]] == 1
            if open_ and (best < 0 or out.item_tokens[at] < out.item_tokens[best]):
                best = at
        if best < 0:
            return
        fmt = out.item_format[best]
        there = cores + state.prices.cpu_ns[fmt, out.item_tokens[best]]
        if max(there, link - state.prices.copy_ns[fmt]) >= max(cores, link):
            return
        chosen[best] = 1
        cores = there
        link -= state.prices.copy_ns[fmt]
