"""Telling routing from what engines write beside it: padding, rows never captured, dense layers, shared experts.

Modelled, over all requests of one recording: ids below zero and the same ids wrapped into an unsigned type (255, 65535)
are padding; a choice that is padding everywhere, or that names the fused shared expert everywhere, is no choice; a
layer that is blank in every token is dense; a token that is blank in every other layer, or lacks a part, is dropped
and counted by its cause. Where two readings are possible and would give different recordings, the file is refused.
Ignored: wrong ids that look right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from . import account as causes
from .account import Account, layer_ranges

Ids = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
_WRAPPED = (0xFF, 0xFFFF, 0xFFFF_FFFF)  # −1 in unsigned types of one, two and four bytes
# With one choice a token, expert 0 is also what a blank reads like. A router that sends this many tokens running, or one
# token in this many layers, to expert 0 is not credible.
_CREDIBLE_TOKENS = 8
_CREDIBLE_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Routing of several requests, every choice real."""

    experts: list[Ids]
    """Per request [tokens kept, routed layers, choices]."""
    kept: list[Mask]
    """Per request [tokens]: which rows are left."""
    columns: list[int]
    """Columns of the source that are routed layers."""
    dense: list[int]
    """Columns in which nothing is routed."""
    choices: list[int]
    """Which of a token's recorded choices are left."""
    num_experts: int | None
    """Logical experts where the ids tell; None where only the largest id does."""


def clean(requests: Sequence[Ids], num_experts: int | None, account: Account) -> Cleaned:
    """Return what is routing in `requests`, arrays [tokens, layers, k] of one shape but for tokens.

    `account` counts what is dropped. Raises InputError when nothing is left, or where padding cannot be told from ids.
    """
    wraps = _wrapped_values(requests, num_experts)
    pads: Sequence[Mask] = [_padding(ids, wraps, num_experts) for ids in requests]
    choices = np.arange(requests[0].shape[2])
    fused, num_experts = _fused_experts(requests, pads, num_experts, account)
    choices, requests, pads = _chosen(choices, requests, pads, fused)
    choices, requests, pads = _chosen(choices, requests, pads, _padded_choices(requests, pads, account))
    top_k = requests[0].shape[2]
    blanks = [pad.all(axis=2) | ((ids == 0).all(axis=2)) for ids, pad in zip(requests, pads, strict=True)]
    dense = _dense_columns(blanks, pads, top_k, account)
    if dense.all():
        raise InputError("routed experts", "blank", "no layer routes to any expert", "record with routing turned on")
    routed = np.flatnonzero(~dense)
    experts, kept = [], []
    for ids, pad, blank in zip(requests, pads, blanks, strict=True):
        keep = _whole_tokens(ids[:, routed], pad[:, routed], blank[:, routed], account)
        experts.append(ids[keep][:, routed])
        kept.append(keep)
    if not any(keep.any() for keep in kept):
        causes_found = ", ".join(f"{cause}: {count}" for cause, count in account.dropped.items())
        raise InputError("routed experts", causes_found, "no token is left", "record with routing turned on")
    columns, dense_columns = routed.tolist(), np.flatnonzero(dense).tolist()
    return Cleaned(
        experts=experts,
        kept=kept,
        columns=columns,
        dense=dense_columns,
        choices=choices.tolist(),
        num_experts=num_experts,
    )


def _wrapped_values(requests: Sequence[Ids], num_experts: int | None) -> tuple[int, ...]:
    """Return the values that may be a wrapped −1 in these arrays: what no id can be, or what only the last id can be."""
    dtype = requests[0].dtype
    largest = int(np.iinfo(dtype).max)
    own = (largest,) if dtype.kind == "u" else ()
    return tuple(
        value
        for value in _WRAPPED
        if value <= largest and (value in own or num_experts is None or value >= num_experts)
    )


