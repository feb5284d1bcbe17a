"""Experts in a file below the host's memory, read when they are needed, past the page cache where the system allows that.

Modelled: a file of slots in the temporary folder, written once and dropped from the page cache before anything is read; it
never has a name, so that nothing of it is left however a run ends. Reads are whole system calls; a device that copies
by itself is fed through two page-locked buffers. Ignored: caches below the operating system's (a controller's, a
hypervisor's), which no program can drop; file systems that live in memory, where "disk" is a figure of speech.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from pathlib import Path

import torch

from ...base.errors import DoesNotFit, InputError
from ...base.units import NS_PER_S
from ...kernels.expert_weights import ExpertWeights
from ..device import Device, Mark
from .host import ExpertStore

_NUM_BOUNCES = 2
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskStore(ExpertStore):
    """All experts in a file; `close` deletes it, and so does the end of the process."""

    def __init__(
        self,
        source: ExpertStore,
        folder: Path | None = None,
        *,
        num_keys: int | None = None,
        places: int | None = None,
        drop_cache: bool = True,
    ) -> None:
        """Write the file. num_keys: experts, more than `source` holds if its bytes are to be repeated. places: runs of bytes that
        they share in the file; None gives each its own.

        Raises DoesNotFit where the disk has too little room, InputError where the folder cannot be written.
        """
        keys = source.num_keys if num_keys is None else num_keys
        super().__init__(source.layout, source.activation, torch.empty(0, dtype=torch.uint8), num_keys=keys)
        self._places = keys if places is None else min(places, keys)
        self._drop = drop_cache and hasattr(os, "posix_fadvise")
        self._bounces: list[tuple[torch.Tensor, Mark | None]] = []
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._write(source)
        except OSError as error:
            self._file.close()
            if error.errno in _DISK_IS_FULL:
                raise DoesNotFit(
                    f"the disk below {self.folder} was full before all experts were written", self.num_bytes
                ) from None
            raise self._unwritable(error) from None
        except BaseException:
            self._file.close()
            raise

    @property
    def num_places(self) -> int:
        """Runs of bytes in the file."""
        return self._places

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._places * self.slot_bytes

    @property
    def drops_cache(self) -> bool:
        """Whether reads go past the page cache."""
        return self._drop

    def _write(self, source: ExpertStore) -> None:
        system = os.fstatvfs(self._file.fileno())
        free = system.f_bavail * system.f_frsize
        if free < self.num_bytes:
            what = (
                f"a file of {self.num_bytes} bytes for the experts, where the disk below {self.folder} has {free} free"
            )
            raise DoesNotFit(what, self.num_bytes - free)
        for key in range(self._places):
            self._file.write(source.bytes_of(key).numpy().data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._forget(0, 0)  # up to the end: what was just written is in memory, too

    def _unwritable(self, error: OSError) -> InputError:
        reason = f"cannot be written ({(error.strerror or 'failed').lower()})"
        return InputError("temporary folder", str(self.folder), reason, "set TMPDIR to a folder on a disk")

    def weights(self) -> ExpertWeights:
        """Refuse: the experts are not in memory."""
        raise InputError("store", "disk", "its experts are not in memory", "keep the store they were written from")

    def bytes_of(self, key: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of an expert, read for the purpose."""
        found = torch.empty(self.slot_bytes, dtype=torch.uint8)
        self._read(found, key, 0)
        return found

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        """Read bytes `low` to `high` of expert `key` into the same bytes of `target`."""
        size = high - low
        # Read-ahead of its neighbours has left some of it in memory: a disk that is asked past the page cache is no cache.
        self._forget(key % self._places * self.slot_bytes + low, size)
        if device.asynchronous:
            self._device = device
            if len(self._bounces) == _NUM_BOUNCES:
                bounce, copied = self._bounces.pop(0)
                if copied is not None:
                    copied.wait()
            else:
                bounce = device.host_memory(self.slot_bytes, pinned=True, what="a disk buffer")
            self._read(bounce[:size], key, low)
            device.copy(target[low:high], bounce[:size])
            self._bounces.append((bounce, device.mark()))
        else:
            self._read(target[low:high], key, low)

    def take_back(self, device: Device, source: torch.Tensor, key: int) -> None:
        """Refuse: the file is only read."""
        raise InputError(
            "copy.write_back",
            True,
            "experts on disk are only read",
            "set copy.write_back=false, or keep them in memory",
        )

    def close(self) -> None:
        """Let the file go, and unlock the buffers."""
        for bounce, copied in self._bounces:
            if copied is not None:
                with contextlib.suppress(RuntimeError):  # a device that failed copies no more
                    copied.wait()
            if self._device is not None:
                self._device.release_host(bounce)
        self._bounces.clear()
        self._file.close()

    def forget(self, key: int) -> None:
        """Drop what the page cache has of an expert, for instance because its neighbour was read with more than was asked for."""
        self._forget(key % self._places * self.slot_bytes, self.slot_bytes)

    def read(self, target: torch.Tensor, key: int) -> None:
        """Read expert `key` into uint8 `target` [slot_bytes] of host memory; raises OSError where the file does not give it."""
        self._read(target, key, 0)

    def read_s(self, target: torch.Tensor, key: int) -> float:
        """Return the seconds that reading expert `key` into uint8 `target` [slot_bytes] takes, past the cache if that is dropped."""
        self.forget(key)
        started = time.perf_counter_ns()
        self.read(target, key)
        return (time.perf_counter_ns() - started) / NS_PER_S

    def _read(self, target: torch.Tensor, key: int, low: int) -> None:
        begin = key % self._places * self.slot_bytes + low
        view = target.numpy().data
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            if got == 0:
                raise OSError(f"the file of experts ends at byte {begin + done}")
            done += got
        self._forget(begin, len(view))

    def _forget(self, begin: int, num_bytes: int) -> None:
        if self._drop:
            os.posix_fadvise(self._file.fileno(), begin, num_bytes, os.POSIX_FADV_DONTNEED)
