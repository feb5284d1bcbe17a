"""What a rule of a policy sees and where rules are registered: plain functions of named values, bundled and one's own alike.

    @victim_score("fewest-tokens")
    def fewest_tokens(expert, now):
        return expert.tokens

Modelled: four kinds of rules. A victim's score: the cached expert with the least leaves, the least recent of equals. A merit: what is
kept of an expert at each use, to be read by its score later. A prefetch's score: the guess with the greatest is
fetched first, one of zero or less is not. A miss: FETCH or CORES. Values are copies: a rule cannot change a run but by what it
returns. Ignored: which experts may leave at all; none goes that the layer step uses while the cache has room for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ...base.errors import InputError
from ...specs.schedules.rules import MISS, PREFETCH, VICTIM

F = TypeVar("F", bound=Callable[..., Any])

MERIT = "merit"
FETCH, CORES = 0, 1
"""What a miss rule returns: the expert is copied to the device, or computed by the host's cores where it lies."""


class Expert(NamedTuple):
    """One cached expert, as a victim's score and a merit see it."""

    layer: int
    expert: int
    """Its number within the layer."""
    tokens: int
    """Tokens that have used it since the run began, those of this layer step included."""
    stay_tokens: int
    """Tokens that have used it since it came in."""
    last_used: int
    """Layer step that used it last, -1 before its first use; a merit rule sees the use before this one."""
    next_use: int
    """Layer step that will use it next; known only to rules that say `knows_future=True`, else 2**62."""
    merit: float
    """What the policy's merit rule returned last for it; 0 without one."""


class Now(NamedTuple):
    """The moment of a decision, on the logical clock: layer steps are counted from the start of the run."""

    layer_step: int
    layer: int
    num_layers: int
    num_experts: int
    """Of each layer."""
    age: float
    """The greatest merit of any expert that has left this cache."""


class Guess(NamedTuple):
    """One expert that a predictor names for a later layer; one that is on the device already is kept for it, and not copied."""

    layer: int
    expert: int
    rank: int
    """Its place among the guesses of that layer, 0 the most probable."""
    probability: float
    """What the predictor gives it, at most 1."""
    distance: int
    """Layers until its turn."""
    copy_ns: int
    """Predicted time of its copy."""
    backlog_ns: int
    """Predicted time that the link is still busy with guesses fetched before, and with the better ones of this layer."""
    layer_step_ns: int
    """Predicted time from one layer step to the next."""


class Miss(NamedTuple):
    """One missing expert; rules are asked about those with the fewest tokens first."""

    layer: int
    expert: int
    tokens: int
    copy_ns: int
    """Predicted time of its copy."""
    device_ns: int
    """Predicted time of its work on the device."""
    cores_ns: int
    """Predicted time of its work on the host's cores."""
    link_ns: int
    """Predicted time of all copies of this layer step that have not been given to the cores, this one's included."""
    busy_ns: int
    """Predicted time of what the cores have been given in this layer step."""
    fetched: int
    """Misses of this layer step that the rule has left to the link already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A registered function."""

    kind: str
    name: str
    function: Callable[..., Any]
    knows_future: bool = False


REGISTRY: dict[tuple[str, str], Rule] = {}
"""Every rule by kind and name, the bundled ones first."""


def victim_score(name: str, *, knows_future: bool = False) -> Callable[[F], F]:
    """Register `function(expert, now)`: the cached expert with the least score leaves."""
    return _registering(VICTIM, name, knows_future)


def merit(name: str) -> Callable[[F], F]:
    """Register `function(expert, now)`: what the victim score of the same name finds in `expert.merit` later."""
    return _registering(MERIT, name, False)


def prefetch_score(name: str) -> Callable[[F], F]:
    """Register `function(guess)`: the greatest score is fetched first; zero or less is not fetched."""
    return _registering(PREFETCH, name, False)


def miss_choice(name: str) -> Callable[[F], F]:
    """Register `function(miss)`: FETCH or CORES."""
    return _registering(MISS, name, False)


def _registering(kind: str, name: str, knows_future: bool) -> Callable[[F], F]:
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"a {kind} rule's name", name, "not letters, digits, - and _", 'write for instance "my-rule"')

    def register(function: F) -> F:
        if (kind, name) in REGISTRY:
            raise InputError(f"{kind} rule", name, "a rule of this kind has that name already", "choose another name")
        REGISTRY[kind, name] = Rule(kind=kind, name=name, function=function, knows_future=knows_future)
        return function

    return register