def _padding(ids: Ids, wraps: tuple[int, ...], num_experts: int | None) -> Mask:
    """Return which choices are padding.

    A wrapped value that may be an id is padding only where it fills a whole token or occurs twice in one, which no id
    does.
    """
    pad: Mask = ids < 0 if ids.dtype.kind == "i" else np.zeros(ids.shape, bool)
    for value in wraps:
        here: Mask = ids == value
        if not here.any():
            continue
        if num_experts is not None and value >= num_experts:
            pad |= here
            continue
        twice = here.sum(axis=2, keepdims=True) > 1
        # All of a token, but for the zeros of dense layers.
        filled = (here | (ids == 0)).all(axis=(1, 2)) & (here.any(axis=2).sum(axis=1) >= _CREDIBLE_LAYERS)
        certain = twice | filled[:, None, None]
        beside = ids[(ids < value) & ~pad]
        if (
            num_experts is None
            and bool((here & ~certain).any())
            and (not beside.size or int(beside.max()) <= value // 2)
        ):
            if not bool(certain.any()):
                rule = "may be an expert or padding: no other id comes near it"
                raise InputError("expert id", value, rule, "give num_experts")
            certain = np.ones_like(certain)
        pad |= here & certain
    return pad


def _chosen(
    choices: npt.NDArray[np.intp], requests: Sequence[Ids], pads: Sequence[Mask], left_out: Mask
) -> tuple[npt.NDArray[np.intp], Sequence[Ids], Sequence[Mask]]:
    """Return (choices, ids, padding) without the choices that are left out."""
    if not left_out.any():
        return choices, requests, pads
    kept = np.flatnonzero(~left_out)
    return choices[kept], [ids[:, :, kept] for ids in requests], [pad[:, :, kept] for pad in pads]


def _fused_experts(
    requests: Sequence[Ids], pads: Sequence[Mask], num_experts: int | None, account: Account
) -> tuple[Mask, int | None]:
    """Return (which choices [k] name the fused shared experts in every token, num_experts).

    Engines that compute shared experts with the routed ones append them to each token's choices, numbered after the
    last routed expert.
    """
    top_k = requests[0].shape[2]
    low, high = np.full(top_k, np.iinfo(np.int64).max), np.full(top_k, -1)
    seen = 0
    for ids, pad in zip(requests, pads, strict=True):
        real = ~(pad.all(axis=2) | (ids == 0).all(axis=2))
        seen += int(real.sum())
        values = ids[real].astype(np.int64)
        if values.size:
            held = ~pad[real]
            low = np.minimum(low, np.where(held, values, np.iinfo(np.int64).max).min(axis=0))
            high = np.maximum(high, np.where(held, values, -1).max(axis=0))
    if num_experts is not None:
        fused = (low >= num_experts) & (high >= 0)
    else:
        others = [int(np.delete(high, j).max()) if top_k > 1 else -1 for j in range(top_k)]
        fused = (low == high) & (high > np.array(others)) & (seen >= _CREDIBLE_TOKENS) & (np.array(others) >= 0)
    if not fused.any() or fused.all():
        return np.zeros(top_k, bool), num_experts
    number = int(low[fused].min())
    shown = ", ".join(str(int(j) + 1) for j in np.flatnonzero(fused))
    account.note(f"choice {shown} of {top_k} is the fused shared expert (id {number}), left out")
    return np.asarray(fused), num_experts or number


def _padded_choices(requests: Sequence[Ids], pads: Sequence[Mask], account: Account) -> Mask:
    """Return which choices [k] are padding in every token (recorders of a fixed width)."""
    top_k = requests[0].shape[2]
    used = np.zeros(top_k, bool)
    for ids, pad in zip(requests, pads, strict=True):
        real = ~(pad.all(axis=2) | (ids == 0).all(axis=2))
        used |= ~pad[real].all(axis=0) if real.any() else False
    if used.all() or not used.any():
        return np.zeros(top_k, bool)
    account.note(f"{top_k - int(used.sum())} of {top_k} recorded choices are padding in every token, left out")
    return ~used


def _dense_columns(blanks: Sequence[Mask], pads: Sequence[Mask], top_k: int, account: Account) -> Mask:
    """Return which layers are blank in every token."""
    dense: Mask = np.logical_and.reduce([blank.all(axis=0) for blank in blanks])
    if top_k > 1 or not dense.any() or dense.all():
        return dense
    # With one choice, zeros may be expert 0: they count as blank when enough tokens that went elsewhere agree.
    tokens = sum(int((~blank[:, ~dense].all(axis=1)).sum()) for blank in blanks)
    padded: Mask = np.logical_and.reduce([pad.all(axis=(0, 2)) for pad in pads])
    if tokens >= _CREDIBLE_TOKENS or not (dense & ~padded).any():
        return dense
    unsure = layer_ranges(np.flatnonzero(dense & ~padded).tolist())
    account.note(f"recorded layer {unsure}: every token names expert 0; {tokens} tokens are too few to call it dense")
    return padded


def _whole_tokens(ids: Ids, pad: Mask, blank: Mask, account: Account) -> Mask:
    """Return which tokens [tokens] have every choice in every routed layer, and count the others by cause."""
    _, layers, top_k = ids.shape
    padded: Mask = np.asarray(pad.all(axis=(1, 2)))
    empty: Mask = np.asarray(blank.all(axis=1)) & ~padded
    partly: Mask = np.asarray(blank.any(axis=1) & ~blank.all(axis=1) & ~pad.any(axis=(1, 2)))
    if top_k == 1:
        partly[:] = False
        if layers < _CREDIBLE_LAYERS:
            if empty.any():
                account.note(
                    f"{int(empty.sum())} tokens name expert 0 in all {layers} layers and are kept: it may be so"
                )
            empty[:] = False
    incomplete: Mask = np.asarray(pad.any(axis=(1, 2))) & ~padded & ~empty
    account.drop(causes.PADDING, int(padded.sum()))
    account.drop(causes.UNCAPTURED, int(empty.sum()))
    account.drop(causes.INCOMPLETE, int(incomplete.sum()))
    account.drop(causes.PARTLY, int(partly.sum()))
    kept: Mask = ~(padded | empty | incomplete | partly)
    return kept
