"""Parts of a window that stand for it: so many passes that generate tokens, and prompts cut short.

Modelled: which steps a part has. A long prompt is many passes through all experts of a layer, which cost most of a simulation and
differ little from each other. Ignored: what is made of a part.
"""

from __future__ import annotations

import numpy as np

from ...sim.offload.workload import Workload
from ...sim.policies.state import Array


def part_of(workload: Workload, passes: int, prompt_passes: int | None) -> Array:
    """Return the numbers of the first steps that hold `passes` passes generating tokens (of any kind, where none generates).

    prompt_passes: of prompts that follow each other without a token generated between them, only the first so many passes, and the
    first of each request; None: all.
    """
    steps = np.arange(workload.num_steps)
    decoding = workload.step_phase == 1
    if not decoding.any():
        return steps[:passes]
    at = np.flatnonzero(decoding)
    end = int(at[passes - 1]) + 1 if passes <= len(at) else workload.num_steps
    if prompt_passes is None:
        return steps[:end]
    opens = np.concatenate(([True], decoding[:-1]))
    since = steps - np.maximum.accumulate(np.where(opens, steps, 0))
    kept = decoding | (since < prompt_passes) | (workload.step_first == 1)
    found: Array = steps[:end][kept[:end]]
    return found
