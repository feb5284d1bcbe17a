"""Ratios of two runs that people published: each is two serving figures of the same cluster, one fact apart.

Modelled: the pairs behind the bundled ratios, as figures of the bundled rows with facts changed; a ratio's interval is that of its two
predictions where their errors are mostly shared. Ignored: ratios whose two runs nobody described.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..machine import NotExpressible
from .rows import Row, read_rows
from .serving import Served, predict_serving

_SHARED = 0.8
"""Correlation of the errors of two runs on one cluster with one engine."""
Run = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What was divided by what: rows by id, with facts that differ."""

    above: Run
    below: Run


_PREFILL, _DECODE = "lmsys-prefill-4096", "lmsys-decode-256-tbo"
_ALONE: Mapping[str, Any] = {"overlap": "micro_batches=1"}
PAIRS: Mapping[str, Pair] = {
    "diff-eplb-prefill-ep32": Pair(above=(_PREFILL, {}), below=("lmsys-prefill-noEPLB", {})),
    "diff-eplb-decode-ep72": Pair(above=(_DECODE, {}), below=("lmsys-decode-256-noEPLB", {})),
    "diff-tbo-prefill-8k": Pair(above=(_PREFILL, {"tokens_per_rank": 8192}), below=("lmsys-prefill-noTBO-8k", {})),
    "diff-tbo16k-vs-8k": Pair(above=(_PREFILL, {}), below=("lmsys-prefill-noTBO-8k", {})),
    "diff-tbo-decode-32": Pair(above=(_DECODE, {"tokens_per_rank": 32}), below=(_DECODE, {"tokens_per_rank": 32, **_ALONE})),
    "diff-tbo-decode-256": Pair(above=(_DECODE, {}), below=(_DECODE, _ALONE)),
    "diff-ctx-1k-4k": Pair(above=("lmsys-prefill-1024", {}), below=(_PREFILL, {})),
    "diff-perfect-vs-real-eplb": Pair(above=("lmsys-prefill-4096-perfect", {}), below=(_PREFILL, {})),
    "diff-deepseekEP128-vs-lmsysEP72": Pair(above=("deepseek-profile-decode", {}), below=(_DECODE, {})),
}  # fmt: skip


@lru_cache(maxsize=1)
def _bundled() -> Mapping[str, Row]:
    return {row.id: row for row in read_rows()}


def run_of(run: Run) -> Row:
    """Return the row of a run."""
    name, facts = run
    row = _bundled()[name]
    return dataclasses.replace(row, row={**row.row, **facts})


def predict_difference(row: Row) -> Served:
    """Return the predicted ratio; raises NotExpressible where its two runs are not described."""
    pair = PAIRS.get(row.id)
    if pair is None:
        raise NotExpressible("its two runs are not described")
    above, below = (predict_serving(run_of(run)) for run in (pair.above, pair.below))
    wrong = math.hypot(above.relative_uncertainty, below.relative_uncertainty) * math.sqrt(1 - _SHARED**2)
    return Served(value=above.value / below.value, relative_uncertainty=wrong, bound=above.bound, roofline=1.0,
                  assumed=tuple(dict.fromkeys((*above.assumed, *below.assumed))))  # fmt: skip
