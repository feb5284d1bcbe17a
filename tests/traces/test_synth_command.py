"""`moeplan trace synth` as a user types it: where dials come from, what is printed, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moeplan.base.errors import InputError
from moeplan.cli import main
from moeplan.traces.format import load_trace
from moeplan.traces.stats import trace_stats
from moeplan.traces.synthesis.closeness import LRU_SHARES, figures_of
from moeplan.traces.synthesis.dial import Dials, reshape_dials
from moeplan.traces.synthesis.presets import PRESETS, preset
from moeplan.traces.synthesis.synthesise import synthesise

SHAPE = ["--set", "num_layers=3", "--set", "num_experts=12", "--set", "top_k=2"]


@dataclass(frozen=True)
class Done:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def synth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moeplan", "trace", "synth", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return Done(int(stop.value.code or 0), shown.out, shown.err)

    return run


def test_dials_length_and_seed_decide_the_file(synth: Callable[..., Done], tmp_path: Path) -> None:
    turned = [*SHAPE, "--set", "skew=0.9", "--set", "prompt_tokens=[4, 8]", "--set", "decode_tokens=6"]
    done = synth(*turned, "--tokens", "300", "--seed", "7", "-o", "a.st", "--json")
    document = json.loads(done.stdout)
    assert done.status == 0 and "closeness" not in document
    assert {key: document[key] for key in ("num_tokens", "num_layers", "num_experts", "top_k", "seed", "path")} == {
        "num_tokens": len(load_trace(tmp_path / "a.st").experts), "num_layers": 3, "num_experts": 12, "top_k": 2, "seed": 7, "path": "a.st",
    }  # fmt: skip
    assert document["dials"]["skew"] == 0.9 and document["dials"]["prompt_tokens"] == [4, 8]
    trace = load_trace(tmp_path / "a.st")
    assert 300 <= len(trace.experts) < 300 + 8 + 6 and (trace.phase[-6:] == 1).all()
    assert trace.experts.shape[1:] == (3, 2) and document["num_requests"] == len(set(trace.request.tolist()))
    assert synth(*turned, "--tokens", "300", "--seed", "7", "-o", "b.st").status == 0
    assert synth(*turned, "--tokens", "300", "--seed", "8", "-o", "c.st").status == 0
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.st", "b.st", "c.st"))
    assert first == again != other


def test_whole_requests_of_a_preset_in_the_shape_of_a_model(synth: Callable[..., Done], tmp_path: Path) -> None:
    done = synth("--preset", "mixtral-8x7b", "--requests", "3", "-o", "t", "--json")
    document = json.loads(done.stdout)
    assert (done.status, document["num_layers"], document["num_experts"], document["num_requests"]) == (0, 32, 8, 3)
    assert load_trace(tmp_path / "t").model == "mixtral-8x7b"
    done = synth("--preset", "deepseek-r1", "--model", "olmoe-1b-7b", "--tokens", "200", "-o", "t", "--json")
    document = json.loads(done.stdout)
    assert (document["num_layers"], document["num_experts"], document["top_k"]) == (16, 64, 8)
    assert document["dials"]["reuse_short"] == preset("deepseek-r1").reuse_short
    done = synth("--model", "deepseek-v3", "--set", "prompt_tokens=5", "--tokens", "50", "-o", "t")
    assert "num_layers 58" in done.stdout and load_trace(tmp_path / "t").layer_ids == tuple(range(3, 61))


def test_like_prints_every_statistic_of_both(
    synth: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan.traces.synthesis.fit._ROUNDS", 1)
    monkeypatch.setattr("moeplan.traces.synthesis.fit._STEPS", 1)
    dials = Dials(
        num_layers=2, num_experts=8, top_k=2, prompt_tokens=(30,), decode_tokens=(30,), guess_recall=((0.4,),)
    )
    synthesise(dials, tmp_path / "o.st", num_tokens=1200, seed=3, model="m")
    done = synth("--like", "o.st", "-o", "s.st", "--json")
    document = json.loads(done.stdout)
    original, made = load_trace(tmp_path / "o.st"), load_trace(tmp_path / "s.st")
    assert (made.num_tokens, made.model, document["num_tokens"]) == (1200, "m", 1200)
    for side, trace in (("original", original), ("synthetic", made)):
        shown = {row["name"]: row[side] for row in document["closeness"]["figures"]}
        assert shown == figures_of(trace_stats(trace))
    assert len(document["closeness"]["lru_hit_fractions"]) == len(LRU_SHARES) == 5
    done = synth("--like", "o.st", "-o", "s2.st", "--tokens", "500", "--set", "affinity=1")
    rows = {line[:52].strip(): line[52:].split() for line in done.stdout.splitlines()}
    assert rows[""] == ["original", "synthetic", "difference"]
    by_hand = trace_stats(original).load_gini
    assert rows["load_gini"][0] == f"{by_hand:.4f}" and rows["num_tokens"][:2] == ["1200.0000", "540.0000"]
    assert "LRU hit rates at five capacities differ by at most" in done.stdout
    assert load_trace(tmp_path / "s2.st").num_tokens == 540  # nine whole requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "bundled", "--preset", "mixtral-8x7b"], "cannot be combined with --preset"),
        (["--preset", "mixtral-8x7b"], "no length is given"),
        (["--preset", "mixtral-8x22b", "--tokens", "5"], "did you mean 'mixtral-8x7b'"),
        (["--tokens", "5"], "nothing says how many layers"),
        ([*SHAPE, "--tokens", "5", "--requests", "5"], "exactly one"),
        ([*SHAPE, "--tokens", "5", "--set", "skew"], "not of the form dial=value"),
        ([*SHAPE, "--tokens", "5", "--set", "reuse_shrt=0.5"], "did you mean 'reuse_short'"),
        ([*SHAPE, "--tokens", "5", "--set", "top_k=13"], "top_k = 13"),
        ([*SHAPE, "--tokens", "5", "--seed", "-1"], "seed = -1"),
        (["--like", "missing.st"], "missing.st"),
        (["--like", "bundled", "--model", "mixtral-8x7b"], "another shape"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_no_file(
    arguments: list[str], message: str, synth: Callable[..., Done], tmp_path: Path
) -> None:
    done = synth(*arguments, "-o", "t.st")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reshaped_locality_keeps_its_curve_of_popularity() -> None:
    curve = tuple(float(2.0**-rank) for rank in range(8))
    dials = Dials(num_layers=2, num_experts=8, top_k=2, popularity=curve, guess_recall=((0.4,),), reuse_long=0.3)
    wide = reshape_dials(dials, num_layers=3, num_experts=16, top_k=2)
    assert (wide.num_layers, wide.num_experts, wide.reuse_long, wide.guess_recall) == (3, 16, 0.3, ((0.4,),))
    assert len(wide.popularity) == 16 and np.allclose(np.take(wide.popularity, [0, -1]), [1.0, curve[-1]])
    inner = np.log2(wide.popularity)[1:-1]
    assert np.allclose(np.diff(inner), -0.5)  # the same fall over twice the ranks
    assert reshape_dials(dials, num_layers=2, num_experts=8, top_k=1).guess_recall == ()
    with pytest.raises(InputError, match="top_k"):
        reshape_dials(dials, num_layers=2, num_experts=8, top_k=9)
    for name in PRESETS:
        assert reshape_dials(preset(name), num_layers=4, num_experts=32, top_k=4).num_experts == 32
