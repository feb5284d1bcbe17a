"""The host's memory as a cache above the disk: which experts must be read before they can be copied.

Modelled: experts in order of recency; one that is copied from here on is the most recent, one that must be read takes the
place of the least recent. Ignored: the file system's own cache, and experts that leave while their copy to the device is
still queued (the reader holds on to them).
"""

from __future__ import annotations

from ...jit import jit_lean
from .state import DISK_READS, PolicyConfig, PolicyState


@jit_lean
def use_from_host(config: PolicyConfig, state: PolicyState, key: int) -> int:
    """Make `key` the host's most recent expert; return the number of the disk read it needs, -1 when it needs none."""
    if config.host_experts == 0:
        return -1
    sentinel = config.num_layers * config.num_experts
    read = -1
    if state.in_host[key]:
        before, after = state.host_prev[key], state.host_next[key]
        state.host_next[before] = after
        state.host_prev[after] = before
    else:
        oldest = state.host_prev[sentinel]
        before = state.host_prev[oldest]
        state.host_next[before] = sentinel
        state.host_prev[sentinel] = before
        state.in_host[oldest] = 0
        state.in_host[key] = 1
        read = int(state.count[DISK_READS])
        state.count[DISK_READS] += 1
    first = state.host_next[sentinel]
    state.host_next[key] = first
    state.host_prev[key] = sentinel
    state.host_prev[first] = key
    state.host_next[sentinel] = key
    return read
