"""Lengths of requests on the command line: how long, how many, how much they differ, what is cached, or a file of them.

Modelled: one meaning for every command that takes them; a recording beside them is what requests are put together from. Ignored: what
is predicted of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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
    if file is None and cached_tokens is None and spread is None and requests is None:
        return None
    from ...api.requests import requests_of

    return requests_of(file, prompt_tokens, reply_tokens, requests, recorded=False, together=concurrency or 1,
                       cached_tokens=cached_tokens, spread=spread)  # fmt: skip
