"""Routing that a serving engine returned with its answers, set against what the answer says about its tokens.

Modelled: a choice has one row for each token that ran: prompt and reply without the last sampled token. Fewer rows are
a prefix that the request skipped or the server left out; more are refused, but for a row of the last sampled token.
Choices of one answer share the prompt's rows, which count once. Ignored: what the payloads look like (the readers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...recording import DECODE, PREFILL
from ..account import NEVER_RAN, PREFIX_LEFT_OUT, SHARED_PROMPT, Account
from ..assemble import RequestRows

_REMEDY = "give the answers as the server sent them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The routing of one reply."""

    experts: npt.NDArray[Any]
    """integers [rows, layers, top_k]."""
    prompt: int | None = None
    """Prompt tokens, where the choice itself says."""
    reply: int | None = None
    """Sampled tokens, where the choice itself says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer says about its tokens; None where it does not."""

    prompt: int | None = None
    reply: int | None = None
    """Sampled tokens: of all choices, or of each."""
    cached: int | None = None
    """Prompt tokens that came from the prefix cache."""
    start: int | None = None
    """First position with routing, where the answer says."""


@dataclass(slots=True)
class AnswerReader:
    """Turns the choices of one answer after another into rows of requests."""

    account: Account
    start: int = 0
    """Position of the first row, as the request asked."""
    start_option: str = "start_len"
    """Name of the option that tells it."""
    prompt_tokens: int | None = None
    """Overrides what the answers say."""
    cached: int = 0
    """Prompt tokens with routing that came from the prefix cache, over all answers."""
    requests: list[RequestRows] = field(default_factory=list)
    _prompts: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, value in ((self.start_option, self.start), ("prompt_tokens", self.prompt_tokens or 0)):
            if not (0 <= value < 1 << 31):
                raise InputError(name, value, "must be 0 to 2147483647", "give the number the request was sent with")

    def add(self, choices: Sequence[Choice], usage: Usage) -> None:
        """Add one answer. Raises InputError when its rows do not fit its tokens."""
        if not choices:
            return
        start = self.start if usage.start is None else usage.start
        prompts = [self._prompt(choice, usage) for choice in choices]
        rows = [len(choice.experts) for choice in choices]
        first, surplus = self._placed(rows, prompts, choices, usage, start)
        if first > start:
            self.account.miss(PREFIX_LEFT_OUT, (first - start) * len(choices))
            self.account.note(
                f"answers without rows for the first {first} tokens, which came from the prefix cache: positions start at {first}"
            )
        elif usage.cached and usage.cached > start:
            self.cached += usage.cached - start
        shared = b""
        for choice, prompt in zip(choices, prompts, strict=True):
            experts = choice.experts[: len(choice.experts) - surplus]
            self.account.read += surplus
            self.account.drop(NEVER_RAN, surplus)
            head = max(0, min(prompt - first, len(experts)))
            told = np.ascontiguousarray(experts[:head]).tobytes()
            again = len(choices) > 1 and bool(shared) and told == shared
            again |= len(choices) == 1 and head > 0 and self._ran_before(told, usage, prompt)
            if again:
                self.account.read += head
                self.account.drop(SHARED_PROMPT, head)
            elif shared and told:
                self.account.note(
                    "choices of one answer have different rows for the prompt: it counts for each of them"
                )
            shared = shared or told
            cut = head if again else 0
            position = np.arange(first + cut, first + len(experts), dtype=np.int64)
            phase = np.where(position < prompt, PREFILL, DECODE)
            self.requests.append(RequestRows(experts=experts[cut:], position=position, phase=phase))

    def finish(self) -> None:
        """Add remarks about all answers. Raises InputError when none carries routing."""
        if not self.requests:
            rule = "no answer carries routed experts"
            raise InputError("routed_experts", 0, rule, "ask the server to return them with each request")
        if self.cached:
            self.account.note(
                f"{self.cached} prompt tokens came from the prefix cache; where their rows are there, they count as computed"
            )

    def _prompt(self, choice: Choice, usage: Usage) -> int:
        """Return how many tokens a choice's prompt has. Raises InputError when nothing tells."""
        for length in (self.prompt_tokens, choice.prompt, usage.prompt):
            if length is not None:
                return length
        rule = "the answer does not say how long the prompt was"
        raise InputError("prompt_tokens", None, rule, "give prompt_tokens, or keep usage in the answer")

    def _placed(
        self, rows: list[int], prompts: list[int], choices: Sequence[Choice], usage: Usage, start: int
    ) -> tuple[int, int]:
        """Return (position of the first row, surplus rows at the end of each choice). Raises InputError."""
        left_out = [start] if usage.cached is None or usage.cached <= start else [start, usage.cached]
        for first in left_out:
            for surplus in (0, 1):
                if surplus and first and not all(_blank(choice.experts[-1:]) for choice in choices):
                    continue  # one row more than asked for is as likely a start that is wrong by one
                if _fits(rows, prompts, choices, usage, first - surplus):
                    # Without a sampled token every row is the prompt's, the last one too.
                    return first, surplus if usage.reply != 0 else 0
        replies = [choice.reply for choice in choices]
        if usage.reply is None and None in replies:
            if all(count >= prompt - 1 - start for count, prompt in zip(rows, prompts, strict=True)):
                self.account.note("answers do not say how many tokens they sampled: rows are taken to be all there")
                return start, 0
            said, missing = f"prompts of {prompts} tokens", prompts[0] - 1 - rows[0]
        else:
            reply = sum(count or 0 for count in replies) if None not in replies else usage.reply or 0
            said = f"{prompts[0]} prompt + {reply} sampled tokens"
            missing = prompts[0] + reply - 1 - rows[0] if len(rows) == 1 else 0
            if len(rows) > 1 and sum(rows) == prompts[0] + reply - len(rows):
                rule = "the answer holds several prompts and says only how long they are together"
                raise InputError("prompt_tokens", prompts[0], rule, "send one prompt a request, or return token ids")
        shown = rows[0] if len(rows) == 1 else rows
        rule = f"the answer speaks of {said}, so rows from position {start} would be others"
        if 0 < missing <= prompts[0] and missing != start:
            remedy = (
                f"give {self.start_option}={missing} if the request or the server skipped the first {missing} tokens"
            )
        else:
            remedy = f"check {self.start_option}, num_layers and top_k, and give whole answers"
        raise InputError("rows of routed_experts", shown, rule, remedy)

    def _ran_before(self, told: bytes, usage: Usage, prompt: int) -> bool:
        """Return whether an earlier answer has these rows for its prompt, and this one took the prompt from the cache."""
        digest = hashlib.blake2b(told, digest_size=16).digest()
        known = digest in self._prompts
        self._prompts.add(digest)
        return known and usage.cached is not None and usage.cached >= prompt - 1


