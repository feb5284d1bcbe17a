"""Readers against damaged and hostile files: nothing but InputError comes out, and nothing in a file is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle  # only to write hostile files
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces_upstream as upstream
from damaged_recordings import CASES, RNG_SEED
from moeplan.base.errors import InputError
from moeplan.traces.format import RoutingTrace, validate_load, validate_trace
from moeplan.traces.readers import READERS, import_trace

# Damaged inputs per reader, and how many of them must differ from each other and from the undamaged one.
NUM_EXAMPLES, NUM_DISTINCT = (3000, 2000) if os.environ.get("MOEPLAN_LONG") == "1" else (100, 50)


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [[1, [2]]], {"routed_experts": 1}, -1, 0, 2**31, 2**63, 1e300]),
)  # fmt: skip


def _flipped(data: st.DataObject, raw: bytes) -> bytes:
    """Return `raw` with some bytes changed and perhaps its end cut off or some bytes repeated."""
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 4))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    how = data.draw(st.sampled_from(["keep", "cut", "insert", "interesting"]))
    at = data.draw(st.integers(0, len(changed)))
    if how == "cut":
        del changed[at:]
    elif how == "insert":
        changed[at:at] = data.draw(st.binary(max_size=9))
    elif how == "interesting":
        number = data.draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
        packed = struct.pack("<Q", number)[: data.draw(st.sampled_from([1, 2, 4, 8]))]
        changed[at : at + len(packed)] = packed
    return bytes(changed)


def _repacked(data: st.DataObject, raw: bytes) -> bytes:
    """Return a zip archive with one member damaged and every checksum right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(out, "w") as packed:
        names = archive.namelist()
        chosen = data.draw(st.sampled_from(names))
        for name in names:
            content = archive.read(name)
            if name == chosen:
                how = data.draw(st.sampled_from(["flip", "drop", "twice"]))
                if how == "drop":
                    continue
                content = _flipped(data, content) if how == "flip" else content + content
            packed.writestr(name, content)
    return out.getvalue()


