"""Readers of SGLang's expert-distribution recorder: its `stat`, `per_pass` and `per_token` dumps.

Modelled: the `.pt` files of the recorder and the `.json` files of counts that SGLang also accepts as an initial
expert location. `stat` counts logical experts already; the other two count physical slots, which the map stored
beside them turns into logical experts. Files count every hidden layer; dense ones hold nothing and are dropped.
`per_token` does not record which request a token belongs to: decode rows are linked to the request whose last
position they continue, in the order of the running batch. Ignored: DeepEP's per-rank token counts, the CSV files of
early 2025.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.json_input import items, read_json
from ...recording import DECODE, PREFILL, LoadProfile, RoutingTrace
from ..account import PADDING, RECOMPUTED, Account
from ..assemble import RequestRows, check_budget, integer_array, load_of_counts, trace_of_requests, whole_numbers
from ..files.torch_file import load_pt, tensor_array
from ..rank_parts import RankCounts, check_all_ranks
from .sglang_requests import RequestLinker

_REMEDY = "give the dump as SGLang wrote it"
# sglang srt/model_executor/forward_batch_info.py (0.5): the ForwardMode values a recorded pass of the target model has.
_MOST_FUSED = 4  # shared experts an engine may append to a token's choices
_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4
_Pass = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # (experts, positions) of one forward pass


def read_sglang_stat(
    path: str | os.PathLike[str], *, model: str = "", source: str = "", licence: str = ""
) -> LoadProfile:
    """Return the loads of a `stat` or `stat_approx` dump (`.pt`), or of a `.json` file with the same `logical_count`.

    Windows are forward passes. Raises InputError when the file is damaged, needs unpickling or counts nothing.
    """
    is_json = Path(path).suffix == ".json"
    dump = _dictionary(read_json(path) if is_json else load_pt(path), "dump")
    if "logical_count" not in dump:
        raise InputError("logical_count", "missing", f"the dump has only {_names(dump)}", _REMEDY)
    if is_json:
        try:
            counts = np.asarray(dump["logical_count"])
        except (ValueError, TypeError, OverflowError, MemoryError, RecursionError):
            raise InputError("logical_count", "ragged", "must be a regular table of numbers", _REMEDY) from None
    else:
        counts = tensor_array(dump["logical_count"], "logical_count")
    return load_of_counts(
        counts,
        source=source or f"SGLang expert-distribution recorder, stat: {Path(path).name}",
        model=model,
        licence=licence,
        window_unit="forward pass",
    )


def read_sglang_per_pass(
    path: str | os.PathLike[str], *, model: str = "", source: str = "", licence: str = ""
) -> LoadProfile:
    """Return the loads of `per_pass` dumps: one file, or a folder with one file per rank, whose counts are added up.

    Windows are forward passes. Raises InputError as `read_sglang_stat` does.
    """
    passes: dict[int, npt.NDArray[np.int64]] = {}
    account = Account()
    files: list[RankCounts] = []
    for file in _dumps(path):
        one = _counts_of_rank(file)
        if any(one.same_as(other) for other in files):
            account.note("ranks that counted the same tokens (tensor parallelism) are read once")
            continue
        files.append(one)
        check_budget(sum(count.nbytes for other in files for count in other.passes.values()))
    check_all_ranks(files, account)
    for one in files:
        for forward_pass, counts in one.passes.items():
            logical = np.zeros((len(one.slots), int(one.slots.max()) + 1), dtype=np.int64)
            np.add.at(logical, (np.arange(len(one.slots))[:, None], one.slots), counts)
            if forward_pass in passes and passes[forward_pass].shape != logical.shape:
                rule = "ranks must have the same layers and experts"
                raise InputError("last_physical_to_logical_map", logical.shape, rule, _REMEDY)
            passes[forward_pass] = passes.get(forward_pass, 0) + logical
            check_budget(len(passes) * logical.nbytes)
    if len({logical.shape for logical in passes.values()}) != 1:
        raise InputError("records", len(passes), "must be passes of one model", _REMEDY)
    return load_of_counts(
        np.stack([passes[forward_pass] for forward_pass in sorted(passes)]),
        source=source or f"SGLang expert-distribution recorder, per_pass: {Path(path).name}",
        model=model,
        licence=licence,
        window_unit="forward pass",
        account=account,
    )


def _counts_of_rank(file: Path) -> RankCounts:
    """Return the counts one rank dumped. Raises InputError."""
    records, slots = _records(file)
    found: dict[int, npt.NDArray[np.int64]] = {}
    rank = None
    for record in records:
        counts = whole_numbers(tensor_array(record.get("global_physical_count"), "global_physical_count"), "count")
        if counts.shape != slots.shape:
            raise InputError("global_physical_count", counts.shape, f"must have shape {slots.shape}", _REMEDY)
        forward_pass = _integer(record, "forward_pass_id")
        if forward_pass in found:
            raise InputError("forward_pass_id", forward_pass, "occurs twice in one file", _REMEDY)
        found[forward_pass] = counts
        rank = _integer(record, "rank") if "rank" in record else rank
    return RankCounts(name=file.name, rank=rank, slots=slots, passes=found)


def read_sglang_per_token(
    path: str | os.PathLike[str],
    *,
    model: str = "",
    source: str = "",
    licence: str = "",
    num_experts: int | None = None,
) -> RoutingTrace:
    """Return the routing of `per_token` dumps: one file, or a folder with one file per rank.

    Ranks follow one another as further requests; a rank that recorded the very same tokens as an earlier one (tensor
    parallelism) is left out. Raises InputError as `read_sglang_stat` does.
    """
    requests: list[RequestRows] = []
    notes = {"requests": "linked by position: the recorder stores no request ids"}
    before: list[list[_Pass]] = []
    ambiguous = size = 0
    account = Account()
    for file in _dumps(path):
        records, slots = _records(file)
        padding = 0
        linker = RequestLinker()
        passes: list[_Pass] = []
        for record in sorted(records, key=lambda record: _integer(record, "forward_pass_id")):
            experts, position = _routed(record, slots)
            size += experts.nbytes
            check_budget(size)
            phase, lengths = _phases(record, len(position))
            valid: npt.NDArray[np.bool_] = np.asarray((experts >= 0).any(axis=(1, 2)))
            padding += int((~valid).sum())
            linker.add_pass(experts, position, phase, lengths, valid)
            passes.append((experts, position))
        if any(_same(passes, other) for other in before):
            account.note("ranks that recorded the same tokens (tensor parallelism) are read once")
            continue
        account.read += padding
        account.drop(PADDING, padding)
        before.append(passes)
        ambiguous += linker.ambiguous
        for rows in linker.requests():
            complete = _complete(rows)
            again = len(rows.position) - len(complete.position)
            account.read += again
            account.drop(RECOMPUTED, again)
            requests.append(complete)
        num_experts = max(num_experts or 0, int(slots.max()) + 1)
    if ambiguous:
        notes["ambiguous_links"] = str(ambiguous)
        account.note(f"{ambiguous} tokens could continue several requests: the first in batch order was taken")
    return trace_of_requests(
        requests,
        source=source or f"SGLang recorder, per_token: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        metadata=notes,
        account=account,
    )


def _routed(record: dict[str, Any], slots: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return (logical experts [tokens, layers, 8] with −1 where there is none, positions [tokens]) of one pass."""
    ids = tensor_array(record.get("topk_ids_of_layer"), "topk_ids_of_layer")
    if ids.dtype.kind not in "iu" or ids.ndim != 3 or len(ids) != len(slots):
        rule = f"must be integers [num_layers ({len(slots)}), num_tokens, top_k]"
        raise InputError("topk_ids_of_layer", f"{ids.dtype} {ids.shape}", rule, _REMEDY)
    positions = _integer_list(record, "positions")
    if ids.shape[1] != len(positions):
        rule = f"must have one entry per token ({ids.shape[1]})"
        raise InputError("positions", len(positions), rule, _REMEDY)
    num_slots = slots.shape[1]
    if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= num_slots + _MOST_FUSED):
        outside = int(ids.min()) if int(ids.min()) < -1 else int(ids.max())
        rule = f"physical ids must be -1 (none) or 0 to {num_slots - 1}"
        raise InputError("topk_ids_of_layer", outside, rule, _REMEDY)
    inside = np.clip(ids, 0, num_slots - 1).reshape(len(ids), -1).astype(np.int64)
    logical = np.take_along_axis(slots, inside, axis=1).reshape(ids.shape)
    # Fused shared experts are numbered after the last slot; here they come after the last logical expert.
    logical = np.where(ids < num_slots, logical, ids.astype(np.int64) - num_slots + int(slots.max()) + 1)
    routed = np.where(ids >= 0, logical, -1).astype(np.int32)
    return routed.transpose(1, 0, 2), positions


