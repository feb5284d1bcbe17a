"""Loads that vLLM's balancer writes: copies added up, records as windows, draft models left out, damage refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emit_plans import complaint
from moeplan.traces.readers import import_trace
from moeplan.traces.recording import LoadProfile

KIND = "vllm-eplb-stats"


def record(load: Any, held: Any, **more: Any) -> dict[str, Any]:
    return {
        "record_type": "eplb_load_stats",
        "version": 1,
        "step": 1,
        "num_ranks": 2,
        "expert_load": load,
        "p2l_map": held,
    } | more


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


@given(st.data())
def test_copies_are_added_up(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layers, experts, copies, windows = (data.draw(st.integers(1, most)) for most in (3, 6, 3, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    expected = np.zeros((layers, experts), dtype=np.int64)
    records = [{"record_type": "eplb_load_meta", "num_layers": layers}]
    for _ in range(windows):
        held = np.stack(
            [rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, copies)]) for _ in range(layers)]
        )
        load = rng.integers(1, 100, held.shape)
        for layer in range(layers):
            expected[layer] += np.bincount(held[layer], load[layer], experts).astype(np.int64)
        records.append(record(load.tolist(), held.tolist()))
    path = written(tmp_path_factory.mktemp("stats") / "loads.jsonl", *records)
    profile = import_trace(KIND, path, layer_ids=list(range(3, 3 + layers)))
    assert isinstance(profile, LoadProfile)
    assert profile.counts.tolist() == expected.tolist() and profile.layer_ids == tuple(range(3, 3 + layers))


def test_a_draft_models_records_are_left_out(tmp_path: Path) -> None:
    main, draft = record([[1, 2], [3, 4]], [[0, 1], [1, 0]]), record([[7, 7]], [[0, 1]])
    profile = import_trace(KIND, written(tmp_path / "l.jsonl", main, draft, main))
    assert isinstance(profile, LoadProfile) and profile.counts.tolist() == [[2, 4], [8, 6]]
    assert "another number of layers" in json.dumps(dict(profile.metadata))


@pytest.mark.parametrize(
    ("one", "rule"),
    [
        ({"record_type": "eplb_load_meta"}, "has no eplb_load_stats record"),
        (record([[1, 2]], [[0, 1, 2]]), "expert_load has (1, 2)"),
        (record([[1, 2], [3]], [[0, 1], [0, 1]]), "expert_load"),
        (record([[1, -2]], [[0, 1]]), "0 to 2**53"),
        (record([[1, 2]], [[0, -1]]), "0 to 2**53"),
        (record([[1, 2]], [[0, 2**40]]), "experts"),
        (record([[0.5, 2]], [[0, 1]]), "whole numbers"),
        (record(None, [[0, 1]]), "must be [layers][slots]"),
    ],
)
def test_damage_is_refused_in_one_line(one: dict[str, Any], rule: str, tmp_path: Path) -> None:
    path = written(tmp_path / "l.jsonl", one)
    assert rule in complaint(lambda: import_trace(KIND, path))
