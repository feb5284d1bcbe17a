"""Experts in two weight formats: each is moved, placed and computed in the one that was decided."""

from __future__ import annotations

import pytest
import torch

from executor_schedules import TWO_FORMATS as SCHEDULES
from executor_stages import expected_outputs, formats_of, preset, run_input, small_model, small_trace
from moeplan.base.errors import InputError, Internal
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.executor.running.execute import execute, open_stage
from moeplan.kernels.expert_weights import slot_views
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.timeline import H2D, ROW_BYTES, ROW_LANE


@pytest.mark.parametrize("bits", ["32", "16"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_expert_is_computed_in_its_format(name: str, bits: str) -> None:
    run = run_input(SCHEDULES[name].with_options(experts__bits=bits), small_trace())
    expected = expected_outputs(small_model(), run, bits=bits)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True, poison=True)
    for mine, right in zip(found.outputs, expected, strict=True):
        # Products of packed weights are in bfloat16. An expert in the wrong format is off by its quantisation, a tenth or more.
        assert float((mine - right).norm() / right.norm()) < 0.02


def test_a_wrong_format_would_be_seen() -> None:
    run = run_input(SCHEDULES["coarse misses"], small_trace())
    assert {int(fmt) for layer_step in formats_of(run) for fmt in layer_step} == {0, 1}
    plain = run_input(preset("mixtral-offloading"), small_trace())
    worst = max(
        float((mine - other).norm() / other.norm())
        for mine, other in zip(
            expected_outputs(small_model(), run), expected_outputs(small_model(), plain), strict=True
        )
    )
    assert worst > 0.05


def test_bytes_are_those_of_each_format() -> None:
    model, run = small_model(), run_input(SCHEDULES["the less popular half"], small_trace())
    with open_stage(model, [run.workload]) as stage:
        found = execute(stage, run)
    sizes = [expert_layout(model, bits).slot_bytes for bits in ("32", "4")]
    assert found.expert_bytes == tuple(sizes) and sizes[1] < sizes[0]
    moved = found.timeline.rows[found.timeline.rows[:, ROW_LANE] == H2D, ROW_BYTES].tolist()
    assert set(moved) == set(sizes)
    assert moved.count(sizes[1]) == found.counts.low_fetches > 0
    assert found.bytes_copied == sum(moved)


def test_written_back_experts_of_both_formats_come_back_unchanged() -> None:
    run = run_input(SCHEDULES["on one stream, written back"], small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        stores = [stage.store(bits) for bits in ("32", "4")]
        before = [store._slots.clone() for store in stores]
        found = execute(stage, run, poison=True)
        for store, held in zip(stores, before, strict=True):
            assert torch.equal(store._slots, held)
    assert found.bytes_written_back > 0


def test_a_second_format_that_saves_nothing_is_refused() -> None:
    run = run_input(preset("edge-moe", experts__bits="4", experts__low_bits="16"), small_trace())
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(InputError, match="not smaller than 4"):
        execute(stage, run)


def test_which_experts_are_coarse_must_be_told() -> None:
    run = run_input(SCHEDULES["the less popular half"], small_trace())
    bare = RunInput(schedule=run.schedule, config=run.config, workload=run.workload, capacities=run.capacities)
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(Internal, match="was not told which"):
        execute(stage, bare)


def test_slots_may_be_larger_than_a_layout_needs_but_not_smaller() -> None:
    large, small = (expert_layout(small_model(), bits) for bits in ("32", "4"))
    with open_stage(small_model(), [run_input(preset("on-demand"), small_trace()).workload]) as stage:
        store = stage.store("4")
        arena = torch.zeros(3 * large.slot_bytes, dtype=torch.uint8)
        views = slot_views(arena, small, store.activation, slot_bytes=large.slot_bytes)
        assert views.gate_up.num_slots == views.down.num_slots == 3
        arena.view(3, -1)[2, : small.slot_bytes].copy_(store.bytes_of(5))
        assert torch.equal(views.down.words[2], store.weights().down.words[5])  # type: ignore[union-attr]
        for size in (small.slot_bytes - 256, large.slot_bytes + 1):
            with pytest.raises(InputError, match="slot_bytes"):
                slot_views(arena, small, store.activation, slot_bytes=size)