def _phases(record: dict[str, Any], num_tokens: int) -> tuple[int, list[int]]:
    """Return (phase of a pass, tokens per request in it); in a decode pass every request has one token."""
    mode = _integer(record, "forward_mode")
    if mode == _DECODE:
        return DECODE, [1] * num_tokens
    if mode == _IDLE and num_tokens == 0:
        return DECODE, []
    if mode not in (_EXTEND, _MIXED):
        rule = "must be 1 (extend), 2 (decode) or 3 (mixed)"
        raise InputError("forward_mode", mode, rule, "record without speculative decoding")
    lengths = _integer_list(record, "extend_seq_lens")
    if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > num_tokens):
        raise InputError("extend_seq_lens", int(lengths.max()), f"must be 0 to {num_tokens}", _REMEDY)
    if int(lengths.sum()) > num_tokens:
        raise InputError("extend_seq_lens", int(lengths.sum()), f"must sum to at most {num_tokens}", _REMEDY)
    return PREFILL, [int(length) for length in lengths]


def _complete(rows: RequestRows) -> RequestRows:
    """Return rows sorted by position, each position once (a retracted request is computed again.

    The last one counts).
    """
    order = np.lexsort((np.arange(len(rows.position)), rows.position))
    last = np.append(np.diff(rows.position[order]) != 0, True)
    keep = order[last]
    phase = np.maximum.accumulate(rows.phase[keep])
    return RequestRows(experts=rows.experts[keep], position=rows.position[keep], phase=phase)


