"""The routing that a prediction replays: a recording, one put together from it, or one made up, for requests of stated lengths.

Modelled: where routing comes from, in words that the answer repeats; the same for a plan that was made. Ignored: what is predicted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..base.errors import InputError
from ..specs.models import ModelSpec
from ..traces.lengths import RequestLengths, lengths_from_dict
from ..traces.recording import LoadProfile, RoutingTrace
from .load import Recording, as_routing

DEFAULT_PROMPT, DEFAULT_REPLY, DEFAULT_REQUESTS = 512, 128, 32
LengthsLike: TypeAlias = RequestLengths | str | os.PathLike[str] | None
"""Lengths of requests, or the file that lists them."""
Trace: TypeAlias = str | os.PathLike[str] | Recording | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What is replayed, and where it comes from."""

    recording: RoutingTrace
    spread: tuple[RoutingTrace, ...] = ()
    """The same requests with as little and as much locality as texts have; of a recording none."""
    words: str


def requests_of(lengths: LengthsLike, prompt_tokens: int | None, reply_tokens: int | None, requests: int | None = None, *,
                recorded: bool, together: int = 1, longest: int | None = None, cached_tokens: int | None = None,
                spread: float | None = None) -> RequestLengths | None:  # fmt: skip
    """Return the requests asked for, by every command and function; None for a recording's own.

    requests: how many; None: as many as are decoded `together`, `DEFAULT_REQUESTS` or more where lengths differ. longest: context of
    the model, which the usual prompt does not exceed. cached_tokens: of each prompt, those whose keys and values are there already.
    spread: lengths are lognormal, two thirds of them within this factor.

    Raises InputError for none at all, for two answers, or for a file that lists no requests.
    """
    many = requests or max(DEFAULT_REQUESTS, 4 * together)
    if lengths is not None:
        given = {"--prompt-tokens": prompt_tokens, "--reply-tokens": reply_tokens, "--cached-tokens": cached_tokens,
                 "--length-spread": spread}  # fmt: skip
        for option, value in given.items():
            if value is not None:
                raise InputError(option, value, "the lengths of requests are given already", "give one of the two")
        if isinstance(lengths, RequestLengths):
            return lengths
        from ..traces.readers.files.lengths import read_lengths

        return read_lengths(lengths, many)
    said = (prompt_tokens, reply_tokens, cached_tokens, spread, requests)
    if recorded and all(one is None for one in said):
        return None
    # Beside a recording, one length that is given alone is all that a request has; what is said of prompts says there are some.
    alone = recorded and cached_tokens is None and spread is None and requests is None
    reply = (0 if alone else DEFAULT_REPLY) if reply_tokens is None else reply_tokens
    room = DEFAULT_PROMPT if longest is None else max(0, min(DEFAULT_PROMPT, longest - reply))
    prompt = (0 if alone else room) if prompt_tokens is None else prompt_tokens
    if prompt + reply == 0:
        raise InputError("--reply-tokens", 0, "a request without any token", "give --prompt-tokens or --reply-tokens")
    cached = cached_tokens or 0
    if cached and cached >= prompt:
        rule = f"the prompt has {prompt} tokens, and at least its last is computed"
        raise InputError("--cached-tokens", cached, rule, "give fewer, or a longer prompt")
    if spread is None:
        return RequestLengths.alike(
            prompt_tokens=prompt, reply_tokens=reply, requests=requests or together, cached_tokens=cached
        )
    return RequestLengths.lognormal(
        prompt_tokens=prompt, reply_tokens=reply, cached_tokens=cached, spread=spread, requests=many
    )


def routing_of(model: ModelSpec, trace: Trace, lengths: RequestLengths | None, seed: int = 0) -> Routing:
    """Return what is replayed: `trace`, requests of `lengths` put together from it, or made up where there is no recording.

    seed: decides what is drawn where routing is made up; raises InputError for another than 0 beside a recording.
    """
    if trace is not None:
        if seed:
            raise InputError(
                "seed", seed, "a recording is replayed, nothing is drawn", "leave it out, or the recording"
            )
        recording = as_routing(trace)
        name = recording.source or ("given" if isinstance(trace, RoutingTrace | LoadProfile) else os.fspath(trace))
        if lengths is None:
            return Routing(recording=recording, words=f"recording: {name}")
        from ..traces.synthesis.assembled import assemble

        made = assemble(recording, lengths)
        return Routing(recording=made, words=f"recording: {made.source}")
    from ..traces.synthesis.prior import prior_name, prior_recording, spread_recordings

    lengths = lengths or RequestLengths.alike(prompt_tokens=DEFAULT_PROMPT, reply_tokens=DEFAULT_REPLY)
    return Routing(
        recording=prior_recording(model, lengths, seed=seed), spread=spread_recordings(model, lengths, seed=seed),
        words=f"no recording: routing as {prior_name(model)}'s, in this model's shape; {lengths.words()}",
    )  # fmt: skip


def planned_routing(document: Mapping[str, Any], model: ModelSpec, trace: Trace) -> Routing:
    """Return what a plan was made on: the recording given, or the one made up for its requests; raises InputError for another."""
    from ..traces.content import check_recording

    made_up, segments = prior_lengths(document), _lengths(document, "segments")
    if trace is None and made_up is None:
        raise InputError("--trace", "(absent)", "the plan was made from a recording", "give that recording")
    found = routing_of(model, trace, made_up if trace is None else segments)
    check_recording(document, found.recording, "(none: routing is made up)" if trace is None else trace_name(trace))
    return found


def trace_name(trace: str | os.PathLike[str] | Recording) -> str:
    """Return what a recording is called in a message: its path, or where it comes from."""
    return trace.source if isinstance(trace, RoutingTrace | LoadProfile) else os.fspath(trace)


def prior_lengths(document: Mapping[str, Any]) -> RequestLengths | None:
    """Return the requests that a plan's routing was made up for; None where it was recorded. Raises InputError for a damaged plan."""
    return _lengths(document, "prior")


def _lengths(document: Mapping[str, Any], name: str) -> RequestLengths | None:
    asked = document.get("asked")
    found = asked.get(name) if isinstance(asked, dict) else None
    return None if found is None else lengths_from_dict(found, f"plan: asked.{name}")
