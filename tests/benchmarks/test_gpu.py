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
from calibration_samples import lawful_samples
from moeplan.base.errors import InputError
from moeplan.calibrate.samples import sample_to_dict, samples_to_json
from moeplan.specs.machines.profile_file import load_hardware
from overlap_samples import layer_samples

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
    return benchmark_module("gpu.results").Results(folder / "copies.json", **(given | changes))


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
    module = benchmark_module("gpu.results")

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


def test_what_would_not_be_done_in_time_makes_way(folder: Path) -> None:
    work = Work()
    late = results(folder, deadline_s=time.monotonic() + 60)
    parts = [work.part(name) for name in ("a", "long", "b", "unknown")]
    late.run(parts, expected_s={"a": 1.0, "long": 1e6, "b": 2.0, "unknown": None})
    assert work.done == ["a", "b", "unknown"] and late.close() is False
    document = stored(folder)
    assert document["pending"] == ["long"] and list(document["left_out"]) == ["long"]
    # What was done took next to nothing of what was expected; what is left may take half.
    assert document["left_out"]["long"] == 5e5
    assert document["parts"]["a"]["expected_s"] == 1.0 and document["parts"]["unknown"]["expected_s"] is None


def test_parts_that_take_longer_than_expected_shorten_the_list(folder: Path) -> None:
    work = Work()
    first = results(folder)
    first.run([work.part("a")])
    first.parts["a"] |= {"took_s": 30.0, "expected_s": 3.0}
    first.save()
    second = results(folder, deadline_s=time.monotonic() + 60)
    second.run([work.part("a"), work.part("fits"), work.part("does not")], expected_s={"fits": 1.0, "does not": 50.0})
    assert work.done == ["a", "fits"]
    assert stored(folder)["left_out"]["does not"] == pytest.approx(50.0 * 30 / 4, rel=0.01)


def test_the_longest_part_is_tried_where_nothing_else_is_left(folder: Path) -> None:
    work = Work()
    only = results(folder)
    only.run([work.part("long")], expected_s={"long": 1e6})
    assert work.done == ["long"] and only.close() is True


def test_a_stage_that_is_ended_has_told_what_it_had_to_do(folder: Path) -> None:
    work = Work()
    first = results(folder)
    with pytest.raises(KeyboardInterrupt):
        first.run([("hangs", lambda: (_ for _ in ()).throw(KeyboardInterrupt)), work.part("b")])
    assert stored(folder)["pending"] == ["hangs", "b"]


def test_a_stage_that_was_ended_still_writes_its_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = benchmark_module("gpu.__main__")
    budgets: list[float] = []

    def child(stage: int, out: Path, environment: Any, *, dry: bool, budget_s: float, patience_s: float) -> int:
        budgets.append(budget_s)
        return gpu._ENDED if budget_s else 1

    monkeypatch.setattr(gpu, "_child", child)
    assert gpu.run_apart(3, folder, dry=False, budget_s=100.0) == 1
    assert budgets == [pytest.approx(100.0, abs=1.0), 0.0]
    assert gpu.DEFAULT_BUDGET_S + gpu._GRACE_S + gpu._CLOSING_S < 8 * 60


def test_a_target_is_met_missed_or_not_measured() -> None:
    target = benchmark_module("gpu.results").target
    assert [target("x", 0.95, got, at_most=False, dry=False)["met"] for got in (0.95, 0.94, None)] == [
        True,
        False,
        None,
    ]
    assert [target("x", 1.08, got, at_most=True, dry=False)["met"] for got in (1.08, 1.09)] == [True, False]
    assert target("x", 1.0, 2.0, at_most=False, dry=True)["met"] is None


def test_a_profile_is_of_the_parts_it_is_asked_for(folder: Path) -> None:
    profile = benchmark_module("gpu.profile")
    with pytest.raises(InputError, match="has not measured 'calibrate: x' yet"):
        profile.load_profile(folder, ["calibrate: x"])
    first = results(folder)
    first.run([("copies: 16 bits", lambda: {"fraction_of_plain": 1.0})])
    with pytest.raises(InputError, match="run STAGE=2 until it is complete"):
        profile.load_profile(folder, ["copies: 16 bits"])
    assert profile.write_profile(folder, first.parts, dry=False) == {}
    plain = set(profile.needed(dry=False))
    assert set(profile.needed(dry=False, with_disk=True)) - plain == {"disk"}
    first_parts, later = profile.profile_parts("cpu", dry=False, seconds=1.0)
    assert {name for name, _ in first_parts} == plain
    everything = profile.needed(dry=False, with_cores=True, with_disk=True, with_plain=True)
    assert [name for name, _ in (*first_parts, *later)] == everything


