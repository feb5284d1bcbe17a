"""What ranks of one machine take from each other: cores that all of them compute on, and time that exchanges and kernels
cost each other while they overlap.

Modelled: kernels take longer by what was measured where so many ranks compute at once. Where a schedule overlaps exchanges with
kernels, as much of the shorter one as there is runs beside the longer one, each at its speed beside the other, and what is left
runs alone; that stretches all kernels, and all exchanges, of a step alike. Ignored: which of them really meet, and parts of
a schedule that never do: where little overlaps, this is too slow.
"""

from __future__ import annotations

import numpy as np

from ..policies.state import Array


def stretched(work_ns: Array, factor: float) -> Array:
    """Return whole nanoseconds of kernels that take `factor` times as long, rounded up."""
    return work_ns if factor == 1.0 else np.ceil(work_ns * factor).astype(np.int64)


def overlapped(work_ns: Array, alone_ns: Array, beside_ns: Array, compute_speed: float) -> tuple[Array, Array]:
    """Return (kernels, exchanges) of a step whose exchanges and kernels run beside each other as far as they last.

    work_ns: [ops, ranks]. alone_ns, beside_ns: [exchanges, tiers, ranks], exchanges with no kernel running and with kernels
    running all the time. compute_speed: of kernels beside an exchange, relative to alone.
    """
    compute = float(work_ns.max(axis=1).sum())
    alone, beside = (float(each.max(axis=2).sum()) for each in (alone_ns, beside_ns))
    if compute == 0 or alone == 0:
        return work_ns, alone_ns
    # The kernels' own slow-down would last so long; if exchanges end first, the rest of the kernels runs alone.
    together = min(compute / compute_speed, beside)
    slower = (compute + together * (1 - compute_speed)) / compute
    share = together / beside
    mixed = np.ceil(alone_ns + (beside_ns - alone_ns) * share).astype(np.int64)
    return stretched(work_ns, slower), mixed
