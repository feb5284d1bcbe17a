"""calibrate and validate on the command line: figures on good input, one line and an exit status on bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_outputs import nvbandwidth
from calibration_samples import lawful_samples, runs_of
from moeplan.api.load import as_routing, bundled_trace_path
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.cli import main
from moeplan.devices.device import cpu_name
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.provenance import made_of
from moeplan.traces.content import recording_sha256
from moeplan.traces.format import save_trace

GRID = """
shapes: [{name: small, hidden: 768, intermediate: 1024, vocab: 256}]
schedules: [{preset: on-demand}, {preset: mixtral-offloading-code}]
cache_experts_per_layer: [4]
bits: ["32"]
steps: 3
repeats: 2
"""
KEYS = {
    "num_configurations", "median_relative_error", "p90_relative_error", "worst_relative_error", "noise_floor", "coverage",
    "kendall_tau", "regret", "counts_equal", "error_budget", "misses", "configurations",
}  # fmt: skip
NCCL = """# nccl-tests
#  Rank  0 Group  0 Pid 1 on host device  0 [0x0a] NVIDIA
#  Rank  1 Group  0 Pid 2 on host device  1 [0x0b] NVIDIA
     1048576  131072  float  none  -1   100.0   10.49    5.24    0   100.0   10.49    5.24    N/A
    16777216 2097152  float  none  -1   850.0   19.74    9.87    0   850.0   19.74    9.87    N/A