def test_a_run_says_first_what_it_stands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = benchmark_module("gpu.machine")
    decisions, host, disk = machine.lines()
    assert decisions.startswith("decisions: compiled (numba ") and host.startswith("host: ") and tmp_path.exists()
    assert "disk: " in disk
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert machine.decisions().startswith("WARNING decisions: plain Python (NUMBA_DISABLE_JIT is set)")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nnone {tmp_path} tmpfs rw 0 0\nnone /dev/pts devpts rw 0 0\n")
    assert machine.disk(tmp_path, mounts).startswith(f"WARNING disk: {tmp_path} lies in memory (tmpfs)")
    assert machine.disk(Path("/"), mounts).startswith("disk: / (ext4), ")
    assert machine.disk(Path("/"), tmp_path / "none").startswith("disk: / (unknown), ")


def test_stage_1_searches_nothing_once_kernels_are_part_of_a_profile(folder: Path) -> None:
    gpu = benchmark_module("gpu.__main__")
    assert gpu.calibrated(folder) is False
    first = results(folder)
    first.run([("copies: 16 bits", lambda: {"fraction_of_plain": 1.0})])
    assert gpu.calibrated(folder) is False
    first.run([("calibrate: x", lambda: {"samples": "{}"})])
    assert gpu.calibrated(folder) is True


def test_launch_configurations_come_along_and_a_change_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = benchmark_module("gpu.opening")
    monkeypatch.setenv("MOEPLAN_CACHE_DIR", str(tmp_path / "cache"))
    kept, used = folder / "tuned" / "a_GPU.json", tmp_path / "cache" / "tuned" / "a_GPU.json"
    opening.bring_configurations(folder)
    assert opening.configurations("a GPU") == "as shipped" and opening.calibrated_with(folder) is None
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    opening.bring_configurations(folder)
    assert used.read_text() == "{}"
    kept.write_text("{} ")  # what kernels are launched with is not touched any more
    opening.bring_configurations(folder)
    assert used.read_text() == "{}"
    results(folder, device=DEVICE | {opening.CONFIGURATIONS: opening.configurations("a GPU")}).save()
    assert opening.calibrated_with(folder) == opening.configurations("a GPU")
    used.write_text("{}  ")
    assert opening.calibrated_with(folder) != opening.configurations("a GPU")


def test_layers_are_taken_away_where_the_host_is_small() -> None:
    fit = benchmark_module("gpu.models").layers_that_fit
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
    found = benchmark_module("gpu.copies")._all_to_all({"name": "a GPU"}, dry=False)
    assert found == {"ranks": [], "notes": [said], "num_measurements": 0, "samples": None}


@pytest.fixture
def apart(tmp_path: Path) -> dict[str, str]:
    """An environment whose every Python refuses what a GPU machine need not have."""
    (tmp_path / "sitecustomize.py").write_text(REFUSAL)
    package = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in (str(tmp_path), package) if part)}


def test_every_stage_imports_without_what_a_gpu_machine_lacks(apart: dict[str, str]) -> None:
    stages = [
        *sorted(f"gpu.{path.stem}" for path in (ROOT / "benchmarks" / "gpu").glob("*.py")),
        "kernels",
        "kernel_cases",
    ]
    assert len(stages) > 6
    code = "".join(f"import benchmarks.{name}\n" for name in stages)
    code += "import moeplan.sim.offload.simulate, moeplan.devices.runners.triton, moeplan.devices.runners.plain\n"
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


