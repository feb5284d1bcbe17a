"""Exchanges go before kernels: threads that move tokens get a core at once, as copies and a network card do beside a GPU's kernels.

Ranks share cores, and each step of an exchange wakes a thread: without this it waits until the system takes a core from some rank's
kernel, up to 4 ms where the clock ticks 250 times a second, and there are dozens of such steps in a layer.

Modelled: the real-time class (first in, first out) at its lowest priority for all threads of a rank but the one that computes; needs
root or CAP_SYS_NICE. Where that is not permitted, exchanges wait like everybody else, and a run says so. Ignored: other systems'
classes.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


def exchanges_first() -> bool:
    """Put all threads of this process but the calling one before kernels; return whether the system lets it."""
    mine = str(threading.get_native_id())
    others = [int(path.name) for path in Path("/proc/self/task").glob("*") if path.name != mine]
    done = [_first(thread) for thread in others]  # each of them, also after one that may not
    return bool(done) and all(done)


def go_first() -> None:
    """Put the calling thread before kernels, where the system lets it."""
    _first(threading.get_native_id())


def _first(thread: int) -> bool:
    if not hasattr(os, "sched_setscheduler"):
        return False
    try:
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    except ProcessLookupError:
        return True  # it has ended meanwhile
    except OSError:
        return False
    return True
