"""Bundled policies written again by the public names alone."""

from moeplan.api.policies import CORES, FETCH, merit, miss_choice, prefetch_score, victim_score


@victim_score("own-lfu")
def own_lfu(expert, now):
    return expert.tokens


@victim_score("own-belady", knows_future=True)
def own_belady(expert, now):
    return -expert.next_use


@victim_score("own-least-stale")
def own_least_stale(expert, now):
    turn = (expert.layer - now.layer - 1) % now.num_layers
    if expert.layer <= now.layer and expert.last_used < now.layer_step - now.layer:
        turn += now.num_layers
    return -turn


@victim_score("own-recency")
def own_recency(expert, now):
    return 0


@merit("own-uses")
def count_uses(expert, now):
    return expert.merit + 1


@victim_score("own-uses")
def fewest_counted(expert, now):
    return expert.merit


@merit("own-fewest-uses")
def count_uses_in_halves(expert, now):
    return expert.merit + 0.5


@victim_score("own-fewest-uses")
def fewest_halves(expert, now):
    return 2 * expert.merit


@miss_choice("own-cheaper")
def own_cheaper(miss):
    return miss.cores_ns < miss.copy_ns + miss.device_ns


@miss_choice("own-balanced")
def own_balanced(miss):
    if miss.fetched:
        return FETCH
    later = max(miss.busy_ns + miss.cores_ns, miss.link_ns - miss.copy_ns)
    return CORES if later < max(miss.busy_ns, miss.link_ns) else FETCH


@prefetch_score("own-threshold")
def own_threshold(guess):
    return guess.probability if guess.probability >= 0.5 else 0
