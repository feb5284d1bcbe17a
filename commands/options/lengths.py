"""Lengths of requests on the command line: how long, how many, how much they differ, what is cached, or a file of them.

Modelled: one meaning for every command that takes them; a recording beside them is what requests are put together from. Ignored: what
is predicted of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ...base.errors import InputError
from .bounds import CONTEXT_TOKENS as TOKENS
from .bounds import REQUESTS_TOGETHER, between

if TYPE_CHECKING:
    from ...traces.lengths import RequestLengths

_MOST_SPREAD = 20.0

PromptOption = Annotated[
    int | None,
    typer.Option(
        "--prompt-tokens",
        help="Length of a prompt (512 without a recording); beside --trace, requests are put together from its segments.",
        callback=between(0, TOKENS, "tokens"),
    ),
]
ReplyOption = Annotated[
    int | None,
    typer.Option(
        "--reply-tokens",
        help="Length of a reply (128 without a recording); beside --trace as --prompt-tokens.",
        callback=between(0, TOKENS, "tokens"),
    ),
]
CachedOption = Annotated[
    int | None,
    typer.Option(
        "--cached-tokens",
        help="Of each prompt, the tokens whose keys and values are cached (a prefix that requests share); default: none.",
        callback=between(0, TOKENS, "tokens"),
    ),
]
SpreadOption = Annotated[
    float | None,
    typer.Option(
        "--length-spread",
        help="Lengths are lognormal around --prompt-tokens and --reply-tokens: two thirds of them within this factor; default: all alike.",
        callback=between(1.0, _MOST_SPREAD, "(a factor)"),
    ),
]
RequestsOption = Annotated[
    int | None,
    typer.Option(
        "--requests",
        help="Requests to replay; default: as many as are decoded together, 32 or more where lengths differ.",
        callback=between(1, REQUESTS_TOGETHER, "requests"),
    ),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        help="File of request lengths, one a row (.csv, .jsonl): prompt_tokens, reply_tokens, cached_tokens, or a public trace's columns.",
    ),
]


def lengths_asked(*, prompt_tokens: int | None, reply_tokens: int | None, cached_tokens: int | None, spread: float | None,
                  requests: int | None, file: str | None, concurrency: int | None) -> RequestLengths | None:  # fmt: skip
    """Return the requests that these options describe; None where at most --prompt-tokens and --reply-tokens are given.

    Raises InputError for options that contradict each other, or a file that lists no requests.
    """
    from ...api.requests import DEFAULT_PROMPT, DEFAULT_REPLY, DEFAULT_REQUESTS
    from ...traces.lengths import RequestLengths

    together = concurrency or 1
    if file is not None:
        from ...traces.readers.files.lengths import read_lengths

        said = {"--prompt-tokens": prompt_tokens, "--reply-tokens": reply_tokens, "--cached-tokens": cached_tokens}
        for option, value in (said | {"--length-spread": spread}).items():
            if value is not None:
                raise InputError(option, value, "--lengths says how long each request is", "give one of the two")
        return read_lengths(file, requests or max(DEFAULT_REQUESTS, 4 * together))
    if cached_tokens is None and spread is None and requests is None:
        return None
    prompt = DEFAULT_PROMPT if prompt_tokens is None else prompt_tokens
    reply = DEFAULT_REPLY if reply_tokens is None else reply_tokens
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
    count = requests or max(DEFAULT_REQUESTS, 4 * together)
    return RequestLengths.lognormal(
        prompt_tokens=prompt, reply_tokens=reply, cached_tokens=cached, spread=spread, requests=count
    )
