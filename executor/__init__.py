"""Runs an offload schedule for real and measures it.

    failures        how a run can fail, and what is said
    shrink          a model and a recording made small enough for this machine
    transfers       one expert on its way, and the order in which the copy engine takes them
    slots           device memory for experts: cache, staging and stream slots, and transient buffers
    copy_engine     the worker thread that moves experts to the device; the one that moves them back
    host_cores      the worker thread that computes misses on the host's cores instead
    stream_copies   the same moves on the compute stream, for schedules without overlap
    program         the host's program: launch, learn the routing, decide, submit, launch
    execution       what a run did: counts, rows, outputs
    execute         one schedule, from nouns to an execution
    validation_grid the configurations of a validation, read from a file
    validate        predicted against measured over a grid
    agreement       the figures of a validation: errors, coverage, order, regret
    error_budget    measured durations put into the simulator, one class at a time

Decisions are made by `sim.policies`, the very functions that the simulator calls.
"""
