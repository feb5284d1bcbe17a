"""A calibration that was stopped goes on where it was; one with other settings starts anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.base.errors import InputError
from moeplan.base.units import KIB, MIB
from moeplan.calibrate.microbenchmarks.journal import Journal, journal_path, open_journal
from moeplan.calibrate.microbenchmarks.measure import Extent
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.calibrate.samples import Sample
from moeplan.executor.calibration.calibrate import calibrate_device

ONE = Sample(kind="host", labels={"what": "step"}, arguments={}, seconds=(1e-6, 2e-6))
TINY = made_up_model("tiny", hidden=256, intermediate=64, num_layers=2, num_experts=4, vocab=64)
LEAST = Extent(
    expert_tokens=(1, 4), group_tokens=(1, 4), group_experts=(2, 3), pass_tokens=(1, 4), contexts=(16,),
    copy_bytes=(4 * KIB, 64 * KIB, MIB), rounds=1, repetitions=1, disk=False,
)  # fmt: skip


def test_parts_come_back_with_the_same_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "cpu.unfinished.json"
    first = open_journal(path, {"bits": ["4"], "shapes": [(1, 2)]})
    assert first.resumed == 0 and first.part("0 copies") is None and not path.exists()
    first.keep("0 copies", [ONE])
    again = open_journal(path, {"bits": ["4"], "shapes": [(1, 2)]})
    assert again.resumed == 1 and again.part("0 copies") == [ONE]
    assert open_journal(path, {"bits": ["16"], "shapes": [(1, 2)]}).resumed == 0
    again.close()
    assert list(tmp_path.iterdir()) == []
    again.close()  # closing twice is no error


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", '{"kind": "unfinished samples"}', "[" * 100_000])
def test_what_cannot_be_read_counts_as_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.unfinished.json"
    path.write_text(text)
    assert open_journal(path, {}).resumed == 0


def test_a_wrong_sample_among_the_parts_discards_them_all(tmp_path: Path) -> None:
    path = tmp_path / "cpu.unfinished.json"
    kept = Journal(path, {})
    kept.keep("0 a", [ONE])
    kept.keep("1 b", [ONE])
    document = json.loads(path.read_text())
    document["parts"]["1 b"][0]["seconds"] = [0.0]
    path.write_text(json.dumps(document))
    assert open_journal(path, {}).resumed == 0


def test_an_interrupted_calibration_goes_on_and_leaves_only_its_result(tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    notes: list[str] = []

    def stop_at_the_dense_part(done: int, total: int, note: str) -> None:
        if note.startswith("dense part"):
            raise KeyboardInterrupt
        notes.append(note)

    with pytest.raises(KeyboardInterrupt):
        calibrate_device("cpu", models=[TINY], bits=("32",), out=out, extent=LEAST, progress=stop_at_the_dense_part)
    kept = journal_path(out)
    assert list(tmp_path.iterdir()) == [kept]
    parts = set(json.loads(kept.read_text())["parts"])
    assert {"0 ceilings", "1 the engine's own costs"} < parts and not any("dense" in name for name in parts)

    later: list[str] = []
    found = calibrate_device("cpu", models=[TINY], bits=("32",), out=out, extent=LEAST,
                             progress=lambda done, total, note: later.append(note))  # fmt: skip
    assert later[0] == f"going on after {len(parts)} parts that are done"
    assert not set(notes) & set(later[1:])
    assert {path.name for path in tmp_path.iterdir()} == {"here.json", "here.samples.json"}
    assert {"memory", "copy", "dense", "expert", "host", "run_expert"} <= {s.kind for s in found.samples}


@pytest.mark.parametrize("name", ["cpu.txt", "absent/cpu.json"])
def test_a_place_that_will_not_do_is_refused_before_measuring(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"output = .*cpu"):
        calibrate_device("cpu", models=[TINY], bits=("32",), out=tmp_path / name, extent=LEAST)
    assert list(tmp_path.iterdir()) == []
