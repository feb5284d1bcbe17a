"""How long requests are: prompt, reply, and what of the prompt the engine has in its cache already.

Modelled: requests that are all alike, requests whose lengths are lognormal around a median, and lengths listed one by one (a server's
log). Lognormal lengths are the distribution's own quantiles in a drawn order, so that few requests stand for many and a seed gives
the same ones. Ignored: when requests arrive, and what they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError

_AGAIN = "plan again"
_FIELDS = ("prompt_tokens", "reply_tokens", "cached_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLengths:
    """Lengths of requests in the order in which they come: three tuples, one entry a request."""

    prompt: tuple[int, ...]
    """Tokens of each prompt, the cached ones among them."""
    reply: tuple[int, ...]
    """Tokens that each request generates."""
    cached: tuple[int, ...]
    """Tokens at the beginning of each prompt whose keys and values are there already: nothing is computed for them."""

    @classmethod
    def alike(
        cls, *, prompt_tokens: int, reply_tokens: int, requests: int = 1, cached_tokens: int = 0
    ) -> RequestLengths:
        """Return `requests` requests of the same lengths."""
        return cls(
            prompt=(prompt_tokens,) * requests, reply=(reply_tokens,) * requests, cached=(cached_tokens,) * requests
        )

    @classmethod
    def lognormal(cls, *, prompt_tokens: int, reply_tokens: int, cached_tokens: int, spread: float, requests: int,
                  seed: int = 0) -> RequestLengths:  # fmt: skip
        """Return requests whose prompts and replies are lognormal, independent of each other.

        prompt_tokens, reply_tokens: medians. spread: the geometric standard deviation, so that two thirds of all lengths lie between
        median / spread and median * spread. cached_tokens: the prefix that all share; a prompt is at least one token longer.
        """
        scores = np.array([NormalDist().inv_cdf((each + 0.5) / requests) for each in range(requests)])
        generator = np.random.Generator(np.random.Philox(seed))
        prompt, reply = (
            _quantiles(median, spread, generator.permutation(scores)) for median in (prompt_tokens, reply_tokens)
        )
        least = cached_tokens + 1 if prompt_tokens else 0
        return cls(
            prompt=tuple(max(least, each) for each in prompt),
            reply=reply,
            cached=(min(cached_tokens, least),) * requests,
        )

    def __len__(self) -> int:
        """Return how many requests there are."""
        return len(self.prompt)

    @property
    def computed(self) -> npt.NDArray[np.int64]:
        """[num_requests]: prompt tokens that are computed."""
        return np.array(self.prompt, np.int64) - np.array(self.cached, np.int64)

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """[num_requests]: tokens that are computed or generated."""
        return self.computed + np.array(self.reply, np.int64)

    @property
    def are_alike(self) -> bool:
        """Whether all requests have the same lengths."""
        return len({*zip(self.prompt, self.reply, self.cached, strict=True)}) == 1

    @property
    def longest(self) -> int:
        """Tokens of context at the end of the longest request."""
        return max(prompt + reply for prompt, reply in zip(self.prompt, self.reply, strict=True))

    def first(self, count: int) -> RequestLengths:
        """Return the first `count` requests."""
        return RequestLengths(prompt=self.prompt[:count], reply=self.reply[:count], cached=self.cached[:count])

    def words(self) -> str:
        """Return what a reader is told: how many requests, of which lengths."""
        if self.are_alike:
            kept = f", {self.cached[0]} of the prompt cached" if self.cached[0] else ""
            return f"{len(self)} of {self.prompt[0]} + {self.reply[0]} tokens{kept}"
        kept = f", {_between(self.cached)} of them cached" if any(self.cached) else ""
        return (
            f"{len(self)} requests, prompts of {_between(self.prompt)} tokens{kept}, replies of {_between(self.reply)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a plan document says: one number where all requests are alike, else a list."""
        named = dict(zip(_FIELDS, (self.prompt, self.reply, self.cached), strict=True))
        if not any(self.cached):
            del named["cached_tokens"]
        listed = {key: each[0] if self.are_alike else list(each) for key, each in named.items()}
        return listed | {"requests": len(self)}


def lengths_from_dict(value: object, field: str) -> RequestLengths:
    """Return what `RequestLengths.to_dict` wrote; raises InputError, naming `field`, for anything else."""
    if not isinstance(value, Mapping) or not {*_FIELDS[:2], "requests"} <= set(value) <= {*_FIELDS, "requests"}:
        raise InputError(field, value, f"not a table of {', '.join(_FIELDS)} and requests", _AGAIN)
    requests = value["requests"]
    if type(requests) is not int or not 1 <= requests <= MOST_REQUESTS:
        raise InputError(f"{field}.requests", requests, "not a count of requests", _AGAIN)
    columns = []
    for name in _FIELDS:
        given = value.get(name, 0)
        column = given if isinstance(given, list) else [given] * requests
        if len(column) != requests or not all(type(one) is int and 0 <= one <= MOST_TOKENS for one in column):
            raise InputError(f"{field}.{name}", given, f"not a count of tokens for each of {requests} requests", _AGAIN)
        columns.append(tuple(column))
    prompt, reply, cached = columns
    if any(have > whole for have, whole in zip(cached, prompt, strict=True)):
        raise InputError(f"{field}.cached_tokens", value.get("cached_tokens"), "more than the prompt has", _AGAIN)
    return RequestLengths(prompt=prompt, reply=reply, cached=cached)


MOST_REQUESTS, MOST_TOKENS = 1 << 16, 1 << 30
"""What a list of requests may hold, and a request."""


def _quantiles(median: int, spread: float, scores: npt.NDArray[np.float64]) -> tuple[int, ...]:
    if median == 0:
        return (0,) * len(scores)
    return tuple(max(1, round(each)) for each in (median * np.exp(math.log(spread) * scores)).tolist())


def _between(values: Sequence[int]) -> str:
    """Return "least to most (mean)"."""
    if min(values) == max(values):
        return str(values[0])
    return f"{min(values)} to {max(values)} (mean {sum(values) / len(values):.0f})"
