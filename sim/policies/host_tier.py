"""The host's memory as a cache above the disk: which experts must be read before they can be copied or computed by the cores.

Modelled: experts in order of recency; one that is copied or computed from here on is the most recent, one that must be read takes the
place of the least recent. Ignored: the file system's own cache, and experts that leave while their copy or turn on
the cores is still queued (the reader holds on to them).
"""

from __future__ import annotations

from ...base.jit import jit_inline
from .state import PolicyConfig, PolicyState


@jit_inline
def use_from_host(config: PolicyConfig, state: PolicyState, key: int) -> int:
    """Make `key` the host's most recent expert; return the number of the disk read it needs, -1 when it needs none."""
    keys, counts = state.keys, state.counts[0]
    if config.host_experts == 0:
        return -1
    sentinel = config.num_layers * config.num_experts
    read = -1
    if keys[key].in_host:
        before, after = keys[key].host_prev, keys[key].host_next
        keys[before].host_next = after
        keys[after].host_prev = before
    else:
        oldest = keys[sentinel].host_prev
        before = keys[oldest].host_prev
        keys[before].host_next = sentinel
        keys[sentinel].host_prev = before
        keys[oldest].in_host = 0
        keys[key].in_host = 1
        read = int(counts.disk_reads)
        counts.disk_reads += 1
    first = keys[sentinel].host_next
    keys[key].host_next = first
    keys[key].host_prev = sentinel
    keys[first].host_prev = key
    keys[sentinel].host_next = key
    return read
