"""Which request belongs to which domain (a subject or a language), kept as one JSON string in a recording's metadata.

Modelled: one domain per request, stored as runs of requests, so that a million requests in a few domains stay a short
string: `{"names": ["law", …], "runs": [[first_request, name_index], …]}`; a run reaches to the next run's first
request. A plain list of one name per request is understood too. Ignored: domains that change inside a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError

KEY = "domains"


def encode_domains(names: Sequence[str], request: npt.NDArray[np.int32], domain: npt.NDArray[np.integer]) -> str:
    """Return the metadata string for per-token domain indices.

    `request`, `domain`: [num_tokens], `request` not decreasing. Raises InputError when a domain index has no name or
    when one request has two domains.
    """
    index = np.asarray(domain, dtype=np.int64)
    if index.shape != request.shape:
        raise InputError("domain", index.shape, f"must have shape {request.shape}", "give one domain per token")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(names)):
        outside = int(index.min()) if index.min() < 0 else int(index.max())
        raise InputError("domain", outside, f"must be 0 to {len(names) - 1}, an index of domain_names", "repair it")
    changes = np.flatnonzero(np.diff(index)) + 1
    inside = changes[request[changes] == request[changes - 1]]
    if len(inside):
        request_id = int(request[inside[0]])
        raise InputError(f"domain[{int(inside[0])}]", request_id, "one request has two domains", "split the request")
    starts = [0, *changes.tolist()] if len(index) else []
    return json.dumps({"names": [str(n) for n in names], "runs": [[int(request[t]), int(index[t])] for t in starts]})


def decode_domains(
    metadata: Mapping[str, str], request: npt.NDArray[np.int32]
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return (names, index of the domain of each entry of `request`); one nameless domain where none is recorded.

    Raises InputError when the metadata string is not what `encode_domains` writes.
    """
    if KEY not in metadata:
        return [""], np.zeros(len(request), dtype=np.int64)
    try:
        stored = json.loads(metadata[KEY])
        if isinstance(stored, list):
            return _listed(stored, np.asarray(request))
        names, runs = stored["names"], np.asarray(stored["runs"], dtype=np.int64).reshape(-1, 2)
        if not all(isinstance(name, str) for name in names) or not len(runs):
            raise ValueError
        if (np.diff(runs[:, 0]) <= 0).any() or runs[:, 1].min() < 0 or runs[:, 1].max() >= len(names):
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        rule = 'must be {"names": [...], "runs": [[first_request, name_index], ...]}, or one name per request'
        raise InputError(f"metadata.{KEY}", metadata[KEY], rule, "import the recording again") from None
    run = np.searchsorted(runs[:, 0], np.asarray(request), side="right") - 1
    return list(names), runs[np.maximum(run, 0), 1]


def _listed(stored: list[object], request: npt.NDArray[np.int32]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return (names in order of appearance, domain index of each entry of `request`) of a list of one name per request."""
    if not all(isinstance(name, str) for name in stored):
        raise ValueError
    names = list(dict.fromkeys(str(name) for name in stored))
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[str(name)] for name in stored], dtype=np.int64)[request]
