"""Reader of Megatron-LM's tokens-per-expert log: `rank{r}.jsonl`, one line per iteration and layer.

Modelled: each rank counts the tokens its own local experts received, per microbatch; rank r holds expert block
r mod `expert_parallel` (data-parallel copies of a block are added up). Windows are iterations. Multi-token-prediction
layers are left out and counted in the metadata. Ignored: pipeline stages (their layer numbers start again at every
stage): give one stage at a time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.json_input import parse_json, read_text
from ...recording import LoadProfile
from ...validate import MAX_EXPERTS, MAX_LAYERS
from ..account import Account, layer_ranges
from ..assemble import check_budget, load_of_counts, whole_numbers

_RANK = re.compile(r"rank([0-9]{1,9})\.jsonl\Z")
_REMEDY = "give the file or the tokens_per_expert folder as Megatron-LM wrote it"


def read_megatron(
    path: str | os.PathLike[str],
    *,
    expert_parallel: int | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> LoadProfile:
    """Return the loads of one `rank*.jsonl` file or of a folder of them.

    `expert_parallel`: ranks the experts of a layer are spread over; without it, the number of files. Raises InputError
    when a line is damaged or when ranks disagree about the number of local experts.
    """
    ranks = _files(path)
    spread = len(ranks) if expert_parallel is None else expert_parallel
    if not (1 <= spread <= MAX_EXPERTS):
        raise InputError("expert_parallel", spread, f"must be 1 to {MAX_EXPERTS}", "give the expert-parallel size")
    account = Account()
    _check_blocks(path, ranks, spread, expert_parallel, account)
    counted: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}
    local = skipped = 0
    for rank, file in ranks.items():
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            entry = parse_json(line, where)
            if not isinstance(entry, dict):
                raise InputError(where, type(entry).__name__, "must be an object", _REMEDY)
            if entry.get("block") != "decoder":
                skipped += 1
                continue
            tokens = _tokens(entry.get("tpe"), where)
            local = local or len(tokens)
            if len(tokens) != local:
                raise InputError(where, len(tokens), f"must count {local} local experts like the lines before", _REMEDY)
            key = (_integer(entry, "iter", where), _integer(entry, "layer", where), rank % spread)
            counted[key] = counted.get(key, 0) + tokens
    if skipped:
        account.note(f"{skipped} lines of draft (MTP) layers left out")
    iterations, layers = sorted({key[0] for key in counted}), sorted({key[1] for key in counted})
    if not counted or len(layers) > MAX_LAYERS or local * spread > MAX_EXPERTS:
        rule = f"must count 1 to {MAX_LAYERS} decoder layers and at most {MAX_EXPERTS} experts"
        raise InputError("path", str(path), rule, _REMEDY)
    check_budget(8 * len(iterations) * len(layers) * local * spread)
    counts = np.zeros((len(iterations), len(layers), spread, local), dtype=np.int64)
    at = {value: i for i, value in enumerate(iterations)}, {value: i for i, value in enumerate(layers)}
    for (iteration, layer, block), tokens in counted.items():
        counts[at[0][iteration], at[1][layer], block] = tokens
    return load_of_counts(
        counts.reshape(len(iterations), len(layers), spread * local),
        source=source or f"Megatron-LM tokens per expert: {Path(path).name}",
        model=model,
        licence=licence,
        layer_ids=layers,
        window_unit="iteration",
        metadata={"skipped_lines": str(skipped)} if skipped else None,
        account=account,
    )


def _check_blocks(
    path: str | os.PathLike[str], ranks: dict[int, Path], spread: int, told: int | None, account: Account
) -> None:
    """Raise InputError when the experts of a rank that is not there would seem never chosen."""
    missing = sorted(set(range(spread)) - {rank % spread for rank in ranks})
    others = len(_files(ranks[min(ranks)].parent)) if not Path(path).is_dir() and told is None else len(ranks)
    if missing or others > len(ranks) or (told is None and max(ranks) >= spread):
        rule = (
            f"the file of rank {layer_ranges(missing)} is missing"
            if missing
            else "one rank counts only its own experts"
        )
        remedy = "give the folder with the files of all ranks" + (
            "" if told else ", or expert_parallel if they are all"
        )
        raise InputError("path", ", ".join(file.name for file in list(ranks.values())[:3]), rule, remedy)
    if told is None and spread > 1:
        account.note(f"{spread} files taken for {spread} blocks of experts: give expert_parallel if some hold copies")


def _files(path: str | os.PathLike[str]) -> dict[int, Path]:
    """Return rank → file. Raises InputError when there is none."""
    target = Path(path)
    if not target.is_dir():
        match = _RANK.match(target.name)
        return {int(match[1]) if match else 0: target}
    files = {int(match[1]): file for file in target.iterdir() if (match := _RANK.match(file.name))}
    if not files:
        raise InputError("path", str(path), "has no rank*.jsonl file", _REMEDY)
    return dict(sorted(files.items()))


def _tokens(value: Any, where: str) -> npt.NDArray[np.int64]:
    """Return the tokens of each local expert, added over microbatches. Raises InputError."""
    try:
        table = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        table = np.zeros(0)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(
            f"{where}: tpe", value, "must be one list of counts per microbatch, all of one length", _REMEDY
        )
    return whole_numbers(whole_numbers(table, f"{where}: tpe").sum(axis=0), f"{where}: tpe")


def _integer(entry: dict[str, Any], name: str, where: str) -> int:
    """Return a non-negative integer of a line. Raises InputError."""
    value = entry.get(name)
    if type(value) is not int or not (0 <= value < 1 << 31):
        raise InputError(f"{where}: {name}", value, "must be a non-negative integer", _REMEDY)
    return value
