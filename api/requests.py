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


def requests_of(lengths: LengthsLike, prompt_tokens: int | None, reply_tokens: int | None, requests: int, *,
                recorded: bool, longest: int | None = None) -> RequestLengths | None:  # fmt: skip
    """Return the requests asked for; None for a recording's own. Raises InputError for none at all, or for two answers.

    requests: how many, where nothing says so. longest: context of the model, which the usual prompt does not exceed.
    """
    given = {"--prompt-tokens": prompt_tokens, "--reply-tokens": reply_tokens}
    if lengths is not None:
        for option, value in given.items():
            if value is not None:
                raise InputError(option, value, "the lengths of requests are given already", "give one of the two")
        if isinstance(lengths, RequestLengths):
            return lengths
        from ..traces.readers.files.lengths import read_lengths

        return read_lengths(lengths, max(DEFAULT_REQUESTS, requests))
    if recorded and prompt_tokens is None and reply_tokens is None:
        return None
    reply = (0 if recorded else DEFAULT_REPLY) if reply_tokens is None else reply_tokens
    room = DEFAULT_PROMPT if longest is None else max(0, min(DEFAULT_PROMPT, longest - reply))
    prompt = (0 if recorded else room) if prompt_tokens is None else prompt_tokens
    if prompt + reply == 0:
        raise InputError("--reply-tokens", 0, "a request without any token", "give --prompt-tokens or --reply-tokens")
    return RequestLengths.alike(prompt_tokens=prompt, reply_tokens=reply, requests=requests)


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
