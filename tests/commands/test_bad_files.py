"""Files that are wrong in every way that is not their format: endless, huge, deep, with keys twice and numbers that are none."""

from __future__ import annotations

import io
import json
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base import plain_json, plain_yaml
from moeplan.base.errors import InputError, UnknownName, visible
from moeplan.commands.parts.own_speeds import Named, open_speeds
from moeplan.executor.validation.grid import read_grid
from moeplan.specs.catalog import HARDWARE_FOLDER
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.traces.format import load_trace
from moeplan.traces.readers import READERS, import_trace

MIB = 2**20
NEEDED = {"sglang-routed-experts": {"num_layers": 1, "top_k": 1}}


@pytest.fixture
def little_memory():
    """Let this process take no more than half a GiB beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 512 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert text.isprintable() and len(text) < 1700
    return text


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("file", ["/dev/zero", "sparse"])
def test_endless_and_sparse_files_are_refused_at_once(
    kind: str, file: str, tmp_path: Path, little_memory: None
) -> None:
    path = Path(file)
    if file == "sparse":
        path = tmp_path / f"sparse{'.pt' if 'sglang' in kind else '.npy'}"
        with open(path, "wb") as out:
            out.truncate(40 << 30)
    with pytest.raises(InputError) as error:
        import_trace(kind, path, **NEEDED.get(kind, {}))
    refusal(error)


def open_llama_bench(path: object) -> None:
    open_speeds(Named(tool="llama-bench", path=path, hardware="rtx-4090"))


def open_vllm_bench(path: object) -> None:
    open_speeds(Named(tool="vllm-bench", path=path, hardware="h100"))


@pytest.mark.parametrize(
    "open_file", [load_model, load_hardware, load_trace, read_grid, open_llama_bench, open_vllm_bench]
)
def test_devices_folders_and_long_names_are_refused(open_file, tmp_path: Path, little_memory: None) -> None:
    for path in (
        "/dev/zero",
        tmp_path / "folder.json",
        "x" * 5000 + ".json",
        "x/" * 3000,
        "nul\0.json",
        f"{tmp_path}/\x1b[2J.json",
    ):
        (tmp_path / "folder.json").mkdir(exist_ok=True)
        with pytest.raises(InputError) as error:
            open_file(path)
        refusal(error)


def test_archives_that_unpack_to_gigabytes_are_refused(tmp_path: Path, little_memory: None) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (3 << 30,)})
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("experts.npy", "w", force_zip64=True) as out,
    ):
        out.write(header.getvalue())
        for _ in range(48):
            out.write(bytes(64 * MIB))
    assert (tmp_path / "bomb.npz").stat().st_size < 4 * MIB
    with pytest.raises(InputError, match=r"unpacks to 3\.00 GiB"):
        import_trace("npz", tmp_path / "bomb.npz")


@given(st.recursive(st.none() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))  # fmt: skip
def test_plain_json_reads_what_json_writes(value: object) -> None:
    assert plain_json.parse(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ('{"a": NaN}', "NaN where a finite number"), ("[-Infinity]", "-Infinity where"), ("1e999", "too large"),
        ("1" * 5000, "thousands of digits"), ("[" * 100_000, "nested too deeply"), ("", "empty"), ("  ", "empty"),
        ('{"a": ', "ends too early"), ("{'a': 1}", "line 1, column 2"),
    ],
)  # fmt: skip
def test_plain_json_says_in_a_few_words_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        plain_json.parse(text)
    assert len(str(error.value)) < 150
    if "where" in reason:
        plain_json.parse(text, allow_nan=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1:30", {"a": "1:30"}), ("a: 190:20:30", {"a": "190:20:30"}), ("a: no", {"a": "no"}), ("a: 010", {"a": 10}),
        ("a: 0x1f", {"a": "0x1f"}),
        ("a: 2026-01-02", {"a": "2026-01-02"}), ("a: 1e3", {"a": 1000.0}), ("a: 1_000", {"a": "1_000"}), ("a: .nan", {"a": ".nan"}),
        ("a: [true, null, ~, -3, 2.5, '7']", {"a": [True, None, None, -3, 2.5, "7"]}), ("a:", {"a": None}), ("<<: 1", {"<<": 1}),
    ],
)  # fmt: skip
def test_plain_yaml_reads_what_is_written(text: str, value: object) -> None:
    assert plain_yaml.parse(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice, at line 3"), ("a: " + "1" * 5000, "a number of 5000 digits at line 1"),
        ("a: &x [1]\nb: *x", "the alias .x: write it out"), ("[" * 5000, "nested too deeply"), ("a: [1", "not YAML at line 1"),
        ("? [1]\n: 2", "a key that is no text"), ("a: \x07", "not YAML"), ("!!python/object:os.system x", "not YAML"),
    ],
)  # fmt: skip
def test_plain_yaml_says_in_a_few_words_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        plain_yaml.parse(text)
    assert len(str(error.value)) < 250


def test_a_laughing_grid_takes_no_memory(tmp_path: Path, little_memory: None) -> None:
    lines = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "g.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="alias"):
        read_grid(tmp_path / "g.yaml")


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("device", "launch_s", "relative_uncertainty"), 1e25, "at most 100"),
        (("device", "memory_bytes", "value"), 0, "bytes from"),
        (("host", "memory_bytes", "value"), 0, "bytes from"),
        (("device", "memory_bytes", "value"), "DIGITS", "digits"),
        (("name",), ["x"] * 100_000, "valid string"),
    ],
)
def test_machines_with_impossible_figures_are_refused(
    path: tuple[str, ...], value: object, rule: str, tmp_path: Path
) -> None:
    document = json.loads((HARDWARE_FOLDER / "t4.json").read_text())
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(document).replace('"DIGITS"', "1" + "0" * 5000))
    with pytest.raises(InputError, match=rule) as error:
        load_hardware(tmp_path / "m.json")
    refusal(error)


def test_a_machine_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    text = (HARDWARE_FOLDER / "t4.json").read_text()
    (tmp_path / "m.json").write_text(text.replace('"name":', '"name": "other", "name":', 1))
    with pytest.raises(InputError, match="the key 'name' stands twice"):
        load_hardware(tmp_path / "m.json")


@given(st.text(min_size=1), st.one_of(st.text(), st.integers(), st.binary(), st.just(10**5000)), st.text(), st.text())
def test_every_message_is_one_line_that_can_be_shown(field: str, value: object, rule: str, remedy: str) -> None:
    long = InputError(field * 5000, [value] * 5000, rule * 5000, remedy * 5000)
    for error in (InputError(field, value, rule, remedy), UnknownName(field, value, [rule, remedy]), long):
        text = str(error)
        assert len(text) < 1700 and text == visible(text) and "\n" not in text
        text.encode("utf-8")


def test_paths_keep_their_end() -> None:
    path = "/a/very/long/path/" + "deep/" * 100 + "wrong.json"
    said = str(InputError("model", path, "no such file", "check the path"))
    assert said.startswith("model = '/a/very/long/path/") and "wrong.json'" in said


@pytest.mark.parametrize(
    "wrong", ["cache_experts_per_layer: 4", "concurrency: 1", "calibrate: {bits: 32}", "calibrate: {shapes: 3}"]
)
def test_a_grid_with_a_number_for_a_list_is_refused(wrong: str, tmp_path: Path) -> None:
    text = "shapes: [{hidden: 768, intermediate: 1024}]\nschedules: [on-demand]\nbits: [32]\n"
    (tmp_path / "g.yaml").write_text(text)
    read_grid(tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text(f"{text}{wrong}\n")
    with pytest.raises(InputError, match="not a list"):
        read_grid(tmp_path / "g.yaml")
