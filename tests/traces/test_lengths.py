"""Lengths of requests: drawn, listed in files, put into plans, and filled from a recording."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.traces.lengths import RequestLengths, lengths_from_dict
from moeplan.traces.readers.files.lengths import read_lengths
from moeplan.traces.recording import RoutingTrace
from moeplan.traces.synthesis.assembled import assemble

LISTS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8)


@given(LISTS)
def test_a_plan_document_says_the_lengths_again(rows: list[tuple[int, int, int]]) -> None:
    lengths = RequestLengths(
        prompt=tuple(prompt + cached for prompt, _, cached in rows), reply=tuple(reply for _, reply, _ in rows),
        cached=tuple(cached for _, _, cached in rows),
    )  # fmt: skip
    assert lengths_from_dict(lengths.to_dict(), "lengths") == lengths


def test_lognormal_lengths_have_the_median_and_spread_asked_for() -> None:
    found = RequestLengths.lognormal(prompt_tokens=1000, reply_tokens=100, cached_tokens=0, spread=2.0, requests=999)
    assert median(found.prompt) == 1000 and median(found.reply) == 100
    logs = np.log(found.prompt)
    assert math.exp(logs.std()) == pytest.approx(2.0, rel=0.01)
    assert abs(np.corrcoef(logs, np.log(found.reply))[0, 1]) < 0.1
    again = RequestLengths.lognormal(prompt_tokens=1000, reply_tokens=100, cached_tokens=0, spread=2.0, requests=999)
    assert again == found


def test_prompts_are_longer_than_the_prefix_that_they_share() -> None:
    found = RequestLengths.lognormal(prompt_tokens=100, reply_tokens=10, cached_tokens=90, spread=3.0, requests=40)
    assert set(found.cached) == {90} and int(found.computed.min()) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.csv", "prompt_tokens,reply_tokens,cached_tokens\n30,4,10\n20,5,0\n"),
        ("own.jsonl", '{"prompt_tokens": 30, "reply_tokens": 4, "cached_tokens": 10}\n{"prompt_tokens": 20, "reply_tokens": 5}\n'),
    ],
)  # fmt: skip
def test_own_columns_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    expected = RequestLengths(prompt=(30, 20), reply=(4, 5), cached=(10, 0))
    assert read_lengths(tmp_path / name, 9) == expected
    assert read_lengths(tmp_path / name, 1) == expected.first(1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"),
        ("burst.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,0,0,0,x\n9,GPT-4,374,44,418,x\n"),
        ("mooncake.jsonl", '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'),
    ],
)  # fmt: skip
def test_public_traces_are_read_and_failed_requests_left_out(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_lengths(tmp_path / name, 9) == RequestLengths(prompt=(374,), reply=(44,), cached=(0,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no request"), ("a,b\n1,2\n", "prompt_tokens"), ("prompt_tokens,reply_tokens\n-1,2\n", "0 to"),
        ("prompt_tokens,reply_tokens\nNaN,2\n", "whole number"), ("prompt_tokens,reply_tokens\n9e99,2\n", "whole number"),
        ("prompt_tokens,reply_tokens\n1\n", "cells"), ("prompt_tokens,reply_tokens,cached_tokens\n5,2,5\n", "at least its last"),
        ("prompt_tokens,reply_tokens\n0,0\n", "no request"),
    ],
)  # fmt: skip
def test_files_that_list_no_requests_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lengths.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_lengths(tmp_path / "lengths.csv", 9)


@pytest.mark.parametrize(
    "damaged",
    [
        None, [], {"prompt_tokens": 1, "reply_tokens": 1}, {"prompt_tokens": 1, "reply_tokens": 1, "requests": 0},
        {"prompt_tokens": [1, 2], "reply_tokens": 1, "requests": 3}, {"prompt_tokens": -1, "reply_tokens": 1, "requests": 1},
        {"prompt_tokens": True, "reply_tokens": 1, "requests": 1},
        {"prompt_tokens": 1, "reply_tokens": 1, "cached_tokens": 2, "requests": 1},
    ],
)  # fmt: skip
def test_damaged_plans_are_refused(damaged: object) -> None:
    with pytest.raises(InputError, match=r"asked\.prior"):
        lengths_from_dict(damaged, "plan: asked.prior")


def recording() -> RoutingTrace:
    """Return two requests, prompts of 3 and 2 tokens, replies of 2 and 1; row r chose expert r."""
    return RoutingTrace(
        experts=np.arange(8, dtype=np.uint8).reshape(8, 1, 1), request=np.array([0] * 5 + [1] * 3, np.int32),
        position=np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32), phase=np.array([0, 0, 0, 1, 1, 0, 0, 1], np.uint8), num_experts=8,
        model="", layer_ids=(0,), source="a test", licence="",
    )  # fmt: skip


def test_requests_are_put_together_from_recorded_segments() -> None:
    found = assemble(recording(), RequestLengths(prompt=(6, 2), reply=(1, 3), cached=(2, 0)))
    # Prompt rows are 0 1 2 5 6, reply rows 3 4 7; each request goes on where the one before stopped.
    assert found.experts.ravel().tolist() == [0, 1, 2, 5, 3, 6, 0, 4, 7, 3]
    assert found.request.tolist() == [0] * 5 + [1] * 5
    assert found.position.tolist() == [2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert found.phase.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1, 1]
    assert "2 recorded requests" in found.source


@pytest.mark.parametrize(("prompt", "reply", "option"), [(6, 1, "--prompt-tokens"), (1, 4, "--reply-tokens")])
def test_nothing_recorded_is_taken_twice_within_a_request(prompt: int, reply: int, option: str) -> None:
    with pytest.raises(InputError, match=f"{option} = .*the recording has"):
        assemble(recording(), RequestLengths.alike(prompt_tokens=prompt, reply_tokens=reply))
