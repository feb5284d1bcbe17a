"""The front door: commands as a user types them, in processes of their own; errors are one line and an exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from moeplan.api.load import bundled_trace_path
from moeplan.cli import main

PLAN = ["plan", "--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "-o", "p.json"]
SIMULATE = ["simulate", "--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "--window", "40"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def moeplan(tmp_path, monkeypatch, capsys):
    """Run the front door in this process (importing everything anew for each case would take longer than the cases)."""

    def run(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return Done(stop.value.code or 0, shown.out, shown.err)

    return run


def test_an_error_leaves_a_real_process_with_one_line(tmp_path):
    command = [sys.executable, "-c", "from moeplan.cli import main; main()", "simulate", "--colour", "red"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_simulate_prints_one_json_document(moeplan):
    done = moeplan(*SIMULATE, "--schedule", "on-demand", "--simulator", "both", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    for key in (
        *(
            name + end
            for name in ("prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "request_s")
            for end in ("", "_interval")
        ),
        "step_s",
        "makespan_ns",
        "hit_rate",
        "bytes_copied",
        "busy_fraction",
        "bound",
        "relative_uncertainty",
        "engine",
    ):
        assert key in document
    assert set(document["step_s"]) == {"mean", "p50", "p99"}
    assert document["simulator"] == "compiled, checked by simpy"
    assert document["bytes_copied"] == document["misses"] * 589824


def test_import_stats_and_convert_a_recording(moeplan, tmp_path):
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (20, 3, 1)), axis=2)[:, :, :2]
    np.savez(tmp_path / "r.npz", experts=experts, seq=np.zeros(20, np.int32), pos=np.arange(20, dtype=np.int32),
             phase=np.ones(20, np.int8), layer_ids=np.arange(3))  # fmt: skip
    done = moeplan(
        "trace", "import", "--from", "npz", "r.npz", "-o", "r.safetensors", "--option", "num_experts=8", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["num_tokens"], facts["num_layers"], facts["num_experts"], facts["top_k"]) == (20, 3, 8, 2)
    stats = json.loads(moeplan("trace", "stats", "r.safetensors", "--json").stdout)
    assert stats["num_tokens"] == 20
    assert len(stats["lru_hit_fraction_reset"]) == 8
    text = moeplan("trace", "stats", "r.safetensors").stdout.splitlines()
    for size, (emptied, kept) in enumerate(
        zip(stats["lru_hit_fraction_reset"], stats["lru_hit_fraction_persistent"], strict=True), start=1
    ):
        assert f"{size} {emptied:.4f} {kept:.4f}".split() in [line.split() for line in text]
    assert moeplan("trace", "convert", "r.safetensors", "--to", "npz", "-o", "back.npz").returncode == 0
    with np.load(tmp_path / "back.npz", allow_pickle=False) as back:
        assert np.array_equal(back["experts"], experts)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([*SIMULATE, "--set", "cache.experts_per_lyer=3"], 2, "did you mean 'cache.experts_per_layer'?"),
        ([*SIMULATE, "--set", "cache.experts_per_layer=99"], 2, "at most that many"),
        ([*SIMULATE, "--set", "cache.experts_per_layer=-1"], 2, "not a whole number"),
        ([*SIMULATE, "--schedule", "mixtral-ofloading"], 2, "did you mean 'mixtral-offloading'?"),
        ([*SIMULATE, "--window", "0"], 2, "--window = 0: not a whole number"),
        ([*SIMULATE, "--memory", "6Gib of it"], 2, "--memory"),
        ([*SIMULATE, "--memory", "10MiB"], 3, "bytes are missing"),
        ([*SIMULATE, "--colour", "red"], 2, "No such option"),
        (["simulate", "--model", "gpt-oss-20b", "--hardware", "t4", "--trace", "bundled"], 2, "gpt-oss-20b has 24"),
        (["simulate", "--model", "tiny-moe", "--hardware", "t4", "--trace", "absent.safetensors"], 2, "absent.safetensors"),
        ([*PLAN, "--memory", "100MiB"], 3, "bytes are missing"),
        ([*PLAN, "--bits", "5"], 2, "not one of"),
        (["trace", "import", "--from", "nzp", "x", "-o", "y"], 2, "did you mean 'npz'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_exit_status(arguments, status, said, moeplan, tmp_path):
    done = moeplan(*arguments)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_recording_is_refused(moeplan, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(bundled_trace_path().read_bytes()[:100_000])
    done = moeplan("trace", "stats", "cut.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_commands_are_these(moeplan):
    shown = moeplan("--help").stdout
    for command in ("trace", "simulate", "plan", "report", "demo"):
        assert command in shown