def _same(a: list[_Pass], b: list[_Pass]) -> bool:
    """Return whether two ranks recorded the same passes, token for token."""
    return len(a) == len(b) and all(
        np.array_equal(x, y) for mine, yours in zip(a, b, strict=True) for x, y in zip(mine, yours, strict=True)
    )


def _dumps(path: str | os.PathLike[str]) -> list[Path]:
    """Return the file itself, or the `.pt` files of a folder by name. Raises InputError when there is none."""
    target = Path(path)
    if not target.is_dir():
        return [target]
    files = sorted(target.glob("*.pt"))
    if not files:
        raise InputError("path", str(path), "has no .pt file", "give the recorder's folder")
    return files


def _records(path: Path) -> tuple[list[dict[str, Any]], npt.NDArray[np.int64]]:
    """Return (records, logical expert of each slot [num_layers, num_slots]) of one detailed dump."""
    dump = _dictionary(load_pt(path), "dump")
    slots = tensor_array(dump.get("last_physical_to_logical_map"), "last_physical_to_logical_map")
    if slots.dtype.kind not in "iu" or slots.ndim != 2 or 0 in slots.shape or int(slots.min()) < 0:
        rule = "must be non-negative integers [num_layers, num_physical_experts]"
        raise InputError("last_physical_to_logical_map", f"{slots.dtype} {slots.shape}", rule, _REMEDY)
    if int(slots.max()) >= slots.shape[1]:
        rule = f"{slots.shape[1]} slots cannot hold every logical expert up to this one"
        raise InputError("last_physical_to_logical_map", int(slots.max()), rule, _REMEDY)
    return list(items(dump.get("records"), "records")), slots.astype(np.int64)


def _dictionary(value: object, name: str) -> dict[str, Any]:
    """Return a dictionary. Raises InputError for anything else."""
    if not isinstance(value, dict):
        raise InputError(name, type(value).__name__, "must be a dictionary", _REMEDY)
    return value


def _names(values: dict[str, Any]) -> str:
    """Return the keys of a dump for a message."""
    return ", ".join(str(key) for key in list(values)[:10]) or "nothing"


def _integer(record: dict[str, Any], name: str) -> int:
    """Return an integer of a record. Raises InputError."""
    value = record.get(name)
    if type(value) is not int or not (-(1 << 62) < value < 1 << 62):
        raise InputError(name, value, "must be an integer", _REMEDY)
    return value


def _integer_list(record: dict[str, Any], name: str) -> npt.NDArray[Any]:
    """Return a list of integers of a record as an array. Raises InputError."""
    values = record.get(name)
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise InputError(name, type(values).__name__, "must be a list of integers", _REMEDY)
    return integer_array(values, name, 1) if values else np.zeros(0, dtype=np.int64)
