"""Reports of drafting: how many guesses are accepted is read as engines print it, predicted, and scored as a cut of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeplan.papers.field.machine import NotExpressible
from moeplan.papers.field.predict import predict_report
from moeplan.papers.field.rows import Report, read_reports
from moeplan.papers.field.scores import cuts, document
from moeplan.papers.field.setup import set_up
from moeplan.specs.drafting import tokens_per_step

WORK = {"context_tokens": 64, "generated_tokens": 64}
ROW: dict[str, Any] = {
    "id": "T1", "rig": "t", "model": "qwen3-30b-a3b", "quant": {"experts": "Q4_K_M"}, "gpus": [{"name": "RTX 5090", "pcie": "4.0 x16"}],
    "engine": {"name": "llama.cpp", "backend": "cuda"}, "placement": {"kind": "gpu"}, "workload": WORK,
    "metric": "decode_tokens_per_s", "value": 200.0,
}  # fmt: skip
# GLM-5.2, 4 bits, on cores above a disk: the same box without and with its draft layer (JustVugg/colibri#640): 0.34 to 0.36 tokens/s, hits
# 53 to 55 %, and 0.31 to 0.33, hits 40 to 42 %, 2.29 tokens a pass. Three guesses a pass is the engine's default then.
BOX: dict[str, Any] = ROW | {
    "model": "glm-5", "gpus": [], "engine": {"name": "colibri", "backend": "cpu"}, "quant": {"experts": "Q4_0"},
    "host": {"cpu": "Intel Core i9-12900K", "sockets": 1, "cores": 16, "memory": "DDR4-3200", "channels": 2, "memory_gib": 64},
    "disk": {"read_bytes_per_s": 6.44e9},
    "placement": {"kind": "expert-cache", "tier": "disk", "cold": "read from disk, computed on the cores", "slots": 24},
}  # fmt: skip


def reports(tmp_path: Path, *rows: dict[str, Any]) -> list[Report]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return list(read_reports(path))


def drafted(**work: Any) -> dict[str, Any]:
    return ROW | {"workload": WORK | work}


@pytest.mark.parametrize(
    ("work", "tokens"),
    [
        ({"draft_tokens": 3, "acceptance": 0.6}, 2.8),
        ({"draft_tokens": 3, "acceptance": 60}, 2.8),
        ({"draft_tokens": 2, "acceptance": [0.8, 0.5]}, 2.3),
        ({"draft_tokens": 4, "tokens_per_step": 3.37, "draft": "mtp"}, 3.37),
    ],
)
def test_what_a_report_says_of_drafting(tmp_path: Path, work: dict[str, Any], tokens: float) -> None:
    setup = set_up(reports(tmp_path, drafted(**work))[0])
    assert setup.drafting is not None and setup.drafting.mtp == (work.get("draft") == "mtp")
    assert tokens_per_step(setup.drafting.length, setup.drafting.acceptance) == pytest.approx(tokens, abs=1e-6)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        ({"draft_tokens": 3}, "is not stated"),
        ({"draft_tokens": 3, "tokens_per_step": 5}, "what 3 guesses can yield"),
        ({"draft_tokens": 2.5, "acceptance": 0.5}, "no count"),
        ({"draft_tokens": 90, "acceptance": 0.5}, "draft length"),
        ({"draft_tokens": 3, "acceptance": 0.5, "draft": "gpt-oss-20b"}, "words"),
    ],
)
def test_what_cannot_be_predicted_says_why(tmp_path: Path, work: dict[str, Any], says: str) -> None:
    with pytest.raises(NotExpressible, match=says):
        set_up(reports(tmp_path, drafted(**work))[0])


def test_drafting_is_a_cut_of_its_own(tmp_path: Path) -> None:
    rows = reports(tmp_path, ROW, drafted(draft_tokens=3, acceptance=0.9))
    plain, drafts = (predict_report(row) for row in rows)
    assert (drafts.value or 0) > (plain.value or 0)
    assert [cuts()["drafting"](row) for row in rows] == [False, True]
    assert document([plain, drafts])["cuts"]["drafting"]["n"] == 1


def test_a_draft_layer_above_a_disk_gains_nothing(tmp_path: Path) -> None:
    with_layer = BOX | {"workload": WORK | {"draft_tokens": 3, "tokens_per_step": 2.29, "draft": "mtp"}}
    plain, drafts = (predict_report(row) for row in reports(tmp_path, BOX, with_layer))
    assert (drafts.value or 9) < (plain.value or 0)
    assert plain.low is not None and plain.high is not None and plain.low < 0.35 < plain.high
    assert drafts.low is not None and drafts.high is not None and drafts.low < 0.32 < drafts.high