"""

Run = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def moeplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the front door in this process, in a folder of its own."""

    def run(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return Done(int(stop.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Write a profile that says it was measured on this machine, and return its path."""
    samples = lawful_samples()
    device = dict(samples.device) | {"name": cpu_name()}
    path = tmp_path / "here.json"
    path.write_text(profile_to_json(fit_profile(dataclasses.replace(samples, device=device)).profile))
    return path


def refused(done: Done, status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("moeplan: ") and "Traceback" not in done.stderr and not done.stdout
    assert all(word in line for word in words), line


def test_a_grid_with_a_profile_prints_every_figure_and_writes_a_page(moeplan: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    done = moeplan(
        "validate", "--grid", "grid.yaml", "--profile", str(here), "--report", "page.html", "-o", "v.json", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() >= KEYS
    assert document == json.loads((tmp_path / "v.json").read_text())
    assert document["num_configurations"] == 2 and document["counts_equal"] is True
    assert document["drift"] is None and document["without_drift"] is None  # the profile holds no runs to be made again
    one = document["configurations"][0]
    assert len(one["measured_steps_s"]) == 2 and all(len(steps) == 3 for steps in one["measured_steps_s"])
    page = (tmp_path / "page.html").read_text()
    assert "Predicted against measured" in page and one["name"] in page and "The same steps" in page


def test_a_machine_that_is_not_as_its_profile_says_is_found_out(moeplan: Run, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    samples = lawful_samples()
    made_up = dataclasses.replace(
        samples, device=dict(samples.device) | {"name": cpu_name()}, samples=(*samples.samples, *runs_of("32"))
    )
    (tmp_path / "here.json").write_text(profile_to_json(fit_profile(made_up).profile))
    done = moeplan("validate", "--grid", "grid.yaml", "--profile", "here.json", "-o", "v.json")
    assert done.returncode == 0, done.stderr
    assert "now against its profile" in done.stdout and "with that taken out" in done.stdout
    document = json.loads((tmp_path / "v.json").read_text())
    # This machine is none that follows the made-up laws, so its runs of a calibrated shape take other times.
    assert "expert.32" in document["drift"] and all(ratio > 0 for ratio in document["drift"].values())
    one, without = document["configurations"][0], document["without_drift"]
    assert without["num_configurations"] == 2 and without["noise_floor"] == document["noise_floor"]
    least, most = (extreme(1.0, *document["drift"].values()) for extreme in (min, max))  # the host's own time stays
    assert 0.98 * least < one["predicted_now_s"] / one["predicted_step_s"] < 1.02 * most
    assert one["predicted_now_s"] != one["predicted_step_s"]
    # So it is beside a plan, whose model has a shape that nobody calibrated.
    done = moeplan(
        "validate", large_plan(tmp_path), "--profile", "here.json", "--steps", "4", "--repeats", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    beside_a_plan = json.loads(done.stdout)
    assert "expert.32" in beside_a_plan["drift"] and beside_a_plan["without_drift"]["num_configurations"] == 1


def plan_document(schedule: dict[str, Any], model: str = "tiny-moe", **provenance: object) -> dict[str, Any]:
    facts = {"hardware": "here", "memory_bytes": 50_000_000, "window_steps": 4, "dense_bits": "32"}
    facts["trace"] = {"sha256": recording_sha256(as_routing("bundled"))}
    best = {"name": "best", "schedule": schedule, "window_s": 1.0}
    return {"schema_version": 1, "kind": "offload", "provenance": facts | provenance, "best": best, "baselines": [],
            **made_of(load_model(model), load_hardware("t4"))}  # fmt: skip


def on_demand(**changes: object) -> dict[str, Any]:
    from moeplan.specs.schedules.presets import load_preset

    return load_preset("on-demand").with_options(experts__bits="native", **changes).to_dict()


def write_plan(tmp_path: Path, document: dict[str, Any]) -> str:
    (tmp_path / "plan.json").write_text(json.dumps(document))
    return "plan.json"


@pytest.mark.parametrize(
    ("provenance", "changes", "status", "words"),
    [
        ({"model": "mixtral-8x7b"}, {}, 2, ("layers",)),
        ({}, {"host__per_layer_s": 0.1}, 2, ("host.per_layer_s", "simulate it")),
    ],
)
def test_a_plan_that_cannot_run_here_is_refused(
    moeplan: Run, here: Path, tmp_path: Path, provenance: dict[str, object], changes: dict[str, object], status: int,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    path = write_plan(tmp_path, plan_document(on_demand(**changes), **provenance))
    refused(moeplan("validate", path, "--profile", str(here), "-o", "v.json"), status, *words)
    assert not (tmp_path / "v.json").exists()


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 6, "num_local_experts": 16,
    "num_experts_per_tok": 2, "num_attention_heads": 12, "num_key_value_heads": 3, "vocab_size": 256,
}  # fmt: skip


def large_plan(tmp_path: Path) -> str:
    """Write a plan, made for a machine with far more memory, of a model with the bundled recording's layers; return its path.

    The model's own file is gone: the plan holds the model.
    """
    own = tmp_path / "large.json"
    own.write_text(json.dumps(MIXTRAL))
    schedule = on_demand() | {"experts": on_demand()["experts"] | {"bits": "32"}}
    document = plan_document(schedule, model=str(own), memory_bytes=10**15, dense_bits="16", hardware="a100")
    own.unlink()
    return write_plan(tmp_path, document)


def test_a_plan_that_exceeds_the_machine_runs_as_far_as_it_fits_and_says_so(
    moeplan: Run, here: Path, tmp_path: Path
) -> None:
    path = large_plan(tmp_path)
    (tmp_path / "moved.safetensors").write_bytes(bundled_trace_path().read_bytes())
    # 6 layers of 16 experts of 9 MiB are 864 MiB; 640 MiB hold three layers, their dense part and an arena.
    done = moeplan(
        "validate", path, "--trace", "moved.safetensors", "--profile", str(here), "--memory", "640MiB", "--report",
        "page.html", "--json", "--repeats", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["reduced"]["layers"] == {"planned": 6, "run": 3}
    assert document["counts_equal"] is True and document["predicted_step_s"] > 0
    assert any("first 3 of 6 MoE layers" in note for note in document["notes"])
    assert any("16 bits; this device runs 32" in note for note in document["notes"])
    assert any("planned for 909.49 TiB on a100" in note for note in document["notes"])
    page = (tmp_path / "page.html").read_text()
    assert "What ran is not the whole plan" in page and "first 3 of 6 MoE layers" in page


def test_a_plan_of_which_not_even_an_excerpt_fits_is_one_line(moeplan: Run, here: Path, tmp_path: Path) -> None:
    refused(
        moeplan("validate", large_plan(tmp_path), "--profile", str(here), "--memory", "1MiB", "-o", "v.json"),
        3, "does not fit", "even with 2 layers", "bytes are missing",
    )  # fmt: skip
    assert not (tmp_path / "v.json").exists()


def test_a_plan_is_not_validated_with_another_recording(moeplan: Run, here: Path, tmp_path: Path) -> None:
    bundled = as_routing("bundled")
    other = dataclasses.replace(
        bundled, experts=bundled.experts[:, ::-1], predicted=None, predicted_prob=None, weights=None
    )
    save_trace(other, tmp_path / "other.safetensors")
    path = write_plan(tmp_path, plan_document(on_demand()))
    arguments = ["validate", path, "--profile", str(here), "--steps", "4", "--repeats", "1"]
    refused(moeplan(*arguments, "--trace", "other.safetensors"), 2, "--trace", "other.safetensors", "another recording")


def test_a_plan_of_no_known_kind_and_a_part_of_one_are_refused(moeplan: Run, here: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path, plan_document(on_demand()) | {"kind": "ep"})
    refused(moeplan("validate", path, "--profile", str(here)), 2, "plan: kind", "expert-parallel, offload")
    path = write_plan(tmp_path, {"kind": "expert-parallel"})
    refused(moeplan("validate", path, "--report", "page.html"), 2, "plan: schema_version", "make the plan again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "gpu"}, ("describes a gpu", "calibrate this device")),
        ({"name": "another processor"}, ("another device", "calibrate this device")),
        ({"value_bytes": 2.0}, ("2 bytes a value", "calibrate this device")),
        ({"schema_version": 99}, ("schema_version", "calibrate again")),
        ({"bundled": True}, ("describes a gpu",)),
    ],
)
def test_a_profile_of_another_machine_dtype_or_version_is_refused(
    moeplan: Run, here: Path, tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    document = json.loads(here.read_text())
    if "kind" in change:
        document["device"]["kind"] = change["kind"]
    if "name" in change:
        text = json.dumps(document).replace(cpu_name(), change["name"])
        document = json.loads(text)
    if "value_bytes" in change:
        column = document["curves"]["dense"]["arguments"]["value_bytes"]
        document["curves"]["dense"]["arguments"]["value_bytes"] = [change["value_bytes"]] * len(column)
    if "schema_version" in change:
        document["schema_version"] = change["schema_version"]
    here.write_text(json.dumps(document))
    profile = "t4" if "bundled" in change else str(here)
    refused(moeplan("validate", "--grid", "grid.yaml", "--profile", profile, "-o", "v.json"), 2, *words)
    assert not (tmp_path / "v.json").exists()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (GRID + "colour: red\n", ("grid", "colour")),
        (GRID + "calibrate: {speed: 3}\n", ("calibrate", "speed")),
        (GRID.replace("hidden: 768", "hidden: 700"), ("hidden", "700", "256")),
        (GRID.replace("on-demand", "on-demnd"), ("on-demnd", "on-demand")),
        ("shapes: [", ("not YAML",)),
        (GRID.replace("steps: 3", "steps: 0"), ("steps",)),
        (
            GRID.replace("{preset: on-demand}", "{preset: on-demand, set: {host.per_layer_s: 0.5}}"),
            ("host.per_layer_s",),
        ),
    ],
)
def test_a_wrong_grid_is_one_line(moeplan: Run, here: Path, tmp_path: Path, grid: str, words: tuple[str, ...]) -> None:
    (tmp_path / "grid.yaml").write_text(grid)
    refused(moeplan("validate", "--grid", "grid.yaml", "--profile", str(here), "-o", "v.json"), 2, *words)
    assert not (tmp_path / "v.json").exists()


def test_a_size_that_was_not_measured_names_the_configuration(moeplan: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID.replace("intermediate: 1024", "intermediate: 8192"))
    refused(
        moeplan("validate", "--grid", "grid.yaml", "--profile", str(here)), 2, "on-demand, 32 bits", "measured from"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate"], ("a plan or a grid",)),
        (["validate", "p.json", "--grid", "g.yaml"], ("a plan or a grid",)),
        (["validate", "p.json", "--seconds", "0"], ("--seconds",)),
        (["validate", "p.json", "--seconds", "nan"], ("--seconds",)),
        (["validate", "p.json", "--memory", "much"], ("--memory",)),
        (["validate", "--grid", "g.yaml", "--memory", "1GiB"], ("--memory",)),
        (["validate", "--grid", "g.yaml", "--repeats", "0"], ("--repeats",)),
        (["validate", "--grid", "absent.yaml"], ("absent.yaml", "no such file")),
        (["validate", "absent.json"], ("absent.json",)),
        (["validate", "p.json", "--set", "machine.host.per_layer_s=1ms"], ("machine.host.per_layer_s", "--profile")),
        (["validate", "p.json", "--profile", "t4", "--set", "cache.policy=lru"], ("cache.policy", "plan's")),
        (
            ["validate", "p.json", "--profile", "t4", "--set", "machine.host.x=1"],
            ("machine.host.x", "no such constant"),
        ),
        (["calibrate", "--device", "tpu"], ("--device", "tpu")),
        (["calibrate", "-o", "cpu.txt"], ("cpu.txt", ".json")),
        (["calibrate", "-o", "absent/cpu.json"], ("absent", "folder")),
        (["calibrate", "--bits", ","], ("--bits",)),
        (["calibrate", "--bits", "5"], ("5",)),
        (["calibrate", "--model", "no-such-model"], ("no-such-model",)),
        (["calibrate", "--hardware", "t4"], ("--hardware", "--from")),
        (["calibrate", "--from", "nvbandwidth", "absent.json", "--hardware", "t4"], ("absent.json",)),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(
    moeplan: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    refused(moeplan(*arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["calibrate"], ["validate", "--grid", "g.yaml"]])
def test_cuda_where_there_is_none_is_one_line(moeplan: Run, tmp_path: Path, command: list[str]) -> None:
    refused(moeplan(*command, "--device", "cuda"), 2, "--device", "CUDA")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tool", "text", "name", "expected"),
    [("nvbandwidth", nvbandwidth(), "host_to_device.pinned_bytes_per_s", 55.63e9),
     ("nccl-tests", NCCL, "node.gpu_link_bytes_per_s", (16777216 - 1048576) / 2 / 750e-6)],
)  # fmt: skip
def test_links_of_other_tools_replace_those_of_a_known_machine(
    moeplan: Run, tmp_path: Path, tool: str, text: str, name: str, expected: float
) -> None:
    (tmp_path / "tool.out").write_text(text)
    done = moeplan("calibrate", "--from", tool, "tool.out", "--hardware", "h100-sxm", "-o", "mine.json", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["profile"] == "mine.json" and document["num_samples"] in (2, 3)
    before, after = dict(load_hardware("h100-sxm").constants()), dict(load_hardware(tmp_path / "mine.json").constants())
    assert after[name].value == pytest.approx(expected, rel=1e-3) and after[name].source == "measured"
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == set(document["changed"]) and name in changed
    assert {path.name for path in tmp_path.iterdir()} == {"tool.out", "mine.json", "mine.samples.json"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nvbandwidth", "tool.out"], ("--hardware", "name the machine")),
        (["iperf", "tool.out", "--hardware", "h100-sxm"], ("iperf", "nvbandwidth")),
        (["nccl-tests", "tool.out", "--hardware", "t4"], ("t4", "2 took part")),
        (["nvbandwidth", "tool.out", "--hardware", "h100-sxm"], ("not JSON",)),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    moeplan: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    (tmp_path / "tool.out").write_text(NCCL)
    refused(moeplan("calibrate", "--from", *arguments, "-o", "mine.json"), 2, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"tool.out"}
