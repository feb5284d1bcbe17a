"""Wrong guesses that have not begun are dropped: which ones depends on how far copies have come, what is computed does not."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from executor_stages import expected_outputs, expert_tokens, preset, run_input, small_model, small_trace, tables_of
from moeplan.devices.device import Device
from moeplan.devices.stores.host import ExpertStore
from moeplan.executor.running.execute import execute, open_stage, walk_decisions
from moeplan.executor.running.execution import Execution, count_differences
from moeplan.executor.running.transfers import Transfer, Waiting
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.offload.simulators import run_compiled
from moeplan.sim.policies.state import DEMAND, PREFETCH

WRONG_GUESSES = {"predictor__kind": "synthetic", "predictor__recall": 0.4, "predictor__depth": 2, "copy__cancel": True}
SCHEDULES = {
    "into the cache": preset("promoe", predictor__recall=0.4, copy__chunk_bytes=4096),
    "into staging buffers": preset("mixtral-offloading", **WRONG_GUESSES),
    "nothing kept": preset("on-demand", **WRONG_GUESSES),
}


class SlowStore(ExpertStore):
    """A store whose copies take their time, so that guesses queue."""

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        time.sleep(0.002)
        super().bring(device, target, key, low, high)


def run_slowly(run: RunInput) -> Execution:
    with open_stage(small_model(), [run.workload]) as stage:
        store = stage.store("32")
        slow = SlowStore(store.layout, store.activation, store._slots.view(-1))
        return execute(stage, run, store=slow, keep_outputs=True, poison=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_guesses_are_dropped_and_outputs_are_those_of_the_model(name: str) -> None:
    run = run_input(SCHEDULES[name], small_trace())
    found = run_slowly(run)
    assert found.counts.cancelled > 0
    for mine, right in zip(found.outputs, expected_outputs(small_model(), run), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    # What was decided and what moved agree, and everything that was used was either a hit or a miss.
    assert (
        found.bytes_copied == found.bytes_decided == (found.counts.misses + found.counts.prefetches) * found.slot_bytes
    )
    assert found.counts.hits + found.counts.misses == run.workload.num_expert_uses
    outcome = run_compiled(run.config, run.workload, tables_of(run, *found.expert_bytes), run.capacities, serial=False)
    assert count_differences(found, outcome, expert_tokens(run.workload), timing_dependent=True) == []


def test_a_run_in_which_copies_are_fast_drops_less_than_one_in_which_they_are_slow() -> None:
    run = run_input(SCHEDULES["into the cache"], small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        fast = execute(stage, run)
    assert fast.counts.cancelled < run_slowly(run).counts.cancelled
    assert walk_decisions(run).counts[0].cancelled == 0


def test_only_waiting_guesses_of_which_nothing_moved_may_be_dropped() -> None:
    def transfer(number: int, kind: int, target: int, moved: int = 0) -> Transfer:
        return Transfer(
            id=number, key=number, kind=kind, target=target, slot=0, transient=False, wait_kernel=-1, wait_back=-1,
            format=0, num_bytes=8, moved_bytes=moved,
        )  # fmt: skip

    waiting = Waiting()
    late, early, begun, far = (
        transfer(4, PREFETCH, 7), transfer(5, PREFETCH, 6), transfer(6, PREFETCH, 6, 4), transfer(7, PREFETCH, 8),
    )  # fmt: skip
    for each in (late, early, begun, far, transfer(8, DEMAND, 6)):
        waiting.add(each)
    assert waiting.untouched(7) == [early, late]
    waiting.drop(early)
    first = waiting.first()
    assert first is not None and first.id == 8
    waiting.take(first)
    assert waiting.first() is begun


def test_what_is_compared_of_a_run_that_depends_on_time() -> None:
    run = run_input(SCHEDULES["into the cache"], small_trace())
    found = run_slowly(run)
    outcome = run_compiled(run.config, run.workload, tables_of(run, *found.expert_bytes), run.capacities, serial=False)
    tokens = expert_tokens(run.workload)
    assert count_differences(found, outcome, tokens + 1, timing_dependent=True) == [
        f"expert tokens: predicted {tokens + 1}, measured {tokens}"
    ]
    found.counts.prefetches += 1
    (line,) = count_differences(found, outcome, tokens, timing_dependent=True)
    assert line.startswith("bytes copied")
    assert isinstance(found.counts, np.record)
