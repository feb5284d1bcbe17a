"""Readers against damaged and hostile files: nothing but InputError comes out, and nothing in a file is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle  # only to write hostile files
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces_upstream as upstream
from moeplan.errors import InputError
from moeplan.traces.convert import convert
from moeplan.traces.format import RoutingTrace, validate_load, validate_trace
from moeplan.traces.readers import READERS, import_trace

# Damaged inputs per reader, and how many of them must differ from each other and from the undamaged one.
NUM_EXAMPLES, NUM_DISTINCT = (3000, 2000) if os.environ.get("MOEPLAN_LONG") == "1" else (100, 50)
RNG_SEED = 5


def _npz(folder: Path, rng: np.random.Generator) -> Path:
    ids = upstream.choices(rng, 6).astype(np.uint8)
    spec = np.full((6, 4, 1, 2), -1, np.int16)
    columns: dict[str, Any] = {"experts": ids, "seq": np.arange(6) // 3, "pos": np.arange(6) % 3, "spec": spec}
    columns |= {"weights": rng.random((6, 4, 2)).astype(np.float16), "domain": np.arange(6) // 3}
    upstream.npz(folder / "t.npz", **columns, domain_names=np.array(["a", "b"]), meta={"experts": 8, "model": "m"})
    return folder / "t.npz"


def _per_token(folder: Path, rng: np.random.Generator) -> Path:
    slots = upstream.slot_map(rng)
    requests = [(upstream.choices(rng, 5), 3), (upstream.choices(rng, 4), 2)]
    upstream.sglang_detail(upstream.per_token_passes(rng, slots, requests, chunk=2), slots, folder / "r_0.pt")
    return folder


def _per_pass(folder: Path, rng: np.random.Generator) -> Path:
    slots = upstream.slot_map(rng)
    passes = [{"physical": upstream.to_slots(rng, upstream.choices(rng, 4), slots), "positions": []} for _ in range(2)]
    upstream.sglang_detail(passes, slots, folder / "r_0.pt", per_token=False)
    return folder


def _counts(write: Callable[[np.ndarray, Path], None], name: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        write(rng.integers(0, 9, (2, 4, 8)), folder / name)
        return folder / name

    return make


def _loads(folder: Path, rng: np.random.Generator) -> Path:
    held = [rng.permutation(8).tolist() for _ in range(4)]
    records = [
        {"record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2,
         "expert_load": rng.integers(1, 9, (4, 8)).tolist(), "p2l_map": held}
        for step in range(2)
    ]  # fmt: skip
    (folder / "loads.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder / "loads.jsonl"


def _answers(write: Callable[..., dict[str, Any]], **options: Any) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        answers = [write(upstream.choices(rng, 4), 2, **options) for _ in range(2)]
        (folder / "answers.json").write_text(json.dumps(answers))
        return folder / "answers.json"

    return make


def _verl(suffix: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        upstream.verl([(upstream.choices(rng, 4), 2)], folder / f"batch{suffix}", 3, 3)
        return folder / f"batch{suffix}"

    return make


def _csv(folder: Path, rng: np.random.Generator) -> Path:
    upstream.llama_csv(upstream.choices(rng, 4), folder / "t.csv", [2, 1, 1])
    return folder / "t.csv"


def _imatrix(folder: Path, rng: np.random.Generator) -> Path:
    upstream.imatrix(rng.integers(0, 9, (4, 8)), folder / "m.gguf")
    return folder / "m.gguf"


def _rows(style: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        ids = upstream.choices(rng, 3)
        rows = [(0, t, layer, *ids[t, layer]) for t in range(3) for layer in range(4)]
        if style == "csv":
            text = "request,token,layer,expert_0,expert_1\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n"
            (folder / "t.csv").write_text(text)
            return folder / "t.csv"
        objects = [{"request": r, "token": t, "layer": n, "experts": [int(a), int(b)]} for r, t, n, a, b in rows]
        if style == "parquet":
            pq.write_table(pa.Table.from_pylist(objects), folder / "t.parquet")
            return folder / "t.parquet"
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
        return folder / "t.jsonl"

    return make


def _converted(folder: Path, rng: np.random.Generator) -> Path:
    convert(import_trace("npz", _npz(folder, rng)), "parquet", folder / "c.parquet")
    (folder / "t.npz").unlink()
    return folder / "c.parquet"


def _logits(folder: Path, rng: np.random.Generator) -> Path:
    upstream.torch_save({"router_logits": [rng.random((4, 8)).astype(np.float32) for _ in range(3)]}, folder / "l.pt")
    return folder / "l.pt"


def _layers(folder: Path, rng: np.random.Generator) -> Path:
    for layer in range(3):
        np.save(folder / f"layer{layer}.npy", upstream.choices(rng, 4)[:, layer])
    return folder


CASES: dict[str, tuple[str, Callable[[Path, np.random.Generator], Path], dict[str, Any]]] = {
    "npz": ("npz", _npz, {}),
    "sglang-stat": ("sglang-stat", _counts(upstream.sglang_stat, "s.pt"), {}),
    "sglang-stat-json": ("sglang-stat", _counts(upstream.sglang_stat, "s.json"), {}),
    "sglang-per-pass": ("sglang-per-pass", _per_pass, {}),
    "sglang-per-token": ("sglang-per-token", _per_token, {}),
    "sglang-routed-experts": ("sglang-routed-experts", _answers(upstream.sglang_answer), {"num_layers": 5, "top_k": 2}),
    "vllm-routed-experts": ("vllm-routed-experts", _answers(upstream.vllm_answer), {}),
    "vllm-routed-experts-split": ("vllm-routed-experts", _answers(upstream.vllm_answer, split=True), {}),
    "trtllm": ("trtllm", _counts(upstream.trtllm, "stat"), {}),
    "megatron": ("megatron", _counts(upstream.megatron, "tpe"), {"expert_parallel": 2}),
    "verl": ("verl", _verl(".pt"), {}),
    "verl-npz": ("verl", _verl(".npz"), {}),
    "llama-imatrix": ("llama-imatrix", _imatrix, {}),
    "llama-csv": ("llama-csv", _csv, {"top_k": 2}),
    "llama-csv-loads": ("llama-csv", _csv, {}),
    "jsonl": ("jsonl", _rows("jsonl"), {"num_experts": 8}),
    "csv": ("csv", _rows("csv"), {"num_experts": 8}),
    "parquet": ("parquet", _rows("parquet"), {"num_experts": 8}),
    "parquet-converted": ("parquet", _converted, {}),
    "npy": ("npy", _layers, {}),
    "hf-router-logits": ("hf-router-logits", _logits, {"top_k": 2}),
    "moe-infinity": ("moe-infinity", _counts(upstream.moe_infinity, "t.npy"), {}),
    "vllm-eplb-stats": ("vllm-eplb-stats", _loads, {}),
}

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
    with pytest.raises(InputError, match="announces 1152921504606846976 entries"):
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
