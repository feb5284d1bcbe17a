"""What binds a run, in words.

Modelled: the names that `bound` has in every document. Ignored: pages and diagnoses, which know whether there is a card and say more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BINDS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "experts on the cores bind", "copy": "copies over the link bind", "compute": "computing on the device binds",
        "launch": "starting the device's kernels binds", "host": "the host's own work binds", "disk": "reading from the disk binds",
    }
)  # fmt: skip


def binds(bound: str) -> str:
    """Return what binds, as a part of a sentence; a name that is not known as it is."""
    return BINDS.get(bound, f"{bound} binds")
