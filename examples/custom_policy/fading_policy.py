"""A cache that forgets slowly: uses count, and count half as much every HALF_LIFE passes (LRFU, Lee et al., 2001).

All experts fade alike, so their order changes only when one is used: a merit is kept as the logarithm of faded uses, in units of
half-lives since the run began, and never has to be touched in between.
"""

from math import log2

from moeplan.api.policies import merit, victim_score

HALF_LIFE = 12  # forward passes


@merit("fading")
def add_a_use(expert, now):
    age = now.layer_step / (now.num_layers * HALF_LIFE)
    if expert.last_used < 0:
        return age
    return age + log2(1.0 + 2.0 ** (expert.merit - age))


@victim_score("fading")
def least_faded_uses(expert, now):
    return expert.merit
