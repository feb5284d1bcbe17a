"""Traffic of an all-to-all as a matrix of bytes, the patterns that are measured, and the text a sample keeps it as.

    balanced   every rank has the same for all
    zipf       everybody has for rank k a share in proportion to 1 / (k + 1)
    hot        everybody has three quarters of everything for rank 0

Modelled: bytes from each rank to each other one. What a rank has for itself goes over no link and is not exchanged: libraries copy
it, and with it in the way large exchanges took a quarter longer for nothing. Ignored: in which order a library sends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError, UnknownName

Matrix = npt.NDArray[np.int64]
PATTERNS = ("balanced", "zipf", "hot")
HOT_FRACTION = 0.75
_MAX_RANKS = 1024


def traffic(ranks: int, num_bytes: int, pattern: str) -> Matrix:
    """Return int64 [from rank, to rank]: bytes, where every rank has about `num_bytes`; its own part is zero here.

    Raises UnknownName for another pattern, InputError for fewer than two ranks.
    """
    if ranks < 2:
        raise InputError("ranks", ranks, "an exchange needs two", "give at least 2")
    if pattern == "balanced":
        shares = np.full(ranks, 1 / ranks)
    elif pattern == "zipf":
        shares = 1 / np.arange(1, ranks + 1)
        shares = shares / shares.sum()
    elif pattern == "hot":
        shares = np.full(ranks, (1 - HOT_FRACTION) / (ranks - 1))
        shares[0] = HOT_FRACTION
    else:
        raise UnknownName("pattern", pattern, PATTERNS)
    matrix = np.tile(np.floor(num_bytes * shares).astype(np.int64), (ranks, 1))
    np.fill_diagonal(matrix, 0)
    return matrix


def port_bytes(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Return int64 [ranks] twice: what each rank sends to others, and receives from them."""
    others = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    return others.sum(axis=1), others.sum(axis=0)


def busiest_port(matrix: Matrix) -> tuple[int, int]:
    """Return (larger, smaller) of what the busiest rank sends and receives: the one whose larger is largest, then the smaller."""
    sent, received = port_bytes(matrix)
    ports = zip(np.maximum(sent, received).tolist(), np.minimum(sent, received).tolist(), strict=True)
    return max(ports)


def matrix_to_text(matrix: Matrix) -> str:
    """Return the matrix as a sample's label keeps it: rows between semicolons, columns between commas."""
    return ";".join(",".join(str(each) for each in row) for row in matrix.tolist())


def matrix_from_text(text: Any, ranks: int, where: str = "samples: all_to_all.matrix") -> Matrix:
    """Return the matrix that a label keeps; raises InputError where it is not square, not of `ranks` ranks or holds no bytes."""
    remedy = "measure again"
    if not isinstance(text, str):
        raise InputError(where, text, "not a text", remedy)
    rows = [row.split(",") for row in text.split(";")]
    if len(rows) > _MAX_RANKS or any(len(row) != len(rows) for row in rows):
        widths = sorted({len(row) for row in rows})
        raise InputError(where, text, f"not square: {len(rows)} rows of {widths} columns", remedy)
    if len(rows) != ranks:
        raise InputError(where, text, f"{len(rows)} ranks where the sample says {ranks:g}", remedy)
    if not all(part.strip().isdecimal() and len(part) < 18 for row in rows for part in row):
        raise InputError(where, text, "not whole numbers of at least zero", remedy)
    matrix = np.array([[int(part) for part in row] for row in rows], np.int64)
    if busiest_port(matrix)[0] == 0:
        raise InputError(where, text, "nothing is sent to another rank", remedy)
    return matrix
