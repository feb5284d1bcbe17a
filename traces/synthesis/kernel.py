"""The compiled loops of synthesis: choices token by token, and guesses about them.

Modelled: see `dials`. Roles, not experts, are what a token chooses; each layer gives every role its own expert. For
each of its k choices a token draws once, for all layers, whether it repeats an earlier token and which choice of it
(so a repeated word repeats in every layer), or whether it is new. A new choice is the token's base in common, by
probability `affinity`, or the layer's own. A role already chosen is drawn again, so the k choices differ. Every draw
is keyed by seed, token and layer, so a recording does not depend on how it is cut into chunks. Ignored: time.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ...base.jit import jit
from .counter_random import GOLDEN, mix, unit

# Odd constants that keep the keys of layers, guesses and choices apart.
_LAYER = np.uint64(0xD1342543DE82EF95)
_GUESS, _CHOICE = np.uint64(0xAF251AF3B0F025B5), np.uint64(0xB564EF22EC7AECE5)
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)
_SLOT_BITS = np.uint64(0x7FF)  # the low bits `unit` leaves out
_TRIES = 16  # before the next free role is taken


@jit
def alias_table(weight: npt.NDArray[np.float64], keep: npt.NDArray[np.float64], other: npt.NDArray[np.int64]) -> None:
    """Fill the alias table of a discrete distribution (Walker 1977; Vose 1991).

    weight: [E], not all zero; keep, other: [E]; drawing i evenly, then i with probability keep[i] and else other[i],
    gives each i with probability weight[i] / sum.
    """
    size = len(weight)
    keep[:] = weight * (size / weight.sum())
    small, large = np.empty(size, np.int64), np.empty(size, np.int64)
    num_small = num_large = 0
    for i in range(size):
        other[i] = i
        if keep[i] < 1.0:
            small[num_small] = i
            num_small += 1
        else:
            large[num_large] = i
            num_large += 1
    while num_small and num_large:
        num_small -= 1
        giver = large[num_large - 1]
        taker = small[num_small]
        other[taker] = giver
        keep[giver] -= 1.0 - keep[taker]
        if keep[giver] < 1.0:
            num_large -= 1
            small[num_small] = giver
            num_small += 1
    for i in range(num_small):
        keep[small[i]] = 1.0
    for i in range(num_large):
        keep[large[i]] = 1.0


@jit
def fill_choices(
    seed: int,
    first: int,
    halo: int,
    before: npt.NDArray[np.int64],
    request: npt.NDArray[np.int64],
    keep: npt.NDArray[np.float64],
    other: npt.NDArray[np.int64],
    short: npt.NDArray[np.float64],
    long: npt.NDArray[np.float64],
    short_span: float,
    long_decay: float,
    affinity: float,
    spread: float,
    expert_of: npt.NDArray[np.int64],
    roles: npt.NDArray[np.unsignedinteger],
    experts: npt.NDArray[np.unsignedinteger],
) -> None:
    """Fill rows halo, halo + 1, … of `roles` and the same rows, counted from 0, of `experts`.

    roles: [halo + T, L + 1, K], rows before `halo` known, column 0 the base and l + 1 layer l; experts: [T, L, K];
    first: number of the first new token; before: [T] tokens of its request that come before it (at most halo count);
    request: [T] row of its request in keep and other [R, E] (alias tables over roles); short, long: [L + 1]
    probabilities of repeating; expert_of: [L, E].
    """
    num_rows, columns, top_k = roles.shape
    num_roles = keep.shape[1]
    log_stay = math.log(1.0 - 1.0 / short_span) if short_span > 1.0 else -math.inf
    power = 1.0 - long_decay
    if abs(power) < 1e-6:
        power = 1e-6  # the power law at exponent 1 is a logarithm; this close to it the formula below agrees
    for row in range(halo, num_rows):
        token = mix(mix(np.uint64(seed) + GOLDEN) + np.uint64(first + row - halo) * GOLDEN)
        back = before[row - halo]
        which = request[row - halo]
        near = far = 0
        if back > 0:
            u = unit(mix(token + _ONE))
            near = 1 + int(math.log(1.0 - u) / log_stay)
            if near > back:
                near = 1 + int(u * back)
            u = unit(mix(token + _TWO))
            far = min(back, int((1.0 + u * ((back + 1.0) ** power - 1.0)) ** (1.0 / power)))
        for column in range(columns):
            draw = mix(token + (np.uint64(column) + _THREE) * _LAYER)
            for j in range(top_k):
                common = mix(token + np.uint64(j + 1) * _CHOICE)  # the same in every layer
                role = 0
                free = False
                for attempt in range(_TRIES):
                    draw += GOLDEN
                    bits = mix(draw)
                    v = unit(bits)
                    if attempt > 0:
                        draw += GOLDEN
                        common = mix(draw)
                    u = unit(common)
                    slot = int(common & _SLOT_BITS) % top_k
                    if back > 0 and u < short[column]:
                        role = int(roles[row - near, column, slot])
                    elif back > 0 and u < short[column] + long[column]:
                        role = int(roles[row - far, column, slot])
                    elif column > 0 and v < affinity:
                        v = v / affinity
                        role = int(roles[row, 0, j if attempt == 0 else slot])
                        if v < spread and (role ^ 1) < num_roles:
                            role ^= 1
                    else:
                        if column > 0:
                            v = (v - affinity) / (1.0 - affinity)
                        scaled = v * num_roles
                        role = int(scaled)
                        if scaled - role >= keep[which, role]:
                            role = other[which, role]
                    free = True
                    for i in range(j):
                        if roles[row, column, i] == role:
                            free = False
                    if free:
                        break
                while not free:
                    role = (role + 1) % num_roles
                    free = True
                    for i in range(j):
                        if roles[row, column, i] == role:
                            free = False
                roles[row, column, j] = role
                if column > 0:
                    experts[row - halo, column - 1, j] = expert_of[column - 1, role]


@jit
def fill_guesses(
    seed: int,
    first: int,
    request: npt.NDArray[np.int64],
    keep: npt.NDArray[np.float64],
    other: npt.NDArray[np.int64],
    expert_of: npt.NDArray[np.int64],
    experts: npt.NDArray[np.unsignedinteger],
    right: npt.NDArray[np.float64],
    predicted: npt.NDArray[np.int16],
) -> None:
    """Fill guesses that are right as often as `right` [D, W] says, by distance and rank.

    experts: [T, L, K]; predicted: [T, L, D, W]. Which ranks are right is sampled systematically: with one uniform
    number per row, rank w is right where the running sum of `right` passes an integer, so every rank has exactly its
    probability and no row is right more often than it has experts. Wrong guesses are drawn like new choices.
    """
    num_tokens, num_layers, top_k = experts.shape
    _, _, num_distances, width = predicted.shape
    num_roles = keep.shape[1]
    used = np.empty(top_k, np.bool_)
    for t in range(num_tokens):
        token = mix(mix(np.uint64(seed) + _GUESS) + np.uint64(first + t) * GOLDEN)
        for layer in range(num_layers):
            for d in range(num_distances):
                if layer <= d:
                    predicted[t, layer, d] = -1
                    continue
                draw = mix(token + np.uint64(layer * num_distances + d + 1) * _LAYER)
                running = unit(draw)
                used[:] = False
                for w in range(width):
                    passed = math.floor(running)
                    running += right[d, w]
                    draw += GOLDEN
                    bits = mix(draw)
                    if math.floor(running) > passed:
                        j = int(bits & _SLOT_BITS) % top_k
                        for _ in range(top_k):
                            if not used[j]:
                                break
                            j = (j + 1) % top_k
                        used[j] = True
                        predicted[t, layer, d, w] = experts[t, layer, j]
                        continue
                    role = 0
                    fresh = False
                    tries = 0
                    while not fresh:
                        if tries < _TRIES:
                            draw += GOLDEN
                            scaled = unit(mix(draw)) * num_roles
                            role = int(scaled)
                            if scaled - role >= keep[request[t], role]:
                                role = other[request[t], role]
                        else:
                            role = (role + 1) % num_roles
                        tries += 1
                        guess = expert_of[layer, role]
                        fresh = True
                        for j in range(top_k):
                            if experts[t, layer, j] == guess:
                                fresh = False
                        for i in range(w):
                            if predicted[t, layer, d, i] == guess:
                                fresh = False
                    predicted[t, layer, d, w] = expert_of[layer, role]
