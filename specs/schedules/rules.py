"""Names of rules that a policy file adds: what a schedule may say beside the bundled policies.

Modelled: one list of names for each kind of rule; a schedule that names one is valid while its file is loaded. Ignored: the rules
themselves (`sim.policies.rules`).
"""

from __future__ import annotations

_ADDED: dict[str, list[str]] = {}
VICTIM, PREFETCH, MISS = "victim", "prefetch", "miss"


def added(kind: str) -> tuple[str, ...]:
    """Return the names of `kind` that policy files have added, in the order in which they did."""
    return tuple(_ADDED.get(kind, ()))


def add(kind: str, name: str) -> None:
    """Add a name of `kind`; adding it again changes nothing."""
    names = _ADDED.setdefault(kind, [])
    if name not in names:
        names.append(name)


def forget() -> None:
    """Forget every name that was added."""
    _ADDED.clear()
