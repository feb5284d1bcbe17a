"""The recording's file: what is written comes back, every rule is enforced, nothing half-written remains."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moeplan.base.errors import InputError
from moeplan.traces.domains import decode_domains, encode_domains
from moeplan.traces.format import (
    LoadProfile,
    TraceWriter,
    load_profile,
    load_recording,
    load_trace,
    save_profile,
    save_trace,
    validate_trace,
)
from small_traces import same, small_trace

LONG = os.environ.get("MOEPLAN_LONG") == "1"


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    """Return a copy of `array` with one entry changed."""
    copy = array.copy()
    copy[index] = value
    return copy


def test_a_saved_trace_comes_back_and_is_mapped(tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "t.safetensors")
    trace = load_trace(tmp_path / "t.safetensors")
    same(small_trace(), trace)
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (5, 3, 2)
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0, 0, 0] = 1
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_the_file_is_plain_safetensors_with_strings_in_its_header(tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "t.safetensors")
    tensors = load_file(tmp_path / "t.safetensors")
    assert sorted(tensors) == ["experts", "phase", "position", "predicted", "predicted_prob", "request", "weights"]
    assert np.array_equal(tensors["experts"], small_trace().experts)
    raw = (tmp_path / "t.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {
        "kind": "routing",
        "layer_ids": "[1, 2, 5]",
        "licence": "CC0",
        "metadata.a": "",
        "metadata.note": "five tokens — «ünïcode»",
        "model": "tiny",
        "num_experts": "6",
        "producer": header["__metadata__"]["producer"],
        "schema_version": "1",
        "source": "by hand",
    }
    assert header["__metadata__"]["producer"].startswith("moeplan ")


def test_equal_recordings_are_equal_files_however_they_were_chunked(tmp_path: Path) -> None:
    trace = small_trace(metadata={"b": "2", "a": "1"})
    save_trace(trace, tmp_path / "whole")
    with TraceWriter(tmp_path / "chunked", like=small_trace(metadata={"a": "1", "b": "2"})) as writer:
        for start, stop in ((0, 1), (1, 4), (4, 5)):
            writer.append(
                experts=trace.experts[start:stop].astype(np.int64),
                request=trace.request[start:stop],
                position=trace.position[start:stop].tolist(),  # type: ignore[arg-type]
                phase=trace.phase[start:stop],
                weights=trace.weights[start:stop].astype(np.float64),
                predicted=trace.predicted[start:stop],
                predicted_prob=trace.predicted_prob[start:stop],
            )
        writer.finish()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "chunked").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts": changed(small_trace().experts, (3, 1, 0), 6)},
            r"experts\[3, 1, 0\] = 6: .*below num_experts \(6\)",
        ),
        (
            {"experts": changed(small_trace().experts, (2, 2, 1), 1)},
            r"experts\[2, 2\] = \[1, 1\]: expert 1 occurs twice",
        ),
        ({"experts": small_trace().experts[:0]}, "zero tokens"),
        ({"experts": small_trace().experts.astype(np.int32)}, "must be uint8 or uint16"),
        ({"experts": small_trace().experts[0]}, "must be .num_tokens, num_layers, top_k"),
        ({"num_experts": 1}, "top_k = 2"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"num_experts": 1 << 16}, "num_experts = 65536"),
        (
            {"weights": changed(small_trace().weights, (4, 0, 1), np.nan)},
            r"weights\[4, 0, 1\] = nan: weights must be finite",
        ),
        ({"weights": changed(small_trace().weights, (4, 0, 1), np.inf)}, "weights must be finite"),
        ({"weights": np.zeros((5, 3, 3), np.float16)}, r"weights = \(5, 3, 3\)"),
        ({"weights": np.zeros((5, 3, 2), np.float32)}, "weights = 'float32': must be float16"),
        ({"request": np.zeros(4, np.int32)}, r"request = \(4,\)"),
        ({"request": np.zeros(5, np.int64)}, "request = 'int64': must be int32"),
        ({"request": np.array([0, 0, 0, -1, -1], np.int32)}, r"request\[3\] = -1: must not be negative"),
        ({"request": np.array([7, 7, 7, 0, 0], np.int32)}, r"\(request, position\)\[3\] = \(0, 0\): .*sorted"),
        (
            {"position": np.array([0, 1, 1, 0, 5], np.int32)},
            r"\(request, position\)\[2\] = \(0, 1\): .*strictly increasing",
        ),
        ({"phase": np.array([0, 0, 2, 0, 1], np.uint8)}, r"phase\[2\] = 2: must be 0 \(prefill\) or 1"),
        ({"phase": np.array([0, 1, 0, 0, 1], np.uint8)}, r"phase\[2\] = 0: prefill after decode"),
        ({"layer_ids": (1, 2)}, "layer_ids = '2 entries'"),
        ({"layer_ids": (1, 5, 5)}, "strictly increasing"),
        ({"layer_ids": (-1, 2, 5)}, "strictly increasing"),
        (
            {"predicted": changed(small_trace().predicted, (1, 2, 1, 0), 6)},
            r"predicted\[1, 2, 1\] = 6: guesses must be -1",
        ),
        ({"predicted": changed(small_trace().predicted, (1, 2, 1, 0), -2)}, "guesses must be -1"),
        (
            {"predicted": changed(small_trace().predicted, (1, 2, 1, 0), 4)},
            r"\[1, 2, 1\] = \[4, 4\]: expert 4 is guessed twice",
        ),
        (
            {"predicted": changed(small_trace().predicted, (1, 1, 1, 0), 4)},
            "a guess made 2 layers earlier needs 2 earlier layers",
        ),
        ({"predicted": None}, "probabilities without guesses"),
        ({"predicted": small_trace().predicted[:, :, :, :0]}, "width must be 1 to num_experts"),
        (
            {"predicted_prob": changed(small_trace().predicted_prob, (1, 2, 0, 1), np.nan)},
            r"predicted_prob\[1, 2, 0, 1\] = nan",
        ),
        ({"predicted_prob": changed(small_trace().predicted_prob, (0, 0, 0, 0), 0.5)}, "0 where there is no guess"),
        ({"model": 5}, "model = 5: must be a string"),
        ({"metadata": {"note": "\ud800"}}, "UTF-8"),
    ],
)
def test_every_rule_is_enforced_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        validate_trace(small_trace(**changes))
    with pytest.raises(InputError, match=message):
        save_trace(small_trace(**changes), tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


def test_rules_hold_across_chunk_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.traces.validate.row_chunks", lambda rows, _: [(t, t + 1) for t in range(rows)])
    validate_trace(small_trace())
    with pytest.raises(InputError, match=r"\(request, position\)\[2\]"):
        validate_trace(small_trace(position=np.array([0, 1, 1, 0, 5], np.int32)))
    with pytest.raises(InputError, match=r"experts\[4, 0, 1\] = 9"):
        validate_trace(small_trace(experts=changed(small_trace().experts, (4, 0, 1), 9)))


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path: Path) -> None:
    trace = small_trace()
    columns = {"request": trace.request, "position": trace.position, "phase": trace.phase}
    with TraceWriter(tmp_path / "t", num_experts=6, layer_ids=(0, 1, 2)) as writer:
        writer.append(experts=trace.experts, **columns)
    assert os.listdir(tmp_path) == []
    with TraceWriter(tmp_path / "t", num_experts=6, layer_ids=(0, 1, 2)) as writer:
        writer.append(experts=trace.experts, **columns)
        with pytest.raises(InputError, match="same columns"):
            writer.append(experts=trace.experts, weights=trace.weights, **columns)
        with pytest.raises(InputError, match="rows must have shape"):
            writer.append(experts=trace.experts[:, :2], **columns)
        with pytest.raises(InputError, match="cannot hold"):
            writer.append(experts=trace.experts.astype(np.int64) + 256, **columns)
        with pytest.raises(InputError, match="cannot hold"):
            writer.append(experts=np.full(trace.experts.shape, np.nan), **columns)
        writer.append(experts=trace.experts, **columns)  # the same rows again break the order
        with pytest.raises(InputError, match="sorted by request"):
            writer.finish()
    assert os.listdir(tmp_path) == []
    with TraceWriter(tmp_path / "t", num_experts=6, layer_ids=(0, 1, 2)) as writer:
        writer.append(experts=trace.experts, weights=np.full(trace.experts.shape, 1e9), **columns)
        with pytest.raises(InputError, match="weights must be finite"):
            writer.finish()
    with TraceWriter(tmp_path / "t", num_experts=6) as writer, pytest.raises(InputError, match="zero tokens"):
        writer.finish()
    with pytest.raises(InputError, match="num_experts"):
        TraceWriter(tmp_path / "t")
    with pytest.raises(InputError, match=r"path = .*cannot be written"):
        save_trace(trace, tmp_path / "no such folder" / "t")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(InputError):
        save_trace(small_trace(num_experts=3), tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before
    save_trace(small_trace(model="other"), tmp_path / "t")
    assert load_trace(tmp_path / "t").model == "other"


def test_load_profiles_come_back_and_are_told_apart(tmp_path: Path) -> None:
    windows = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    profile = LoadProfile(
        counts=windows.sum(axis=0), windows=windows, window_unit="iteration", top_k=2,
        model="m", layer_ids=(3, 4, 5), source="s", licence="l", metadata={"k": "v"},
    )  # fmt: skip
    save_profile(profile, tmp_path / "p")
    save_trace(small_trace(), tmp_path / "t")
    back = load_profile(tmp_path / "p")
    assert np.array_equal(back.counts, profile.counts) and np.array_equal(back.windows, windows)
    scalars = (back.window_unit, back.top_k, back.model, back.layer_ids, back.source, back.licence, dict(back.metadata))
    assert scalars == ("iteration", 2, "m", (3, 4, 5), "s", "l", {"k": "v"})
    assert (back.num_layers, back.num_experts) == (3, 4)
    with pytest.raises(InputError, match="holds expert loads only"):
        load_trace(tmp_path / "p")
    with pytest.raises(InputError, match="holds routing"):
        load_profile(tmp_path / "t")
    for change, message in [
        ({"windows": windows + 1}, "must equal counts"),
        ({"counts": -profile.counts, "windows": None}, "must not be negative"),
        ({"counts": np.zeros((3, 4), np.int64), "windows": None}, "at least one counted token"),
        ({"counts": profile.counts.astype(np.float64)}, "must be int64"),
        ({"counts": np.full((3, 4), 1 << 60), "windows": None}, "sum to at most"),
        ({"windows": windows[:, :2]}, "windows"),
        ({"top_k": 5}, "top_k = 5"),
        ({"layer_ids": (3,)}, "layer_ids"),
    ]:
        with pytest.raises(InputError, match=message):
            save_profile(dataclasses.replace(profile, **change), tmp_path / "q")
    assert sorted(os.listdir(tmp_path)) == ["p", "t"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema_version":"1"', b'"schema_version":"9"', "schema_version = '9'"),
        (b'"kind":"routing"', b'"kind":"rooting"', "kind = 'rooting'"),
        (b'"num_experts":"6"', b'"num_experts":"x"', "num_experts = 'x'"),
        (b'"layer_ids":"[1, 2, 5]"', b'"layer_ids":"[1, 2, {]"', "layer_ids"),
        (b'"phase":{', b'"phasx":{', "tensor 'phase' is missing"),
        (b'"dtype":"I32"', b'"dtype":"F32"', "has type F32"),
    ],
)
def test_a_wrong_header_is_named(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    save_trace(small_trace(), tmp_path / "t")
    raw = (tmp_path / "t").read_bytes()
    assert old in raw and len(old) == len(new)
    (tmp_path / "t").write_bytes(raw.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        load_recording(tmp_path / "t")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello")
    for name in ("empty", "text", "missing", "\0", "."):
        with pytest.raises(InputError, match="safetensors") as caught:
            load_trace(tmp_path / name)
        assert "\n" not in str(caught.value) and caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_offsets": [0, 24]}, "does not lie where its shape"),
        ({"shape": [6]}, "does not lie where its shape"),
        ({"shape": [-5]}, "are no sizes"),
        ({"shape": [5.0]}, "are no sizes"),
        ({"data_offsets": [0]}, "not enough values"),
        ({"data_offsets": [-4, 16]}, "are no sizes"),
    ],
)
@pytest.mark.parametrize("library", [True, False])
def test_tensors_must_fill_the_file(
    changes: dict[str, Any], message: str, library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trace(small_trace(), tmp_path / "t")
    raw = (tmp_path / "t").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["position"] |= changes
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    if not library:
        monkeypatch.setattr("moeplan.traces.files.container._ask_library", lambda path: None)
    with pytest.raises(InputError, match="cannot be read as a safetensors file" if library else message):
        load_trace(tmp_path / "t")
    (tmp_path / "t").write_bytes(raw + b"\0" * 8)
    with pytest.raises(InputError, match="safetensors file"):
        load_trace(tmp_path / "t")


@settings(max_examples=5000 if LONG else 150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_line(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    if not (folder / "good").exists():
        save_trace(small_trace(), folder / "good")
    raw = bytearray((folder / "good").read_bytes())
    cut = data.draw(st.integers(0, len(raw)))
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4))
    for at, value in flips:
        raw[at] = value
    (folder / "bad").write_bytes(raw[:cut] if data.draw(st.booleans()) else raw)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # as on a machine without the safetensors library
            patch.setattr("moeplan.traces.files.container._ask_library", lambda path: None)
        try:
            trace = load_trace(folder / "bad")
        except InputError as error:
            refusal = str(error)
        else:  # a flip may leave the file valid; then it must pass every rule
            validate_trace(trace)
            refusal = ""
    assert "\n" not in refusal


def test_domains_come_back_for_every_request() -> None:
    request = np.array([0, 0, 3, 3, 4, 9], dtype=np.int32)
    domain = np.array([1, 1, 1, 1, 0, 1])
    text = encode_domains(["law", "code"], request, domain)
    assert json.loads(text) == {"names": ["law", "code"], "runs": [[0, 1], [4, 0], [9, 1]]}
    names, index = decode_domains({"domains": text}, request)
    assert names == ["law", "code"] and index.tolist() == domain.tolist()
    listed = json.dumps(["a", "-", "-", "b", "a", "-", "-", "-", "-", "b"])  # one name per request
    names, index = decode_domains({"domains": listed}, request)
    assert [names[i] for i in index] == ["a", "a", "b", "b", "a", "b"]
    assert decode_domains({}, request)[0] == [""] and not decode_domains({}, request)[1].any()
    with pytest.raises(InputError, match="one request has two domains"):
        encode_domains(["law", "code"], request, np.array([1, 0, 1, 1, 0, 1]))
    with pytest.raises(InputError, match="domain = 2: must be 0 to 1"):
        encode_domains(["law", "code"], request, domain + 1)
    for wrong in (
        "",
        "[]",
        '["a"]',
        "[1, 2]",
        '{"names": [1], "runs": [[0, 0]]}',
        '{"names": ["a"], "runs": [[0, 1]]}',
        '{"names": [], "runs": []}',
    ):
        with pytest.raises(InputError, match="domains"):
            decode_domains({"domains": wrong}, request)


_MEMORY_SCRIPT = """
import resource, sys
import numpy as np
from moeplan.traces.format import TraceWriter, load_trace
path, tokens = sys.argv[1], int(sys.argv[2])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TraceWriter(path, num_experts=64, layer_ids=tuple(range(24))) as writer:
    for first in range(0, tokens, 4096):
        t = np.arange(first, min(first + 4096, tokens))
        ids = (t[:, None, None] + np.arange(24)[:, None] + 7 * np.arange(8)) % 64
        writer.append(experts=ids, request=t // 1000, position=t % 1000, phase=np.ones(len(t), np.uint8))
    writer.finish()
assert load_trace(path).num_tokens == tokens
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_writing_and_checking_take_constant_memory(tmp_path: Path) -> None:
    path = os.pathsep.join([*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    grown = []
    for tokens in (20_000, 400_000):  # 3.8 and 76.8 MB of choices
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY_SCRIPT, str(tmp_path / "t"), str(tokens)],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown.append(int(done.stdout) * 1024)
    assert resource.getpagesize() and grown[1] - grown[0] < 16 * 2**20
