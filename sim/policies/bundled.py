"""The bundled rules, written as one's own are: named values in, a number out.

Modelled: the victims' scores of every cache policy but the least recent (which needs none), the merit of LFU with ageing, and what
misses do. Ignored: what `affinity` and `activation` learn, which becomes an expert's merit (`remembering`).
"""

from __future__ import annotations

from ...base.jit import jit_inline
from ...specs.schedules.rules import VICTIM
from .rules import CORES, FETCH, REGISTRY, Expert, Miss, Now, merit, miss_choice, victim_score


def knows_future(policy: str) -> bool:
    """Return whether a policy chooses victims by next uses."""
    found = REGISTRY.get((VICTIM, policy))
    return found is not None and found.knows_future


@victim_score("lfu")
@jit_inline
def fewest_tokens(expert: Expert, now: Now) -> float:
    """Return the tokens that have used an expert."""
    return float(expert.tokens)


@victim_score("belady", knows_future=True)
@jit_inline
def farthest_use(expert: Expert, now: Now) -> float:
    """Return how soon an expert is wanted again: the farthest goes."""
    return -float(expert.next_use)


@victim_score("least-stale")
@jit_inline
def least_stale(expert: Expert, now: Now) -> float:
    """Return how soon an expert's layer has its turn; what this pass has left behind without using it is stale already."""
    # Layer steps until the layer's next turn: most for the one just left.
    turn = (expert.layer - now.layer - 1) % now.num_layers
    stale = expert.layer <= now.layer and expert.last_used < now.layer_step - now.layer
    return -float(turn + now.num_layers * int(stale))


@victim_score("affinity")
@victim_score("activation")
@victim_score("lfuda")
@jit_inline
def least_merit(expert: Expert, now: Now) -> float:
    """Return an expert's merit."""
    return expert.merit


@merit("lfuda")
@jit_inline
def aged_tokens(expert: Expert, now: Now) -> float:
    """Return the tokens of an expert's stay plus the age of its cache, so that what was popular once leaves."""
    return expert.stay_tokens + now.age


@miss_choice("cpu")
@jit_inline
def always_cores(miss: Miss) -> int:
    """Return CORES."""
    return CORES


@miss_choice("cheaper")
@jit_inline
def cheaper(miss: Miss) -> int:
    """Return CORES where they are done sooner than a copy and a launch (Fiddler, arXiv 2402.07033)."""
    return CORES if miss.cores_ns < miss.copy_ns + miss.device_ns else FETCH


@miss_choice("balanced")
@jit_inline
def balanced(miss: Miss) -> int:
    """Return CORES while that brings the later end of cores and link forward (HybriMoE, arXiv 2504.05897)."""
    if miss.fetched > 0:  # experts with fewer tokens did not bring it forward
        return FETCH
    later = max(miss.busy_ns + miss.cores_ns, miss.link_ns - miss.copy_ns)
    return CORES if later < max(miss.busy_ns, miss.link_ns) else FETCH
