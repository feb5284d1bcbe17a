"""Synthetic recordings: dials and a seed in, choices of experts out, chunk by chunk in constant memory.

Modelled: requests one after another, each with a prompt and generated tokens; see `dials` for how a token chooses. The
same dials, seed and length give the same file, byte for byte. Ignored: the text, so nothing follows from a token's
meaning; batches (requests are recorded one by one, as a replay wants them).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from ...base.errors import InputError
from ...base.units import MIB
from ...base.version import __version__
from ..domains import KEY as DOMAINS
from ..domains import encode_domains
from ..format import TraceWriter
from ..recording import DECODE, PREFILL, RoutingTrace
from ..validate import validate_trace
from .counter_random import shuffled, uniforms
from .dial import LONG_WINDOW, Dials, dials_as_json
from .kernel import alias_table, fill_choices, fill_guesses

_CHUNK_BYTES = 4 * MIB
_MAX_TOKENS = 1 << 40
_MAX_SEED = (1 << 63) - 1
# Streams of random numbers; every layer, domain and request has one of its own, counted from where its kind starts.
_PROMPTS, _DECODES, _ROLES = range(3)
_EXPERTS, _DOMAINS, _REQUESTS = 1 << 32, 2 << 32, 3 << 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestPlan:
    """Lengths and domains of the requests of a recording, decided before any choice is made."""

    prompt: npt.NDArray[np.int64]
    """[num_requests]: tokens of each prompt."""
    total: npt.NDArray[np.int64]
    """[num_requests]: tokens of each request, prompt included; at least 1."""
    domain: npt.NDArray[np.int64]
    """[num_requests]: index of each request's domain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive rows of a synthetic recording, with the columns of `RoutingTrace`."""

    experts: npt.NDArray[np.unsignedinteger]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.uint8]
    predicted: npt.NDArray[np.int16] | None
    predicted_prob: npt.NDArray[np.float16] | None


