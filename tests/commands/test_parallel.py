"""Expert-parallel plans through the command line: what is printed, what engines get, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moeplan.cli import main
from moeplan.specs.models.load import load_model
from moeplan.traces.format import save_profile, save_trace
from moeplan.traces.recording import LoadProfile
from strategies import make_trace

PLAN = ["plan", "--mode", "ep", "--model", "deepseek-v2-lite", "--hardware", "h800-sxm"]
MACHINE = ["--nodes", "2", "--ranks-per-node", "4"]
LAYERS = tuple(range(1, 27))


def write_counts(path: Path, counts: np.ndarray, layers: tuple[int, ...] = LAYERS) -> None:
    profile = LoadProfile(counts=counts, model="", layer_ids=layers, source="made up", licence="", top_k=6)
    save_profile(profile, path)


@pytest.fixture
def moeplan(tmp_path, monkeypatch, capsys):
    """Return a call of the command line in an empty folder with two recordings: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    popular = np.round(1e5 * np.exp(-0.05 * np.arange(64))).astype(np.int64)
    write_counts(tmp_path / "loads.safetensors", np.stack([np.roll(popular, 7 * layer) for layer in range(26)]))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return call


def test_plan_prints_rivals_ablation_moving_and_a_verdict(moeplan, tmp_path):
    status, out, _ = moeplan(*PLAN, *MACHINE, "--trace", "loads.safetensors", "--redundant", "8",
                             "--evaluate-on", "loads.safetensors", "-o", "p.json")  # fmt: skip
    assert status == 0
    document = json.loads((tmp_path / "p.json").read_text())
    for one in document["baselines"]:
        assert {"name", "step_s", "max_over_mean_load", "inter_node_bytes", "intra_node_bytes"} <= set(one)
        assert f"baseline  {one['name']} " in out
    lines = out.splitlines()
    assert lines[0].startswith(document["headline"]["words"])
    for one in document["factors"]["rows"]:
        assert any(line.startswith(one["factor"]) for line in lines), one["factor"]
    assert [line for line in lines if line.startswith("  verdict")] == [f"  verdict   {document['verdict']}"]
    for start in ("  moving", "  staleness on loads.safetensors", "  bound", "  left out  grace", "  assumed"):
        assert any(line.startswith(start) for line in lines), start


def test_tokens_are_planned_by_affinity(moeplan, tmp_path):
    trace = make_trace(
        np.random.default_rng(1), num_layers=26, num_experts=64, top_k=6, requests=[(40, 0)] * 12, skew=0.05
    )
    save_trace(dataclasses.replace(trace, layer_ids=LAYERS), tmp_path / "t.safetensors")
    status, out, err = moeplan(*PLAN, *MACHINE, "--trace", "t.safetensors", "--phase", "prefill", "--search-moves", "500",
                               "--json")  # fmt: skip
    assert status == 0, err
    document = json.loads(out)
    assert {"grace", "occult"} <= {one["name"] for one in document["baselines"]}
    assert document["request"]["search_moves"] == 500
    assert document["overfit_fraction"] != 0.0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--nodes", "2", "--ranks-per-node", "4", "--redundant", "7"], 2, "use 8"),
        (["--nodes", "2", "--ranks-per-node", "4", "--redundant", "-8"], 2, "from 0 to"),
        (["--nodes", "9", "--ranks-per-node", "8"], 2, "use at most 64"),
        (["--nodes", "0"], 2, "from 1 to"),
        (["--nodes", "2", "--ranks-per-node", "-4"], 2, "from 1 to"),
        (["--nodes", "2", "--tokens-per-rank", "0"], 2, "from 1 to"),
        (["--nodes", "2", "--search-moves", "7"], 2, "from counts alone"),
        (["--nodes", "2", "--phase", "both"], 2, "not one of: decode, prefill"),
        (["--nodes", "2", "--model", "deepseek-v3"], 2, "deepseek-v3 has 58"),
        (["--nodes", "2", "--model", "olmoe-1b-7b"], 2, "olmoe-1b-7b has 16"),
        (["--nodes", "2", "--hardware", "rtx-4090"], 2, "describes no server"),
        (["--nodes", "2", "--trace", "few.safetensors"], 2, "deepseek-v2-lite has 64"),
        (["--nodes", "2", "--trace", "empty.safetensors"], 2, "no tokens"),
        (["--nodes", "2", "--trace", "absent.safetensors"], 2, "absent.safetensors"),
        (["--nodes", "1", "--ranks-per-node", "1", "--context", "4000000"], 3, "does not fit"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_a_status(arguments, status, said, moeplan, tmp_path):
    write_counts(tmp_path / "few.safetensors", np.ones((26, 32), np.int64))
    holes = np.ones((26, 64), np.int64)
    holes[3] = 0
    write_counts(tmp_path / "empty.safetensors", holes)
    options = [] if "--trace" in arguments else ["--trace", "loads.safetensors"]
    found, out, err = moeplan(*PLAN, *options, *arguments, "-o", "p.json")
    lines = [line for line in err.splitlines() if not line.startswith("plan: ")]
    assert (found, out, len(lines)) == (status, "", 1), err
    assert lines[0].startswith("moeplan: ") and said in lines[0]
    assert not (tmp_path / "p.json").exists()


def test_nodes_that_groups_do_not_divide_are_planned_all_the_same(moeplan, tmp_path):
    status, _, err = moeplan(
        *PLAN, "--trace", "loads.safetensors", "--nodes", "3", "--ranks-per-node", "2", "-o", "p.json"
    )
    assert status == 0, err
    placement = json.loads((tmp_path / "p.json").read_text())["placement"]
    assert (placement["num_nodes"], placement["num_ranks"], len(placement["physical_to_logical"][0])) == (3, 6, 66)


def test_dense_weights_are_as_the_checkpoint_stores_them(moeplan, tmp_path):
    """Experts in MXFP4, attention in FP8: its 8 bits count."""
    spec = load_model("deepseek-v4-flash")
    shape = (len(spec.moe_layers), spec.num_experts)
    write_counts(tmp_path / "flat.safetensors", np.full(shape, 1000), tuple(spec.moe_layers))
    status, out, err = moeplan(
        "plan", "--mode", "ep", "--model", "deepseek-v4-flash", "--hardware", "h800-sxm", "--trace", "flat.safetensors", "--json"
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["request"]["dense_bits"] == "8"


@pytest.mark.parametrize(("hardware", "kernels"), [("gb200", "sglang"), ("h100", "sglang")])
def test_a_plan_for_an_engine_is_predicted_with_its_kernels_a_siblings_too(moeplan, tmp_path, hardware, kernels):
    ask = ["--mode", "ep", "--model", "deepseek-v2-lite", "--hardware", hardware, "--trace", "loads.safetensors"]
    status, out, err = moeplan("plan", *ask, "--nodes", "2", "--for", "sglang", "--redundant", "16", "-o", "p.json")
    assert status == 0, err
    assert f"those of {kernels} " in out
