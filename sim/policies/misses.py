"""Where a missing expert runs: fetched to the device, or computed by the host's cores where it lies.

Modelled: a rule says it of each miss, those with the fewest tokens first where the rule looks at what the others do (`bundled` has
`cpu`, `cheaper` and `balanced`; a policy file may have its own). Costs are the predicted ones. Where the host's memory is a
cache above a disk, what the cores use is its most recent too: under `cpu` they read what it lacks, under the other rules they compute
only what it has. Ignored: what reading costs, in rules that weigh costs.
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner
from .bundled import always_cores, balanced, cheaper
from .custom import ask_miss
from .host_tier import use_from_host
from .rules import CORES, FETCH, Miss
from .state import MISS_BALANCED, MISS_CHEAPER, MISS_CPU, MISS_CUSTOM, Decision, PolicyConfig, PolicyState

_OPEN = -1


@jit_inner
def send_misses_to_cores(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> int:
    """Move the misses that the cores compute from the items to the cores' list, keeping both orders; return how many."""
    # Misses are not waiting yet: their `key` holds the choice until they are.
    items, cores, size = out.items, out.cores, out.size[0]
    _choose(config, state, out, base, num_hits)
    kept = num_hits
    for at in range(num_hits, size.items):
        if items[at].key == CORES:
            place = size.cores
            cores[place].expert = items[at].expert
            cores[place].tokens = items[at].tokens
            cores[place].format = items[at].format
            cores[place].read = use_from_host(config, state, base + items[at].expert)
            size.cores = place + 1
        else:
            items[kept] = items[at]
            kept += 1
    size.items = kept
    return int(size.cores)


@jit_inner
def _choose(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Write FETCH or CORES into the `key` of every miss."""
    keys, prices, work_ns, items, num_items = state.keys, state.prices, state.work_ns, out.items, out.size[0].items
    layer = base // config.num_experts
    if config.miss == MISS_CPU:
        for at in range(num_hits, num_items):
            items[at].key = CORES
        return
    link = busy = fetched = 0
    for at in range(num_hits, num_items):
        link += prices[items[at].format].copy_ns
        items[at].key = _OPEN if keys[base + items[at].expert].in_host == 1 else FETCH
    ordered = config.miss == MISS_BALANCED or config.miss >= MISS_CUSTOM
    for turn in range(num_hits, num_items):
        best = -1 if ordered else turn
        if ordered:  # the fewest tokens first, equals as recorded
            for at in range(num_hits, num_items):
                if items[at].key == _OPEN and (best < 0 or items[at].tokens < items[best].tokens):
                    best = at
            if best < 0:
                return
        elif items[turn].key != _OPEN:
            continue
        fmt, tokens = items[best].format, items[best].tokens
        copy, work = prices[fmt].copy_ns, work_ns[fmt, tokens]
        miss = Miss(layer=layer, expert=items[best].expert, tokens=tokens, copy_ns=copy, device_ns=work.on_device,
                    cores_ns=work.on_cores, link_ns=link, busy_ns=busy, fetched=fetched)  # fmt: skip
        items[best].key = _ask(config, state, miss)
        if items[best].key == CORES:
            busy += work.on_cores
            link -= copy
        else:
            fetched += 1


@jit_inline
def _ask(config: PolicyConfig, state: PolicyState, miss: Miss) -> int:
    if config.miss >= MISS_CUSTOM:
        return ask_miss(state, miss)
    if config.miss == MISS_CHEAPER:
        return cheaper(miss)
    if config.miss == MISS_BALANCED:
        return balanced(miss)
    return always_cores(miss)