def synthesise(
    dials: Dials,
    path: str | os.PathLike[str],
    *,
    num_tokens: int | None = None,
    num_requests: int | None = None,
    seed: int = 0,
    model: str = "",
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write a synthetic recording to `path`, of `num_requests` requests or as many as reach `num_tokens`, all whole.

    `progress` is told the share done, from 0 to 1. Raises InputError when neither or both are given, when they or the seed
    are out of range, or when the file cannot be written.
    """
    plan = plan_requests(dials, num_tokens=num_tokens, num_requests=num_requests, seed=seed)
    done, total = 0, int(plan.total.sum())
    with TraceWriter(
        path,
        num_experts=dials.num_experts,
        model=model,
        layer_ids=_layer_ids(dials),
        source=_source(seed),
        metadata=_metadata(dials, plan, seed),
    ) as writer:
        for chunk in generate(dials, plan, seed):
            writer.append(
                experts=chunk.experts,
                request=chunk.request,
                position=chunk.position,
                phase=chunk.phase,
                predicted=chunk.predicted,
                predicted_prob=chunk.predicted_prob,
            )
            done += len(chunk.experts)
            if progress is not None:
                progress(done / total)
        writer.finish()


def synth_trace(
    dials: Dials,
    *,
    num_tokens: int | None = None,
    num_requests: int | None = None,
    seed: int = 0,
    model: str = "",
    plan: RequestPlan | None = None,
) -> RoutingTrace:
    """Return a synthetic recording in memory.

    `plan` gives the requests instead of dials and length. Raises InputError.
    """
    if plan is None:
        plan = plan_requests(dials, num_tokens=num_tokens, num_requests=num_requests, seed=seed)
    chunks = list(generate(dials, plan, seed))
    predicted = [chunk.predicted for chunk in chunks if chunk.predicted is not None]
    probability = [chunk.predicted_prob for chunk in chunks if chunk.predicted_prob is not None]
    trace = RoutingTrace(
        experts=np.concatenate([chunk.experts for chunk in chunks]),
        request=np.concatenate([chunk.request for chunk in chunks]),
        position=np.concatenate([chunk.position for chunk in chunks]),
        phase=np.concatenate([chunk.phase for chunk in chunks]),
        num_experts=dials.num_experts,
        model=model,
        layer_ids=_layer_ids(dials),
        source=_source(seed),
        licence="",
        predicted=np.concatenate(predicted) if predicted else None,
        predicted_prob=np.concatenate(probability) if probability else None,
        metadata=_metadata(dials, plan, seed),
    )
    validate_trace(trace)
    return trace


def plan_requests(
    dials: Dials, *, num_tokens: int | None = None, num_requests: int | None = None, seed: int = 0
) -> RequestPlan:
    """Return lengths and domains of whole requests: as many as it takes to reach `num_tokens`, or `num_requests`. Raises InputError.

    No request is cut: a prompt without its answer would replay as one that never decodes.
    """
    if (num_tokens is None) == (num_requests is None):
        given = {"num_tokens": num_tokens, "num_requests": num_requests}
        raise InputError("num_tokens", given, "exactly one of num_tokens and num_requests decides", "give one of them")
    for name, value, most in (("num_tokens", num_tokens, _MAX_TOKENS), ("num_requests", num_requests, 1 << 31)):
        if value is not None and not (1 <= value < most):
            raise InputError(name, value, f"must be 1 to {most - 1}", "give a smaller number")
    if not (0 <= seed <= _MAX_SEED):
        raise InputError("seed", seed, f"must be 0 to {_MAX_SEED}", "give a non-negative seed")
    prompts, totals, done, first = [], [], 0, 0
    while done < (num_tokens or 1) and (num_requests is None or first < num_requests):
        count = 4096 if num_requests is None else num_requests
        prompt = _lengths(dials.prompt_tokens, uniforms(seed, _PROMPTS, first, count))
        total = prompt + _lengths(dials.decode_tokens, uniforms(seed, _DECODES, first, count))
        empty = total == 0
        total[empty] = 1  # a quantile of 0 for both: the request still has its first token
        prompts.append(prompt)
        totals.append(total)
        done += int(total.sum())
        first += count
        if first >= 1 << 31:
            raise InputError("num_tokens", num_tokens, "needs more than 2**31 requests", "make requests longer")
    prompt, total = np.concatenate(prompts), np.concatenate(totals)
    if num_tokens is not None:
        ends = np.cumsum(total)
        last = int(np.searchsorted(ends, num_tokens))
        prompt, total = prompt[: last + 1], total[: last + 1]
    number = np.arange(len(total))
    domain = number // dials.requests_per_domain % dials.num_domains
    return RequestPlan(prompt=prompt, total=total, domain=domain)


def generate(dials: Dials, plan: RequestPlan, seed: int) -> Iterator[Chunk]:
    """Return the rows of a recording in chunks of a few megabytes; memory does not grow with their number."""
    dtype = np.uint8 if dials.num_experts <= 1 << 8 else np.uint16
    columns = dials.num_layers + 1
    # A chunk may hold as many requests as rows, and each request has a table of num_experts entries.
    row_bytes = columns * dials.top_k * np.dtype(dtype).itemsize
    step = max(256, min(_CHUNK_BYTES // row_bytes, _CHUNK_BYTES // dials.num_experts))
    halo = min(LONG_WINDOW, int(plan.total.max()))
    roles = np.zeros((halo + step, columns, dials.top_k), dtype)
    expert_of = np.stack([shuffled(seed, _EXPERTS + layer, dials.num_experts) for layer in range(dials.num_layers)])
    depth = np.interp(np.linspace(0, 1, dials.num_layers), np.linspace(0, 1, len(dials.layer_reuse)), dials.layer_reuse)
    factor = np.concatenate(([1.0], depth))
    popularity = _popularity(dials, seed)
    right = _right_guesses(dials)
    ends = np.cumsum(plan.total)
    num_tokens = int(ends[-1])
    for start in range(0, num_tokens, step):
        count = min(step, num_tokens - start)
        token = np.arange(start, start + count)
        request = np.searchsorted(ends, token, side="right")
        position = token - (ends - plan.total)[request]
        keep, other = _alias_tables(dials, plan, popularity, seed, int(request[0]), int(request[-1]))
        experts = np.empty((count, dials.num_layers, dials.top_k), dtype)
        fill_choices(
            seed, start, halo, np.minimum(position, halo), request - request[0], keep, other,
            dials.reuse_short * factor, dials.reuse_long * factor, dials.short_span, dials.long_decay,
            dials.affinity, dials.affinity_spread, expert_of, roles[: halo + count], experts,
        )  # fmt: skip
        predicted = probability = None
        if len(right):
            predicted = np.empty((count, dials.num_layers, *right.shape), np.int16)
            fill_guesses(seed, start, request - request[0], keep, other, expert_of, experts, right, predicted)
            probability = np.where(predicted >= 0, right.astype(np.float16), np.float16(0)).astype(np.float16)
        yield Chunk(
            experts=experts,
            request=request.astype(np.int32),
            position=position.astype(np.int32),
            phase=np.where(position < plan.prompt[request], PREFILL, DECODE).astype(np.uint8),
            predicted=predicted,
            predicted_prob=probability,
        )
        roles[:halo] = roles[count : halo + count].copy()


def base_popularity(dials: Dials) -> npt.NDArray[np.float64]:
    """Return the relative popularity of roles, most popular last unless `popularity` orders it otherwise:
    [num_experts].

    Without `popularity`: evenly spaced quantiles of a log-normal distribution whose logarithm has deviation `skew`.
    """
    if dials.popularity:
        return np.array(dials.popularity, dtype=np.float64)
    quantile: npt.NDArray[np.float64] = ndtri((np.arange(dials.num_experts) + 0.5) / dials.num_experts)
    return np.exp(dials.skew * quantile)


def _popularity(dials: Dials, seed: int) -> npt.NDArray[np.float64]:
    """Return the popularity of each role, dealt out at random so that neighbouring roles (twins) are strangers."""
    return base_popularity(dials)[shuffled(seed, _ROLES, dials.num_experts)]


def _alias_tables(
    dials: Dials, plan: RequestPlan, popularity: npt.NDArray[np.float64], seed: int, first: int, last: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return alias tables (keep, other) [last + 1 − first, num_experts] of what each request draws anew."""
    size = dials.num_experts
    keep, other = np.empty((last + 1 - first, size)), np.empty((last + 1 - first, size), np.int64)
    quantile = ndtri((np.arange(size) + 0.5) / size)
    # A shift along `lean` makes loads as a whole more or less concentrated (to first order). Taking it out leaves shifts
    # that change which roles a request favours but not how strongly, so seeds and requests differ little in that.
    share = popularity / popularity.sum()
    lean = share**2 / (share**2).sum() - share
    common, own = np.sqrt(dials.domain_share), np.sqrt(1.0 - dials.domain_share)
    for number in range(first, last + 1):
        shift = own * quantile[shuffled(seed, _REQUESTS + number, size)]
        shift += common * quantile[shuffled(seed, _DOMAINS + int(plan.domain[number]), size)]
        shift -= lean * (shift @ lean) / max(lean @ lean, 1e-300)
        alias_table(popularity * np.exp(dials.request_shift * shift), keep[number - first], other[number - first])
    return keep, other


def _right_guesses(dials: Dials) -> npt.NDArray[np.float64]:
    """Return [distance, width].

    Probability that the guess of each rank is one of the experts used; empty without guesses.
    """
    if not dials.guess_recall:
        return np.empty((0, 0))
    recall = np.array(dials.guess_recall, dtype=np.float64)
    return np.minimum(1.0, np.diff(recall, axis=1, prepend=0.0) * dials.top_k)


def _lengths(quantiles: tuple[int, ...], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return lengths drawn by interpolating between evenly spaced quantiles."""
    at = np.linspace(0, 1, len(quantiles))
    return np.rint(np.interp(uniform, at, quantiles)).astype(np.int64)


def _layer_ids(dials: Dials) -> tuple[int, ...]:
    """Return the model layer of each column."""
    return dials.layer_ids or tuple(range(dials.num_layers))


def _source(seed: int) -> str:
    """Return what a synthetic recording says about where it comes from."""
    return f"synthesised by moeplan {__version__}, seed {seed}"


def _metadata(dials: Dials, plan: RequestPlan, seed: int) -> dict[str, str]:
    """Return the metadata of a synthetic recording: its dials, seed and domains."""
    metadata = {"synthetic.dials": json.dumps(dials_as_json(dials)), "synthetic.seed": str(seed)}
    if dials.num_domains > 1:
        names = [f"domain {i}" for i in range(int(plan.domain.max()) + 1)]
        metadata[DOMAINS] = encode_domains(names, np.arange(len(plan.domain), dtype=np.int32), plan.domain)
    return metadata