def _edited(data: st.DataObject, value: Any) -> Any:
    """Return a JSON value with one node somewhere in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: _edited(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], _edited(data, value[at]), *value[at + 1 :]]
    how = data.draw(st.sampled_from(["replace", "remove", "double"]))
    if how == "remove" and isinstance(value, dict) and value:
        gone = data.draw(st.sampled_from(sorted(value)))
        return {key: inner for key, inner in value.items() if key != gone}
    if how == "double" and isinstance(value, list):
        return value + value[:1]
    return data.draw(_LEAVES)


def _json_edited(data: st.DataObject, raw: bytes) -> bytes:
    """Return JSON, or JSON lines, with one node edited."""
    lines = raw.decode().splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(_edited(data, json.loads(lines[at])))
    return "\n".join(lines).encode()


def _mutated(data: st.DataObject, name: str, raw: bytes) -> bytes:
    """Return damaged contents of a file."""
    special = {".json": _json_edited, ".jsonl": _json_edited, ".pt": _repacked, ".npz": _repacked}.get(
        Path(name).suffix
    )
    if special is not None and data.draw(st.integers(0, 3)):
        return special(data, raw)
    return _flipped(data, raw)


def _files(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("*") if file.is_file())


def _import(kind: str, path: Path, options: dict[str, Any]) -> None:
    """Import; whatever comes out is either a recording that passes every rule or an InputError of one line."""
    refusal = ""
    recording: Any = None
    try:
        recording = import_trace(kind, path, **options)
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if recording is None:
        assert refusal
    elif isinstance(recording, RoutingTrace):
        validate_trace(recording)
    else:
        validate_load(recording)


@pytest.mark.parametrize("case", sorted(CASES))
def test_damaged_files_give_input_errors_only(case: str, tmp_path: Path) -> None:
    kind, make, options = CASES[case]
    (tmp_path / "good").mkdir()
    path = make(tmp_path / "good", np.random.default_rng(RNG_SEED))
    import_trace(kind, path, **options)  # the undamaged input is fine
    originals = {file: file.read_bytes() for file in _files(tmp_path / "good")}
    seen: set[tuple[Path, bytes]] = set()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def damage(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(originals)))
        damaged = _mutated(data, file.name, originals[file])
        seen.add((file, damaged))
        file.write_bytes(damaged)
        try:
            _import(kind, path, options)
        finally:
            file.write_bytes(originals[file])

    damage()
    different = len(seen - set(originals.items()))
    assert different >= NUM_DISTINCT, f"{case}: only {different} different damaged inputs"
    assert _files(tmp_path / "good") == sorted(originals)


def test_every_reader_is_attacked() -> None:
    assert {kind for kind, _, _ in CASES.values()} == set(READERS)


class _Bomb:
    """Pickles to a call that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def _torch_archive(pickled: bytes, path: Path) -> None:
    """Write a file in the layout of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")


@pytest.mark.parametrize("kind", ["sglang-stat", "sglang-per-pass", "sglang-per-token", "verl", "hf-router-logits"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing(kind: str, protocol: int, tmp_path: Path) -> None:
    created = tmp_path / "created"
    hostile = pickle.dumps({"logical_count": _Bomb(created)}, protocol=protocol)
    (tmp_path / "in").mkdir()
    _torch_archive(hostile, tmp_path / "in" / "dump.pt")
    told = {"top_k": 1} if kind == "hf-router-logits" else {}
    with pytest.raises(InputError, match="more than plain tensors"):
        import_trace(kind, tmp_path / "in" / "dump.pt", **told)
    (tmp_path / "in" / "dump.pt").write_bytes(hostile)  # the bare pickle of old torch versions
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        import_trace(kind, tmp_path / "in" / "dump.pt", **told)
    assert not created.exists()
    pickle.loads(hostile)["logical_count"].close()  # the pickle is really loaded here: it does create the file
    assert created.exists()


@pytest.mark.parametrize(("kind", "name"), [("npz", "t.npz"), ("moe-infinity", "t.npy"), ("npy", "t.npy")])
def test_hostile_numpy_files_run_nothing(kind: str, name: str, tmp_path: Path) -> None:
    created = tmp_path / "created"
    array = np.array([_Bomb(created)], dtype=object)
    (np.savez if name.endswith("z") else np.save)(tmp_path / name, array)
    with pytest.raises(InputError, match="not a plain number or text"):
        import_trace(kind, tmp_path / name)
    assert not created.exists()


@pytest.mark.parametrize("order", ["<", ">"])
def test_text_of_characters_that_do_not_exist_is_refused(order: str, tmp_path: Path) -> None:
    columns = {"experts": np.zeros((1, 1, 1), np.uint8), "seq": [0], "pos": [0], "domain": [0], "meta": {"experts": 1}}
    bad = np.array([0x110000], f"{order}u4").view(f"{order}U1")
    upstream.npz(tmp_path / "t.npz", **columns, domain_names=bad)
    with pytest.raises(InputError, match="a character that does not exist"):
        import_trace("npz", tmp_path / "t.npz")
    upstream.npz(tmp_path / "t.npz", **columns, domain_names=np.array(["\U0010ffff"], f"{order}U1"))
    import_trace("npz", tmp_path / "t.npz")


def test_announced_sizes_are_not_believed(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 40, 4, 8)})
    (tmp_path / "t.npy").write_bytes(header.getvalue() + b"\0" * 64)
    with pytest.raises(InputError, match="needs more bytes than"):
        import_trace("moe-infinity", tmp_path / "t.npy")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    with pytest.raises(InputError, match="announces 1152921504606846976 tensors"):
        import_trace("llama-imatrix", tmp_path / "m.gguf")
    _, _, torch_like = CASES["sglang-stat"]
    upstream.torch_save({"logical_count": np.ones((1, 1, 1), np.int32)}, tmp_path / "small.pt")
    import torch

    wide = torch.ones((1, 1, 1), dtype=torch.int32).expand(1 << 20, 1 << 10, 1 << 10)
    torch.save({"logical_count": wide}, tmp_path / "wide.pt")
    with pytest.raises(InputError, match="claims more numbers than it stores"):
        import_trace("sglang-stat", tmp_path / "wide.pt", **torch_like)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000 + "]" * 200_000)
    for kind, options in (
        ("sglang-stat", {}),
        ("vllm-routed-experts", {}),
        ("sglang-routed-experts", {"num_layers": 1, "top_k": 1}),
    ):
        with pytest.raises(InputError):
            import_trace(kind, tmp_path / "deep.json", **options)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
@pytest.mark.parametrize("kind", sorted(READERS))
def test_devices_without_an_end_are_refused(kind: str) -> None:
    needed = {"sglang-routed-experts": {"num_layers": 1, "top_k": 1}, "hf-router-logits": {"top_k": 1}}
    with pytest.raises(InputError):
        import_trace(kind, "/dev/zero", **needed.get(kind, {}))
