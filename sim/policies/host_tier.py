"""The host's memory as a cache above the disk: which experts must be read before they can be copied.

Modelled: experts in order of recency; one that is copied from here on is the most recent, one that must be read takes the
place of the least recent. Ignored: the file system's own cache, and experts that leave while their copy to the device is
still queued (the reader holds on to them).
"""

from __future__ import annotations

from ...base.jit import jit_inline
from .state import DISK_READS, HOST_NEXT, HOST_PREV, IN_HOST, PolicyConfig, PolicyState


@jit_inline
def use_from_host(config: PolicyConfig, state: PolicyState, key: int) -> int:
    """Make `key` the host's most recent expert; return the number of the disk read it needs, -1 when it needs none."""
    keys, count = state.keys, state.count
    if config.host_experts == 0:
        return -1
    sentinel = config.num_layers * config.num_experts
    read = -1
    if keys[IN_HOST, key]:
        before, after = keys[HOST_PREV, key], keys[HOST_NEXT, key]
        keys[HOST_NEXT, before] = after
        keys[HOST_PREV, after] = before
    else:
        oldest = keys[HOST_PREV, sentinel]
        before = keys[HOST_PREV, oldest]
        keys[HOST_NEXT, before] = sentinel
        keys[HOST_PREV, sentinel] = before
        keys[IN_HOST, oldest] = 0
        keys[IN_HOST, key] = 1
        read = int(count[DISK_READS])
        count[DISK_READS] += 1
    first = keys[HOST_NEXT, sentinel]
    keys[HOST_NEXT, key] = first
    keys[HOST_PREV, key] = sentinel
    keys[HOST_PREV, first] = key
    keys[HOST_NEXT, sentinel] = key
    return read