def test_stage_5_goes_into_the_profile_whichever_stage_comes_first(folder: Path) -> None:
    module = benchmark_module("gpu.profile")
    lawful = lawful_samples()
    measured = {name: {"samples": samples_to_json(lawful)} for name in module.needed(dry=True)}
    layer = [sample_to_dict(sample) for sample in layer_samples()]
    parts = {"grouped or dense": {"samples": layer[:5]}, "others": {"samples": layer[5:]}}
    names = {"overlap.dense", "overlap.launches", "overlap.multiprocessors", "overlap.beside"}
    folder.mkdir()
    early = module.keep_overlap(folder, lawful.device, parts)
    assert set(early["curves"]) == names and "run STAGE=2" in early["warnings"][0]
    assert not (folder / "profile.json").exists()
    (folder / "copies.json").write_text(json.dumps({"dry": True, "parts": measured}))
    for way in ("stage 2 after it", "stage 5 after it"):
        if way == "stage 2 after it":
            assert module.write_profile(folder, measured, dry=True)["fit"] is not None
        else:
            assert "warnings" not in module.keep_overlap(folder, lawful.device, parts)
        profile = load_hardware(str(folder / "profile.json"))
        assert names <= set(profile.curves)
        (folder / "profile.json").unlink()


@pytest.mark.skipif(not LONG, reason="two minutes of all five stages; set MOEPLAN_LONG=1")
def test_a_dry_run_of_all_stages(folder: Path, apart: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--dry"]
    done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ("kernels", "copies", "validation", "speedups", "overlap")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    head = {
        "schema_version",
        "stage",
        "dry",
        "produced_by",
        "device",
        "complete",
        "pending",
        "left_out",
        "failures",
        "begun",
        "parts",
    }
    own = {
        "kernels": {"targets", "conditions", "configurations"},
        "copies": {"targets", "fit", "warnings", "speed_beside_each_other"},
        "validation": {"targets", "figures", "groups", "warnings"},
        "speedups": {"targets", "warnings"},
        "overlap": {"targets", "warnings", "curves"},
    }
    for name, document in found.items():
        assert set(document) == head | own[name]
        assert document["complete"] and document["dry"] and document["stage"] == name and document["failures"] == {}
        assert document["pending"] == [] and document["left_out"] == {}
        assert {one["met"] for one in document["targets"]} <= {None}
        assert all({"name", "target", "at_most", "got", "met"} <= set(one) for one in document["targets"])
        assert all(part["took_s"] >= 0 and "expected_s" in part for part in document["parts"].values())
    assert [len(found[name]["targets"]) for name in names] == [3, 2, 5, 0, 0]
    assert found["overlap"]["warnings"] == []
    profile = json.loads((folder / "profile.json").read_text())
    assert {"overlap.dense", "overlap.launches", "overlap.multiprocessors", "overlap.beside"} <= set(profile["curves"])
    assert profile["device"]["kind"] == "cpu" and profile["disk"] is not None and profile["host"]["cpu"] is not None
    assert json.loads((folder / "profile.samples.json").read_text())["kind"] == "samples"
    groups = found["validation"]["groups"]
    assert list(groups) == ["targets", "cores", "disk", "formats", "guesses", "policies"]
    assert groups["targets"]["figures"] == found["validation"]["figures"]
    keys = {
        "num_configurations", "median_relative_error", "p90_relative_error", "worst_relative_error", "noise_floor", "coverage",
        "kendall_tau", "num_pairs", "regret", "regret_by_group", "counts_equal", "misses", "error_budget",
    }  # fmt: skip
    for group in groups.values():
        assert set(group["figures"]) == keys and group["figures"]["counts_equal"] is True
        assert group["parts"] and group["pending"] == []
    for part in found["validation"]["parts"].values():
        assert {"configurations", "compared", "budgets", "notes"} <= set(part)
    for part in found["speedups"]["parts"].values():
        assert {"notes", "schedules", "speedups", "published"} <= set(part)
        assert all(row["counts_equal"] for row in part["schedules"])
        assert all(one["measured"] > 0 and one["predicted"] > 0 for one in part["speedups"])
    before = {name: (folder / f"{name}.json").stat().st_size for name in names}
    again = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {name: json.loads((folder / f"{name}.json").read_text())["parts"] for name in names} == {
        name: document["parts"] for name, document in found.items()
    }
    assert before.keys() == found.keys()
