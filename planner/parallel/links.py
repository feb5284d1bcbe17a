"""Tokens on every link: from which rank to which rank a mean step's tokens travel under a schedule.

Modelled: the dispatch, summed over layers, just as the simulator counts it: a hierarchical exchange crosses to the rank with
the sender's place and is forwarded from there, so its links differ from those of a flat one; a token that a rank needs in
two expert groups travels twice. The combine takes the same links backwards. From counts, expectations. Ignored: reductions
among ranks that share a layer, of which only the ports are known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...specs.schedules.parallel import ExpertParallelSchedule
from ..placement.comparison import Candidate
from .evidence import REPORT, Evidence


def link_tokens(evidence: Evidence, candidate: Candidate, schedule: ExpertParallelSchedule) -> npt.NDArray[np.float64]:
    """Return float64 [from rank, to rank]: tokens dispatched in a mean reported step, all layers; the diagonal is zero."""
    found = np.mean([load.links for load in evidence.loads(REPORT, candidate, schedule)], axis=0)
    return np.asarray(found, np.float64)
