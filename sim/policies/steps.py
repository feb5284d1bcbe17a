"""The forward passes of a run as decisions see them: which experts each layer needs, in plain arrays.

Modelled: what was recorded, by step and layer. Ignored: how a recording is put into steps (`sim.offload.workload`), and time.
"""

from __future__ import annotations

from typing import NamedTuple

from .state import Array


class Steps(NamedTuple):
    """The logical input of a run, or of a piece of one, as arrays; `num_visits = num_steps * num_layers`."""

    visit_start: Array  # int64 [num_visits + 1]: where each visit's experts begin
    visit_expert: Array  # int16 [n]: distinct experts, in order of first use
    visit_tokens: Array  # int32 [n]: tokens of each
    visit_touch: Array  # int16 [n]: the same experts in order of last use
    visit_next_use: Array  # int64 [n]: next visit of the same layer that uses the expert, FAR when none does
    step_start: Array  # int64 [num_steps + 1]: where each step's tokens begin
    step_token: Array  # int64 [num_tokens]: rows of the recording
    visit_rank: Array  # uint8 [n]: best place an expert has among any token's choices, 0 the first
    step_phase: Array  # uint8 [num_steps]: 0 prefill, 1 decode
    step_first: Array  # uint8 [num_steps]: 1 where a request starts
    step_reset: Array  # uint8 [num_steps]: 1 where a new request starts and the cache is to be emptied
    experts: Array  # uint8 or uint16 [num_rows, num_layers, top_k]: the recording itself (for dial guesses)
    predicted: Array  # int16 [num_rows, num_layers, distance, width], or all lengths zero
    predicted_prob: Array  # int16, same shape: probability times 32767
    first_visit: int  # visits of the run before these steps (long recordings are replayed piece by piece)
