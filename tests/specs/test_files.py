"""Files in and out: one complaint for whatever is wrong, whole files or none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from house import ROOT
from long_runs import examples
from moeplan.base.errors import InputError, UnknownName
from moeplan.base.json_files import parse_json, read_json, read_text
from moeplan.base.text_files import write_atomic
from moeplan.specs.catalog import HARDWARE_FOLDER, MODELS_FOLDER
from moeplan.specs.machines.profile_file import list_hardware, load_hardware
from moeplan.specs.models.load import list_models, load_model

# --- reading -----------------------------------------------------------------------------------------------------------


def test_reads_an_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('\ufeff{"a": [1, 2.5, null]}', encoding="utf-8")  # some editors begin files with a mark
    assert read_json(file, "thing") == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"), (b"  \n", "empty"), (b'{"a": 1', "JSON that ends too early"), (b'{"a": ', "JSON that ends too early"),
        (b"{'a': 1}", "not JSON"), (b"[1]", "a JSON list where an object is expected"), (b"null", "a JSON NoneType where"),
        (b'{"a": 1} x', "not JSON"), (b"\xff\xfe", "not UTF-8 text"), (b"{}\x00", "not text"), (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(file, "thing")
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("thing = ")


def test_absent_unreadable_and_large_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "none.json", "thing")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path, "thing")
    with pytest.raises(InputError, match="cannot be read"):
        read_text("a\0b", "thing")
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(InputError, match="larger than 100 bytes"):
        read_text(tmp_path / "large", "thing", max_bytes=100)
    assert read_text(tmp_path / "large", "thing", max_bytes=101) == "x" * 101


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        assert isinstance(parse_json(text, "thing", "text"), dict)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_truncation_is_named_as_such(cut: int) -> None:
    text = json.dumps(json.loads((MODELS_FOLDER / "mixtral-8x7b.json").read_text(encoding="utf-8")))
    with pytest.raises(InputError) as caught:
        parse_json(text[:cut], "model", "x")
    # A cut inside a string or a word is seen as such by the parser; everywhere else the text just ends.
    assert "ends too early" in str(caught.value) or "not JSON" in str(caught.value)


# --- writing -----------------------------------------------------------------------------------------------------------


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "é\n")
    write_atomic(tmp_path / "b", b"\x00\xff")
    write_atomic(tmp_path / "a", "two")
    assert (tmp_path / "a").read_bytes() == b"two" and (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    write_atomic(target, "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="no space left on device"):
        write_atomic(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "plan.json", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/plan.json", "a\0b", "folder"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"output = .*cannot be written"):
        write_atomic(os.path.join(tmp_path, name), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# --- by name or by path ------------------------------------------------------------------------------------------------


def test_bundled_names() -> None:
    first = {"mixtral-8x7b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3-30b-a3b", "switch-large-128", "tiny-moe"}
    assert first <= set(list_models()) == {path.stem for path in MODELS_FOLDER.iterdir()}
    machines = {"a100-80gb-sxm", "h200-sxm", "rtx-4090", "rtx-3060", "t4", "h100-sxm", "h800-sxm", "b200-sxm"}
    assert machines <= set(list_hardware()) == {path.stem for path in HARDWARE_FOLDER.iterdir()}


def test_the_bundled_tiny_model_is_the_trained_one() -> None:
    trained = ROOT / "examples" / "tiny_moe" / "config.json"
    assert json.loads((MODELS_FOLDER / "tiny-moe.json").read_text(encoding="utf-8")) == read_json(trained, "model")


def test_models_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_bytes((MODELS_FOLDER / "olmoe-1b-7b.json").read_bytes())
    (tmp_path / "other.json").write_bytes((MODELS_FOLDER / "olmoe-1b-7b.json").read_bytes())
    by_folder, by_file, alone = (
        load_model(folder),
        load_model(folder / "config.json"),
        load_model(tmp_path / "other.json"),
    )
    assert by_folder == by_file and by_folder.name == "my-model" and alone.name == "other"
    assert by_folder.total_parameters == load_model("olmoe-1b-7b").total_parameters


@pytest.mark.parametrize("load", [load_model, load_hardware])
def test_unknown_words_and_absent_paths(load: type) -> None:
    with pytest.raises(UnknownName, match="not one of: "):
        load("no-such-thing")
    for path in ("nothing.json", "./nothing", "/nothing/config.json"):
        with pytest.raises(InputError, match="no such file"):
            load(path)


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gpt-oss-20b'"):
        load_model("gpt-oss-20")
    with pytest.raises(UnknownName, match="did you mean 'rtx-4090'"):
        load_hardware("rtx4090")


@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_garbage_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "garbage.json"
    file.write_bytes(content)
    for load in (load_model, load_hardware):
        with pytest.raises(InputError) as caught:
            load(file)
        assert len(str(caught.value).splitlines()) == 1
