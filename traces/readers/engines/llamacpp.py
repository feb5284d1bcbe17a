"""Readers of llama.cpp recordings: importance matrices (GGUF) and the `layer,expert` CSV of its routing tracer.

Modelled: an importance matrix stores, for every stack of expert matrices, the tokens each expert saw
(`<name>.counts`). The tracer writes a row per choice, layer by layer for each batch it evaluates; with `top_k` told,
the rows are put back together to tokens. A batch whose last layer evaluated fewer tokens (llama.cpp computes only
wanted outputs there) keeps those last tokens only; what is lost is counted in the metadata. Ignored: input
statistics, the older `.dat` format (it has no counts per expert).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.gguf import GgufFile
from ...files.json_input import read_text
from ...recording import DECODE, PREFILL, LoadProfile, RoutingTrace
from ...validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K
from ..assemble import RequestRows, check_budget, load_of_counts, trace_of_requests

_EXPERTS = re.compile(r"blk\.([0-9]{1,6})\.ffn_(gate|up|gate_up|down)_exps\.weight\.counts\Z")
_KEYS = ("datasets", "chunk_count", "chunk_size")


def read_llama_imatrix(
    path: str | os.PathLike[str], *, model: str = "", source: str = "", licence: str = "", top_k: int | None = None
) -> LoadProfile:
    """Return the tokens per expert of an importance matrix in GGUF.

    Raises InputError when it is damaged or has no experts.
    """
    file = GgufFile(path)
    by_layer: dict[int, npt.NDArray[np.float32]] = {}
    for name in sorted(file.tensors):
        match = _EXPERTS.match(name)
        if match is None:
            continue
        counts = file.floats(name).ravel()
        layer = int(match[1])
        if layer in by_layer and not np.array_equal(by_layer[layer], counts):
            rule = "the expert matrices of one layer must have seen the same tokens"
            raise InputError(name, counts.shape, rule, "record the importance matrix again, without merging")
        by_layer[layer] = counts
    if not by_layer or len({counts.shape for counts in by_layer.values()}) != 1:
        rule = "must hold counts for the experts of every MoE layer, equally many in each"
        raise InputError("path", str(path), rule, "give an importance matrix of a MoE model in GGUF")
    notes = {f"imatrix.{key}": _text(file.values[f"imatrix.{key}"]) for key in _KEYS if f"imatrix.{key}" in file.values}
    return load_of_counts(
        np.stack([by_layer[layer] for layer in sorted(by_layer)]),
        source=source or f"llama.cpp importance matrix: {Path(path).name}",
        model=model,
        licence=licence,
        top_k=top_k,
        layer_ids=sorted(by_layer),
        metadata=notes,
    )


def read_llama_csv(
    path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    decode_only: bool = False,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace | LoadProfile:
    """Return the routing in a `layer,expert` file when `top_k` is told, and the loads alone when it is not.

    `decode_only` keeps batches of one token (an early tracer wrote wrong prefill rows). Raises InputError when the
    file is damaged or when rows do not make whole tokens.
    """
    rows = _csv_rows(path)
    label = source or f"llama.cpp routing trace: {Path(path).name}"
    if top_k is None:
        seen, row_of = np.unique(rows[:, 0], return_inverse=True)
        size = int(rows[:, 1].max()) + 1 if num_experts is None else num_experts
        if not (int(rows[:, 1].max()) < size <= MAX_EXPERTS) or len(seen) > MAX_LAYERS:
            rule = f"must be below num_experts ({size}), which is at most {MAX_EXPERTS}"
            raise InputError("expert", int(rows[:, 1].max()), rule, "check num_experts")
        counts = np.zeros((len(seen), size), dtype=np.int64)
        np.add.at(counts, (row_of, rows[:, 1]), 1)
        return load_of_counts(counts, source=label, model=model, licence=licence, layer_ids=seen.tolist())
    if not (1 <= top_k <= MAX_TOP_K):
        raise InputError("top_k", top_k, f"must be 1 to {MAX_TOP_K}", "see the model's config.json")
    layers, batches, lost = _batches(rows, top_k, decode_only)
    position = np.concatenate([np.arange(start + tokens - len(ids), start + tokens) for start, tokens, ids in batches])
    phase = np.concatenate([np.full(len(ids), DECODE if tokens == 1 else PREFILL) for _, tokens, ids in batches])
    first_decode = int(np.argmax(phase == DECODE)) if (phase == DECODE).any() else len(phase)
    phase[first_decode:] = DECODE  # a single request: what follows its first generated token was generated too
    return trace_of_requests(
        [RequestRows(experts=np.concatenate([ids for _, _, ids in batches]), position=position, phase=phase)],
        source=label,
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layers,
        metadata={"lost_tokens": f"{lost} prompt tokens whose last layer was not evaluated"} if lost else None,
    )


def _batches(
    rows: npt.NDArray[np.int64], top_k: int, decode_only: bool
) -> tuple[list[int], list[tuple[int, int, npt.NDArray[np.int64]]], int]:
    """Return (layers, [(first position, tokens evaluated, ids [tokens kept, layers, top_k])], tokens lost)."""
    borders = np.flatnonzero(np.diff(rows[:, 0])) + 1
    blocks = np.split(rows[:, 1], borders)
    block_layers = rows[np.concatenate(([0], borders)), 0].tolist()
    layers = sorted(set(block_layers))
    if len(layers) > MAX_LAYERS or len(blocks) % len(layers) or block_layers != layers * (len(blocks) // len(layers)):
        rule = "every batch must list every layer once, in order"
        raise InputError("layer", block_layers[: 2 * len(layers)], rule, "give an unshortened trace of one sequence")
    batches, position, lost = [], 0, 0
    for first in range(0, len(blocks), len(layers)):
        batch = blocks[first : first + len(layers)]
        if any(len(block) % top_k for block in batch):
            raise InputError(
                "top_k", top_k, "rows of a layer are not whole tokens", "check top_k and the end of the file"
            )
        tokens, kept = len(batch[0]) // top_k, len(batch[-1]) // top_k
        if any(len(block) != len(batch[0]) for block in batch[:-1]) or kept > tokens:
            rule = "all layers of a batch but the last must have equally many rows"
            raise InputError(
                "expert", [len(block) for block in batch], rule, "give an unshortened trace of one sequence"
            )
        if tokens == 1 or not decode_only:
            ids = np.stack([block.reshape(-1, top_k)[-kept:] for block in batch], axis=1)
            batches.append((position, tokens, ids))
            lost += tokens - kept
        position += tokens
    if not batches:
        raise InputError("decode_only", decode_only, "no batch has a single token", "record generated tokens too")
    check_budget(sum(ids.nbytes for _, _, ids in batches))
    return layers, batches, lost


def _csv_rows(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Return [num_rows, 2]: layer and expert of every line. Raises InputError when a line is anything else."""
    text = read_text(path)
    header, _, body = text.partition("\n")
    if header.strip() != "layer,expert":
        body = text
    wrong = re.search(r"^(?![0-9]{1,9},[0-9]{1,9}\r?$)(?!\r?$).*$", body, re.MULTILINE)
    if wrong:
        raise InputError("line", wrong[0], "must be layer,expert: two non-negative integers", "give the file unchanged")
    if not body.strip():
        raise InputError("path", str(path), "has no rows", "record at least one token")
    rows = np.fromstring(",".join(body.split()), dtype=np.int64, sep=",").reshape(-1, 2)
    if int(rows[:, 0].max()) >= 1 << 20 or int(rows[:, 1].max()) >= MAX_EXPERTS:
        rule = f"layers are below {1 << 20} and experts below {MAX_EXPERTS}"
        raise InputError("layer, expert", rows.max(axis=0).tolist(), rule, "give the file unchanged")
    return rows


def _text(value: object) -> str:
    """Return a metadata value as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
