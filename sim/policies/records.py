"""What decisions remember and write, by name: the records of `state.PolicyState` and `state.Decision`.

Modelled: one line for each expert, slot, pool, staging buffer, guess; one for each thing decided. Compiled code and plain Python
read a field as `keys[key].where`; `keys["where"]` is that field of all. Ignored: how many lines there are (`state`).
"""

from __future__ import annotations

from ...base.records import record_type, whole_numbers

# What is asked at every search for a victim comes first: a line's first 64 bytes are one line of a processor's cache.
KEY = record_type(
    where="int8",  # ABSENT, CACHED, STAGED or TRANSIENT
    used="int8",  # 0 from a prefetch until the first use
    in_host="int8",  # 0 where the expert must be read from disk
    format="int8",  # weight format of the expert's copy; the latest one's under `low_rank`
    slot="int32",  # slot while CACHED or STAGED, else -1
    prev="int32",  # recency list; the line num_keys + p is pool p's sentinel
    next="int32",
    touched="int64",  # last layer step that used this expert
    target="int64",  # layer step an unused prefetch was made for
    transfer="int64",  # the latest transfer of this expert, -1 when it was there from the start
    sent_target="int64",  # layer step the latest transfer was first made for; where it stands in its queue
    frequency="int64",  # tokens that used this expert
    stay_tokens="int64",  # of them, those since it last left the cache
    merit="float64",  # how likely an expert is thought to be wanted again (policies that keep a merit)
    next_use="int64",  # next layer step that will use it (policies that know the future)
    host_prev="int32",  # recency of the host's memory; the line num_keys is the sentinel
    host_next="int32",
)
"""One expert of one layer."""

SLOT = record_type(
    last_kernel="int64",  # last kernel that reads the slot, -1 when none
    last_back="int64",  # last write-back that reads the slot, -1 when none
    pending="int64",  # an unused prefetch into the slot, perhaps still on its way, -1 when none
    pending_target="int64",  # the layer step that prefetch was made for
    free_slot="int64",  # not of this slot: the stacks of free slots of each pool, pool p from its `first_slot`
    buffer="int64",  # the staging buffer that the slot is, where it is one
)
"""One slot: cache, staging, then stream."""

POOL = record_type(
    taken="int64",
    capacity="int64",
    first_slot="int64",
    age="float64",  # the greatest merit of any expert that has left
    moves="int64",  # how often an expert became the most recent, where a queue is kept (`least_used`)
    queued="int64",  # entries of that queue
)
"""One pool of slots, and one line more, which has only a first slot."""

QUEUED_KEY = whole_numbers("tokens", "moved", "key")
"""One entry of the queue of a pool's experts by their tokens: what they were when it was put there."""

MARK = whole_numbers("moved", "queued")
"""One expert of that pool: when it last became the most recent, counted in such moves, and whether it has an entry."""

BUFFER = whole_numbers("key", "slot", "target")
"""One staging buffer: the key in it, -1 when empty, its slot, and the layer step that the key's prefetch was made for (`KEY.target`)."""

GUESS = record_type(score="int64", ranked="int64", ranked_score="int64", worth="float64")
"""Scratch, one line an expert: `score` by expert; the others by rank, the order in which guesses are fetched (probabilities
times 65536, or sums of them); `worth` where a policy file ranks them."""

GUESSED = record_type(score="int32", expert="int16", true="int16")
"""One guess found beforehand: its score as above, the expert, and 1 where the layer step uses it."""

ASKED = whole_numbers("current", "matched")
"""Tokens that used an expert: in the current request, and in the library's entry nearest to it."""

PRICE = whole_numbers("copy_ns", "layer_step_ns")
"""One weight format's transfer of one expert, and a mean layer step (see `state.Prices`)."""

WORK = whole_numbers("on_device", "on_cores")
"""Nanoseconds of one expert with so many tokens."""

COUNTS = whole_numbers(
    "next_transfer", "next_kernel", "next_writeback", "next_stream",
    "hits", "hits_guessed", "misses", "prefetches", "prefetches_used", "extra_fetches", "writebacks",
    "prefetches_dropped", "evictions", "peak_transient", "transient_now", "guesses_true", "truths",
    "cpu_runs", "cancelled", "disk_reads", "low_fetches", "backlog_ns", "library_size", "library_next",
)  # fmt: skip
"""What a run has counted so far, and the numbers that come next."""

ITEM = record_type(
    expert="int64",
    tokens="int64",
    format="int64",  # weight format it is computed in
    kernel="int64",  # kernel of each, counted from 0 within the layer step, not falling
    transfer="int64",  # transfer that must have arrived, -1 when none
    key="int64",  # key of that transfer
)
"""One expert that a layer step computes."""

CORE_ITEM = whole_numbers("expert", "tokens", "format", "read")
"""One expert that runs on the host's cores; read: the disk read that must have ended, counted from 0, -1 when the host has the expert."""

MOVE = record_type(
    key="int64",
    kind="int64",  # DEMAND or PREFETCH
    target="int64",  # layer step it is for
    kernel="int64",  # kernel of this layer step that needs it, -1 for prefetches
    wait_kernel="int64",  # kernel number that must have finished with the slot, -1 when none
    wait_back="int64",  # write-back that must have left the slot, -1 when none
    slot="int64",  # slot it fills, -1 for a transient buffer
    format="int64",  # weight format that moves
    read="int64",  # the disk read that must have ended, counted from 0, -1 when the host has the expert
)
"""One transfer to the device."""

BACK = record_type(
    key="int64",
    format="int64",
    wait_kernel="int64",  # kernel number that must have finished with the slot, -1 when none
    move="int64",  # the write-back is submitted together with this transfer of the layer step
)
"""One write-back to the host."""

PROMOTION = whole_numbers("transfer", "target")
"""A promoted transfer and the layer step it was made for."""

SIZES = whole_numbers(
    "items", "kernels", "moves", "backs", "promoted", "cores", "first_transfer", "first_kernel", "first_back"
)
"""Lengths of a decision's lists, then the first ids of its layer step."""

RULES = whole_numbers("victim", "merit", "prefetch", "miss")
"""Handles of the rules of a policy file (see `custom`), 0 where the bundled ones decide."""

FAULT = whole_numbers("kind", "rule", "asked")
"""The first thing that a rule of a policy file did wrong: NO_FAULT, RAISED or NOT_FINITE, which rule, and how many values it was
given (`state.PolicyState.asked`)."""
