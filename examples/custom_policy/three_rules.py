"""A rule of each kind: what leaves, what is fetched ahead, what is left to the host's cores."""

from moeplan.api.policies import CORES, FETCH, miss_choice, prefetch_score, victim_score

LEAST_PROBABLE = 0.25


@victim_score("tokens-and-recency")
def tokens_and_recency(expert, now):
    """Tokens of its stay, halved for every eight passes that it was not used."""
    passes = (now.layer_step - expert.last_used) / now.num_layers
    return expert.stay_tokens * 0.5 ** (passes / 8)


@prefetch_score("likely-and-in-time")
def likely_and_in_time(guess):
    if guess.probability < LEAST_PROBABLE:
        return 0
    hidden = guess.distance * guess.layer_step_ns - guess.backlog_ns
    return guess.probability * min(max(hidden, 1), guess.copy_ns)


@miss_choice("sooner")
def sooner(miss):
    return CORES if miss.busy_ns + miss.cores_ns < miss.link_ns + miss.device_ns else FETCH
