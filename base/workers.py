"""Worker processes that never outlive the command that started them, and never speak for themselves.

Modelled: workers leave Ctrl-C to their parent, which ends them when anything goes wrong, and end by themselves when the parent is
gone (killed, for instance). Ignored: what they work on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

_LOOK_S = 0.5


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Return a context with a pool of forked workers: a block that ends well waits for them, one that fails ends them at once."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(os.getpid(),)
    )
    try:
        yield pool
    except BaseException:
        # Workers first, and the pool is then waited for: one that was told not to wait may still be closing its pipes when Python, at
        # its end, writes to them.
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """Make this worker one that its parent ends, or the parent's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="moeplan parent", daemon=True).start()
