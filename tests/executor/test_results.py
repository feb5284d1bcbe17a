"""The numbers a run computes are those of the model: every expert was read from the right bytes at the right time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executor_stages import RUNNABLE, expected_outputs, preset, run_input, small_model, small_trace
from moeplan.base.errors import InputError
from moeplan.devices.stores.disk import DiskStore
from moeplan.executor.running.execute import execute, open_stage

# Sums of two experts and of a few layers in float32 against float64: far below what a wrong expert would change.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_run_computes_what_the_model_computes(name: str) -> None:
    run = run_input(preset(name), small_trace())
    expected = expected_outputs(small_model(), run)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True, poison=True)
    assert len(found.outputs) == len(expected) == run.workload.num_steps
    for mine, right in zip(found.outputs, expected, strict=True):
        if run.schedule.experts.low_bits is None:
            torch.testing.assert_close(mine, right, **FLOAT32)
        else:  # packed weights are multiplied in bfloat16
            assert float((mine - right).norm() / right.norm()) < 0.02


@pytest.mark.parametrize("bits", ["16", "8", "4", "3", "2"])
def test_quantised_experts_compute_what_their_bytes_say(bits: str) -> None:
    run = run_input(preset("mixtral-offloading", experts__bits=bits), small_trace())
    expected = expected_outputs(small_model(), run, bits=bits)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True, poison=True)
    # Products are in bfloat16: two roundings of 2**-8 in each expert, over three layers. A wrong expert is off by about one.
    for mine, right in zip(found.outputs, expected, strict=True):
        assert float((mine - right).norm() / right.norm()) < 0.02


def test_a_wrong_expert_would_be_seen() -> None:
    run = run_input(preset("on-demand"), small_trace())
    expected = expected_outputs(small_model(), run)
    with open_stage(small_model(), [run.workload]) as stage:
        stage.store("32").bytes_of(5).copy_(stage.store("32").bytes_of(6))
        found = execute(stage, run, keep_outputs=True)
    worst = max(float((mine - right).abs().max()) for mine, right in zip(found.outputs, expected, strict=True))
    assert worst > 100 * FLOAT32["atol"]


def test_written_back_experts_come_back_unchanged() -> None:
    run = run_input(preset("mixtral-offloading-code", copy__overlap=True, cache__experts_per_layer=2), small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        before = stage.store("32")._slots.clone()
        found = execute(stage, run, poison=True)
        assert torch.equal(stage.store("32")._slots, before)
    assert found.bytes_written_back > 0


def test_layers_without_experts_and_a_tail_are_computed() -> None:
    model = small_model(
        num_layers=6,
        moe_layers=(1, 2, 4),
        dense_intermediate_size=48,
        num_shared_experts=1,
        shared_intermediate_size=32,
    )
    run = run_input(preset("on-demand"), small_trace())
    with open_stage(model, [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True)
    for mine, right in zip(found.outputs, expected_outputs(model, run), strict=True):
        torch.testing.assert_close(mine, right, **FLOAT32)


def test_experts_on_disk_give_the_same_numbers(tmp_path: Path) -> None:
    run = run_input(preset("mixtral-offloading"), small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        memory = execute(stage, run, keep_outputs=True)
        disk = DiskStore(stage.store("32"), tmp_path)
        found = execute(stage, run, store=disk, keep_outputs=True, poison=True)
        disk.close()
        assert list(tmp_path.iterdir()) == []
    for mine, right in zip(found.outputs, memory.outputs, strict=True):
        torch.testing.assert_close(mine, right, **FLOAT32)


def test_experts_on_disk_are_not_written_back(tmp_path: Path) -> None:
    run = run_input(preset("mixtral-offloading-code"), small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        disk = DiskStore(stage.store("32"), tmp_path)
        with pytest.raises(InputError, match=r"copy\.write_back"):
            execute(stage, run, store=disk)
        disk.close()
