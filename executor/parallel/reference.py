"""The same steps by one process that exchanges nothing: slow, obvious, and what every run must equal to rounding.

Modelled: every rank's dense part with its own caches, then every token's logical experts, one after the other, in float32.
Ignored: placements, copies, groups and exchanges: they must not matter.
"""

from __future__ import annotations

import numpy as np
import torch

from ...devices.runners.runner import gate
from .job import Job
from .routes import parts_of_tokens
from .work import Dense, Experts, hidden_states


def reference_states(job: Job) -> list[torch.Tensor]:
    """Return, for every step, the states [tokens, H] its tokens end in."""
    model = job.model
    every = np.tile(np.arange(model.num_experts), (model.num_moe_layers, 1))
    experts = Experts(model, job.schedule.kernel.bits, every, job.seed)
    found = []
    with torch.inference_mode():
        for number, step in enumerate(job.steps):
            x = hidden_states(model, len(step.source_rank), number, job.seed)
            for rank in range(job.topology.num_ranks):
                mine = np.flatnonzero(step.source_rank == rank)
                batch, _ = parts_of_tokens(len(mine), job.schedule)
                for micro in range(job.schedule.pipeline.micro_batches):
                    at = torch.from_numpy(mine[batch == micro])
                    x[at] = _batch(job, experts, x[at], step.experts[at.numpy()])
            found.append(x)
    return found


def _batch(
    job: Job, experts: Experts, x: torch.Tensor, chosen: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> torch.Tensor:
    """Return the states that one batch of one rank ends in."""
    dense = Dense(job.model, len(x), job.context_tokens, job.seed)
    late: torch.Tensor | None = None
    for layer in range(job.model.num_moe_layers):
        x, h, logits = dense.group(layer, x)
        ids = chosen[:, layer].astype(np.int64)
        answers = experts.run(layer, h, ids, gate(logits, torch.from_numpy(ids)))
        if not job.schedule.pipeline.shortcut:
            x = x + answers
            continue
        # A layer's experts answer after the next layer's dense part.
        if late is not None:
            x = x + late
        late = answers
    return x if late is None else x + late
