"""The forward passes of a run as decisions see them: which experts each layer needs, in plain arrays.

Modelled: what was recorded, by step and layer. Ignored: how a recording is put into steps (`sim.offload.workload`), and time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...base.records import records
from .records import GUESSED
from .state import Array

_NO_START = np.zeros(0, np.int64)
_NO_GUESSES = records(GUESSED, 0)


class Steps(NamedTuple):
    """The logical input of a run, or of a piece of one, as arrays; `num_layer_steps = num_steps * num_layers`."""

    layer_step_start: Array  # int64 [num_layer_steps + 1]: where each layer step's experts begin
    layer_step_expert: Array  # int16 [n]: distinct experts, in order of first use
    layer_step_tokens: Array  # int32 [n]: tokens of each
    layer_step_touch: Array  # int16 [n]: the same experts in order of last use
    layer_step_next_use: Array  # int64 [n]: next layer step of the same layer that uses the expert, FAR when none does
    step_start: Array  # int64 [num_steps + 1]: where each step's tokens begin
    step_token: Array  # int64 [num_tokens]: rows of the recording
    layer_step_rank: Array  # uint8 [n]: best place an expert has among any token's choices, 0 the first
    step_phase: Array  # uint8 [num_steps]: 0 prefill, 1 decode
    step_first: Array  # uint8 [num_steps]: 1 where a request starts
    step_reset: Array  # uint8 [num_steps]: 1 where a new request starts and the cache is to be emptied
    experts: Array  # uint8 or uint16 [num_rows, num_layers, top_k]: the recording itself (for synthetic guesses)
    predicted: Array  # int16 [num_rows, num_layers, distance, width], or all lengths zero
    predicted_prob: Array  # int16, same shape: probability times 32767
    first_layer_step: int  # layer steps of the run before these steps (long recordings are replayed piece by piece)
    guessed_start: Array = (
        _NO_START  # int64 [num_layer_steps * depth + 1]: where the guesses made 1, 2, … layers before each
    )
    # layer step begin, where they are found already; of length zero where they are found as the run goes
    guessed: Array = _NO_GUESSES  # GUESSED: best first
