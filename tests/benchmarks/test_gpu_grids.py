"""What stage 3 runs on a GPU, in which order, and how its figures are told: no GPU and no run is needed for that."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark_modules import benchmark_module

pytest.importorskip("torch")
pytest.importorskip("triton")


def test_the_grids_are_json_and_new_to_the_calibration() -> None:
    validation, profile = benchmark_module("gpu.validation"), benchmark_module("gpu.profile")
    from moeplan.executor.validation.grid import read_grid

    shapes = profile.shapes(dry=False)
    weights = [one.model.hidden_size * one.model.expert_intermediate_size for one in shapes]
    on_cores = profile.cores(dry=False)
    calibrated = {(one.model.hidden_size, one.model.expert_intermediate_size) for one in (*shapes, *on_cores)}
    for group in validation.GROUPS:
        grid = validation.read_plan(group, dry=False)
        assert read_grid(validation.GRIDS / group.grid) == grid
        validated = {(case.shape.hidden, case.shape.intermediate) for case in grid.cases}
        assert not calibrated & validated
        assert all(min(weights) < hidden * inner < max(weights) for hidden, inner in validated)
        schedules = [case.schedule for case in grid.cases]
        formats = {bits for one in schedules for bits in (one.experts.bits, one.experts.low_bits) if bits is not None}
        assert all(formats <= set(one.bits) for one in shapes)
        assert any(one.kernel.miss != "fetch" for one in schedules) is group.cores
        assert any(one.copy.host_experts is not None for one in schedules) is group.disk
        if group.cores:
            assert all(formats <= set(one.bits) for one in on_cores)
            sizes = [one.model.hidden_size * one.model.expert_intermediate_size for one in on_cores]
            assert all(min(sizes) < hidden * inner < max(sizes) for hidden, inner in validated)


def test_every_preset_is_run_somewhere_and_everything_that_is_run_can_be() -> None:
    validation = benchmark_module("gpu.validation")
    from moeplan.executor.running.supported import check_runnable
    from moeplan.specs.schedules.presets import PRESETS

    named = set()
    for group in validation.GROUPS:
        named |= {
            one["preset"].partition("=")[0]
            for one in json.loads((validation.GRIDS / group.grid).read_text())["schedules"]
        }
        for dry in (False, True):
            for case in validation.read_plan(group, dry=dry).cases:
                check_runnable(case.schedule)
    assert named == set(PRESETS)


def test_enough_for_the_targets_comes_first_then_every_group_then_the_rest() -> None:
    validation = benchmark_module("gpu.validation")
    order = validation.portions(dry=False)
    names = [one.name for one in order]
    assert len(set(names)) == len(names)
    groups = [one.group.name for one in order]
    first = groups.index("cores")
    assert {*groups[:first]} == {"targets"} and sum(len(one.grid.cases) for one in order[:first]) >= 24
    assert len({one.grid.cases[0].shape for one in order[:first]}) == 2
    others = [name for name in groups[first:] if name != "targets"]
    assert list(dict.fromkeys(others)) == ["cores", "disk", "formats", "guesses", "policies"]
    assert groups[first:] == others + ["targets"] * (len(groups) - first - len(others))
    # Nothing is lost, nothing is done twice, and a part solves whole problems: no group of regret is cut.
    for group in validation.GROUPS:
        mine = [case for one in order if one.group is group for case in one.grid.cases]
        assert sorted(case.name for case in mine) == sorted(
            case.name for case in validation.read_plan(group, dry=False).cases
        )
    problems = [
        case.group
        for one in order
        for case in {case.group: case for case in one.grid.cases}.values()
        if one.group.name == "targets"
    ]
    assert len(set(problems)) == len(problems)


def test_figures_are_those_of_all_parts_together() -> None:
    validation = benchmark_module("gpu.validation")

    def compared(name: str, predicted: float, measured: float) -> dict[str, Any]:
        return {
            "name": name, "group": "g", "predicted_s": predicted, "relative_uncertainty": 0.2, "measured_s": measured,
            "measured_again_s": measured, "measured_half_s": measured, "tokens_per_step": 1.0, "count_differences": [],
            "hit_rate_predicted": 0.5, "hit_rate_measured": 0.5,
        }  # fmt: skip

    parts = {
        "one": {"compared": [compared("a", 1.1, 1.0)], "budgets": [{"none": 0.1}]},
        "two": {"compared": [compared("b", 1.0, 2.0)], "budgets": [{"none": -0.5}]},
    }
    figures = validation.over_all(list(parts.values()))
    assert figures["num_configurations"] == 2 and figures["counts_equal"] is True
    assert figures["median_relative_error"] == pytest.approx(0.3)
    assert figures["regret"] == pytest.approx(1.0) and figures["kendall_tau"] == -1.0
    assert figures["error_budget"] == {"none": pytest.approx(0.3)}
    by_name = {one["name"]: one["met"] for one in validation.targets(figures, dry=False)}
    assert by_name["median error of the step"] is False and by_name["configurations"] is False
    assert validation.over_all([]) == {}
    named = {f"targets: {name}": part for name, part in parts.items()} | {"cores: one": parts["one"]}
    groups = validation.by_group(named, [*named, "cores: two"])
    assert groups["targets"]["figures"] == figures and groups["targets"]["parts"] == ["targets: one", "targets: two"]
    assert groups["cores"]["figures"]["num_configurations"] == 1 and groups["cores"]["pending"] == ["cores: two"]
    assert groups["disk"] == {"figures": {}, "parts": [], "pending": []}


def test_a_summary_tells_targets_groups_failures_and_what_was_left_out(tmp_path: Path) -> None:
    gpu, validation = benchmark_module("gpu.__main__"), benchmark_module("gpu.validation")
    one = {
        "name": "a", "group": "g", "predicted_s": 1.1, "relative_uncertainty": 0.2, "measured_s": 1.0, "measured_again_s": 1.0,
        "measured_half_s": 1.0, "tokens_per_step": 1.0, "count_differences": ["hits"], "hit_rate_predicted": 0.5, "hit_rate_measured": 0.5,
    }  # fmt: skip
    names = ["targets: a", "targets: b", "cores: c", "disk: d"]
    device = {"kind": "cuda", "name": "a GPU", "torch": "2.0"}
    file = benchmark_module("gpu.results").Results(
        tmp_path / "validation.json", stage="validation", dry=False, device=device, deadline_s=time.monotonic() + 60
    )

    def broken() -> dict[str, Any]:
        raise RuntimeError("no room")

    parts = [(names[0], lambda: {"compared": [one], "budgets": [{"none": 0.1}]}), (names[3], broken)]
    file.run(parts, expected_s={})
    file.deadline_s = 0.0
    file.run([*parts, *((name, broken) for name in names[1:3])], expected_s={"targets: b": 120.0})
    groups = validation.by_group(file.parts, names)
    found = validation.targets(groups["targets"]["figures"], dry=False)
    file.close(groups=groups, targets=found[1:2], warnings=["clocks are held back"])
    rest = "noise 0.0%, intervals hold 100%, counts DIFFER"
    assert gpu.summary(tmp_path, 3).splitlines() == [
        "stage 3: 1 parts done, 3 to do",
        "  MISSED: median error of the step: at most 0.03, got 0.1",
        f"  targets: 1 of 2 parts, 1 configurations, error median 10.0%, p90 10.0%, worst 10.0%, {rest}",
        "  cores: 0 of 1 parts",
        "  disk: 0 of 1 parts",
        "  formats: 0 of 0 parts",
        "  guesses: 0 of 0 parts",
        "  policies: 0 of 0 parts",
        "  WARNING clocks are held back",
        "  FAILED disk: d: RuntimeError: no room",
        "  left out: targets: b (about 120 s)",
        "  left out: cores: c",
    ]


def test_how_long_a_part_takes_is_its_runs_and_making_its_experts() -> None:
    from moeplan.executor.running.prediction import run_input
    from moeplan.specs.machines.profile_file import load_hardware
    from moeplan.traces.format import load_trace

    validation, expected = benchmark_module("gpu.validation"), benchmark_module("gpu.expected")
    trace = load_trace(validation.BUNDLED)
    case = validation.read_plan(validation.TARGETS, dry=False).cases[0]
    runs = [(run_input(case.schedule, trace, window_steps=4), case.shape.model(trace))]
    profile = load_hardware("h200-sxm")
    once, thrice = (
        expected.expected_s(runs, profile, "cuda", rounds=rounds, deadline_s=time.monotonic() + 60) for rounds in (1, 3)
    )
    making = (
        3 * 96 * expected.expert_layout(runs[0][1], "4").slot_bytes / profile.host_to_device.pageable_bytes_per_s.value
    )
    assert once > making and thrice - making == pytest.approx(3 * (once - making))
    assert expected.expected_s(runs, profile, "cuda", rounds=1, deadline_s=0.0) is None
