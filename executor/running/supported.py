"""Which schedules the executor can really run; the others are refused before anything starts.

Modelled: every option with the values that the program, the copy engine and the runners know. An option that is not listed
here may have its default value only, so that one added to the simulator is refused here until it is built. Ignored: whether
a schedule fits, which its arena tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.errors import InputError
from ...specs.schedules.offload import OffloadSchedule

# Values that run; None: any that the schedule's own checks allow.
_RUNS: Mapping[str, tuple[Any, ...] | None] = {
    "cache.policy": None,
    "cache.placement": None,
    "cache.host_layers": None,
    "cache.experts_per_layer": None,
    "cache.first_layer_extra": None,
    "cache.pooled_experts": None,
    "cache.reset": ("never", "request"),
    "experts.bits": None,
    "experts.low_bits": None,
    "experts.low_rank": None,
    "experts.low_fraction": None,
    "predictor.kind": None,
    "predictor.depth": None,
    "predictor.width": None,
    "predictor.staging": None,
    "predictor.recall": None,
    "predictor.recall_decay": None,
    "predictor.seed": None,
    "predictor.threshold": None,
    "predictor.benefit": None,
    "predictor.library": None,
    "predictor.score": None,
    "kernel.grouping": ("per-expert", "grouped"),
    "kernel.miss": None,
    "copy.overlap": (True, False),
    "copy.write_back": (True, False),
    "copy.chunk_bytes": None,
    "copy.pinned": (True, False),
    "copy.cancel": (True, False),
    "copy.fetch": None,
    "copy.host_experts": None,
    "host.per_step_s": (None,),
    "host.per_layer_s": (None,),
    "host.per_kernel_s": (None,),
    "host.per_transfer_s": (None,),
    "workload.concurrency": None,
    "workload.prefill_chunk_tokens": None,
}


def check_runnable(schedule: OffloadSchedule) -> None:
    """Return nothing; raises InputError for the first option that the executor cannot run."""
    given, default = schedule.to_dict(), OffloadSchedule().to_dict()
    for section, options in given.items():
        if not isinstance(options, Mapping):
            continue  # the name
        for option, value in options.items():
            key = f"{section}.{option}"
            allowed = _RUNS.get(key, (default[section].get(option),))
            if allowed is not None and value not in allowed:
                what = "a simulated cost, while a run has its own" if section == "host" else "only simulated"
                raise InputError(
                    key, value, f"{what}: the executor runs {', '.join(map(str, allowed))}", "change it, or simulate it"
                )
    if schedule.copy.host_experts == 0:
        raise InputError(
            "copy.host_experts", 0, "as many as fit is worked out by a plan; a run needs the number", "give how many"
        )
    if schedule.copy.host_experts is not None and schedule.kernel.miss != "fetch":
        raise InputError(
            "kernel.miss",
            schedule.kernel.miss,
            "only simulated with a disk below the host: the cores compute what is in memory",
            "set it to fetch",
        )
    if schedule.copy.host_experts is not None and schedule.experts.low_bits is not None:
        raise InputError(
            "experts.low_bits",
            schedule.experts.low_bits,
            "only simulated with a disk below the host: its file has one format",
            "drop one of the two",
        )
