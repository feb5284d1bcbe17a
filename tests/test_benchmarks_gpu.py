"""The GPU stages: what is done is not done twice, what fails is said and tried again, and nothing foreign is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark_modules import ROOT, benchmark_module
from moeplan.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("triton")

LONG = os.environ.get("MOEPLAN_LONG", "") not in ("", "0")
DEVICE = {"kind": "cuda", "name": "a GPU", "torch": "2.0", "memory_limit_bytes": 5}
# What a GPU machine need not have.
ABSENT = ("pydantic", "simpy", "plotly", "typer", "rich", "yaml", "pyarrow", "joblib", "transformers", "hypothesis")
REFUSAL = f"""
import sys
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError("refused: " + name)
sys.meta_path.insert(0, Refusal())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def results(folder: Path, **changes: Any) -> Any:
    given = {"stage": "copies", "dry": False, "device": DEVICE, "deadline_s": time.monotonic() + 60}
    return benchmark_module("gpu_results").Results(folder / "copies.json", **(given | changes))


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "copies.json").read_text())


class Work:
    """Parts that count how often they were done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def part(self, name: str, error: Exception | None = None) -> tuple[str, Any]:
        def work() -> dict[str, Any]:
            self.done.append(name)
            if error is not None:
                raise error
            return {"found": name}

        return name, work


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    work = Work()
    first = results(folder)
    first.run([work.part("a")])
    assert first.close() is True
    second = results(folder, device=DEVICE | {"memory_limit_bytes": 6})
    second.run([work.part("a"), work.part("b")])
    assert second.close(targets=[1]) is True
    assert work.done == ["a", "b"]
    document = stored(folder)
    assert {name: part["found"] for name, part in document["parts"].items()} == {"a": "a", "b": "b"}
    assert document["complete"] and document["targets"] == [1] and document["begun"] == []


def test_a_failure_costs_its_own_part_only_and_is_tried_again(folder: Path) -> None:
    work = Work()
    first = results(folder)
    first.run([work.part("a", RuntimeError("out of memory")), work.part("b")])
    assert first.close() is False
    document = stored(folder)
    assert document["failures"]["a"]["error"] == "RuntimeError: out of memory"
    assert document["pending"] == ["a"] and list(document["parts"]) == ["b"]
    second = results(folder)
    second.run([work.part("a"), work.part("b")])
    assert second.close() is True
    assert work.done == ["a", "b", "a"] and stored(folder)["failures"] == {}


def test_nothing_begins_after_the_deadline(folder: Path) -> None:
    work = Work()
    late = results(folder, deadline_s=time.monotonic() - 1)
    late.run([work.part("a")])
    assert late.close() is False
    assert work.done == [] and stored(folder)["pending"] == ["a"]


def test_a_part_that_was_cut_short_comes_last(folder: Path) -> None:
    work = Work()
    first = results(folder)
    with pytest.raises(KeyboardInterrupt):
        first.run([work.part("a"), ("hangs", lambda: (_ for _ in ()).throw(KeyboardInterrupt)), work.part("b")])
    assert stored(folder)["begun"] == ["hangs"] and list(stored(folder)["parts"]) == ["a"]
    second = results(folder)
    second.run([work.part("a"), work.part("hangs"), work.part("b")])
    assert work.done == ["a", "b", "hangs"] and second.close() is True


def test_parts_that_others_need_come_first_or_not_at_all(folder: Path) -> None:
    work = Work()
    first = results(folder)
    first.run([work.part("ceilings", RuntimeError("no")), work.part("a")], require=1)
    assert work.done == ["ceilings"] and first.close() is False


def test_a_lost_device_ends_the_stage_and_keeps_what_was_found(folder: Path) -> None:
    work = Work()
    module = benchmark_module("gpu_results")

    def dead() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    lost = results(folder, alive=dead)
    with pytest.raises(module.DeviceLost, match="unspecified launch failure") as caught:
        lost.run([work.part("a"), work.part("b", RuntimeError("CUDA error")), work.part("c")])
    assert caught.value.exit_status == 75 and "\n" not in str(caught.value)
    assert list(stored(folder)["parts"]) == ["a"] and "b" in stored(folder)["failures"]


@pytest.mark.parametrize(
    ("key", "changes"),
    [("name", {"device": DEVICE | {"name": "another"}}), ("torch", {"device": DEVICE | {"torch": "3"}}), ("dry", {"dry": True})],
)  # fmt: skip
def test_results_of_another_run_are_refused_not_mixed(folder: Path, key: str, changes: dict[str, Any]) -> None:
    first = results(folder)
    first.run([Work().part("a")])
    before = (folder / "copies.json").read_bytes()
    with pytest.raises(InputError, match=rf"{key} .*choose an empty folder"):
        results(folder, **changes)
    assert (folder / "copies.json").read_bytes() == before


def test_a_target_is_met_missed_or_not_measured() -> None:
    target = benchmark_module("gpu_results").target
    assert [target("x", 0.95, got, at_most=False, dry=False)["met"] for got in (0.95, 0.94, None)] == [
        True,
        False,
        None,
    ]
    assert [target("x", 1.08, got, at_most=True, dry=False)["met"] for got in (1.08, 1.09)] == [True, False]
    assert target("x", 1.0, 2.0, at_most=False, dry=True)["met"] is None


def test_the_grid_is_json_and_large_enough_and_new_to_the_calibration() -> None:
    validation, copies = benchmark_module("gpu_validation"), benchmark_module("gpu_copies")
    grid = validation.read_plan(dry=False)
    assert len(grid.cases) >= 24
    from moeplan.executor.validation_grid import read_grid

    assert read_grid(validation.GRID) == grid
    calibrated = {(one.model.hidden_size, one.model.expert_intermediate_size) for one in copies.shapes(dry=False)}
    validated = {(case.shape.hidden, case.shape.intermediate) for case in grid.cases}
    assert not calibrated & validated
    formats = {case.schedule.experts.bits for case in grid.cases}
    assert all(formats <= set(one.bits) for one in copies.shapes(dry=False) if one.model.gated)


def test_figures_are_those_of_all_parts_together() -> None:
    validation = benchmark_module("gpu_validation")

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
    figures = validation.over_all(parts)
    assert figures["num_configurations"] == 2 and figures["counts_equal"] is True
    assert figures["median_relative_error"] == pytest.approx(0.3)
    assert figures["regret"] == pytest.approx(1.0) and figures["kendall_tau"] == -1.0
    assert figures["error_budget"] == {"none": pytest.approx(0.3)}
    by_name = {one["name"]: one["met"] for one in validation.targets(figures, dry=False)}
    assert by_name["median error of the step"] is False and by_name["configurations"] is False
    assert validation.over_all({}) == {}


def test_layers_are_taken_away_where_the_host_is_small() -> None:
    fit = benchmark_module("gpu_models").layers_that_fit
    gib = 1 << 30
    assert fit(32, 8, gib // 16, 128 * gib) == 32
    assert fit(32, 8, gib // 2, 20 * gib) == 2  # 11 GiB of 12, less one, hold two layers of four
    assert fit(32, 8, gib, gib) == 2


@pytest.mark.parametrize(("gpus", "said"), [(1, "one GPU: no all-to-all"), (0, "no GPU: no all-to-all")])
def test_a_machine_without_a_second_gpu_says_that_there_is_no_all_to_all(
    monkeypatch: pytest.MonkeyPatch, gpus: int, said: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = benchmark_module("gpu_copies")._all_to_all({"name": "a GPU"}, dry=False)
    assert found == {"ranks": [], "notes": [said], "num_measurements": 0, "exchange_samples": None}


@pytest.fixture
def apart(tmp_path: Path) -> dict[str, str]:
    """An environment whose every Python refuses what a GPU machine need not have."""
    (tmp_path / "sitecustomize.py").write_text(REFUSAL)
    package = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in (str(tmp_path), package) if part)}


def test_every_stage_imports_without_what_a_gpu_machine_lacks(apart: dict[str, str]) -> None:
    stages = ("gpu", "gpu_copies", "gpu_validation", "gpu_speedups", "kernels", "kernel_cases")
    code = "".join(f"import benchmarks.{name}\n" for name in stages)
    code += "import moeplan.sim.simulate, moeplan.calibrate.triton_experts, moeplan.calibrate.plain_experts\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=apart, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_gpu_run_without_a_gpu_is_refused_in_one_line(folder: Path, apart: dict[str, str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--stage", "2"]
    done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert not folder.exists()


@pytest.mark.skipif(not LONG, reason="a minute of all four stages; set MOEPLAN_LONG=1")
def test_a_dry_run_of_all_stages(folder: Path, apart: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--dry"]
    done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ("kernels", "copies", "validation", "speedups")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    for name, document in found.items():
        assert document["complete"] and document["dry"] and document["stage"] == name and document["failures"] == {}
        assert {one["met"] for one in document["targets"]} <= {None}
    assert json.loads((folder / "profile.json").read_text())["device"]["kind"] == "cpu"
    assert found["validation"]["figures"]["counts_equal"] is True
    for part in found["speedups"]["parts"].values():
        assert all(row["counts_equal"] for row in part["schedules"])
        assert all(one["measured"] > 0 and one["predicted"] > 0 for one in part["speedups"])
    before = {name: (folder / f"{name}.json").stat().st_size for name in names}
    again = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {name: json.loads((folder / f"{name}.json").read_text())["parts"] for name in names} == {
        name: document["parts"] for name, document in found.items()
    }
    assert before.keys() == found.keys()