def _fits(rows: list[int], prompts: list[int], choices: Sequence[Choice], usage: Usage, first: int) -> bool:
    """Return whether rows that start at `first` are all tokens an answer speaks of but the last sampled ones."""
    counted = [count + first + 1 - prompt for count, prompt in zip(rows, prompts, strict=True)]
    own = [choice.reply for choice in choices]
    if None not in own:
        return counted == own
    if usage.reply is None or min(counted) < 0:
        return False
    return sum(counted) == usage.reply or all(count == usage.reply for count in counted)


def _blank(rows: npt.NDArray[Any]) -> bool:
    """Return whether rows hold nothing: zeros, or one and the same value (padding)."""
    return not rows.any() or bool((rows == rows.flat[0]).all())


def usage_of(info: dict[str, Any]) -> Usage:
    """Return what an answer, its `usage` or its `meta_info` says about tokens. Raises InputError for senseless counts."""
    usage = _object(info.get("usage"))
    details = _object(usage.get("prompt_tokens_details"))
    ids = info.get("prompt_token_ids")
    prompt = _count(info, "prompt_tokens")
    prompt = _count(usage, "prompt_tokens") if prompt is None else prompt
    prompt = len(ids) if prompt is None and isinstance(ids, list) else prompt
    reply = _count(info, "completion_tokens")
    cached = [
        _count(holder, name)
        for holder, name in ((info, "cached_tokens"), (info, "num_cached_tokens"), (details, "cached_tokens"))
    ]
    return Usage(
        prompt=prompt,
        reply=_count(usage, "completion_tokens") if reply is None else reply,
        cached=next((count for count in cached if count is not None), None),
        start=_count(info, "routed_experts_start_len"),
    )


def choices_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of an answer; vLLM calls them `outputs` in its own objects. Raises InputError."""
    choices = answer.get("choices", answer.get("outputs", []))
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise InputError("choices", type(choices).__name__, "must be a list of objects", _REMEDY)
    return choices


def listed(holder: dict[str, Any], name: str) -> int | None:
    """Return the length of a list of an answer, None when it is absent."""
    value = holder.get(name)
    return len(value) if isinstance(value, list) else None


def _object(value: object) -> dict[str, Any]:
    """Return an object of an answer, empty where it is absent."""
    return value if isinstance(value, dict) else {}


def _count(holder: dict[str, Any], name: str) -> int | None:
    """Return a count an answer states, None when it does not. Raises InputError for one that is no count."""
    value = holder.get(name)
    if value is None:
        return None
    if type(value) is not int or not (0 <= value < 1 << 31):
        raise InputError(name, value, "must be a count of tokens", _REMEDY)
    return value
