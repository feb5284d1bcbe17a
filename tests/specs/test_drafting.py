"""How many drafted tokens are accepted: small cases by hand, sums, what engines print, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.specs.drafting import (
    MOST_DRAFTED,
    Acceptance,
    chances_of_counts,
    counts_of_steps,
    read_acceptance,
    share_accepted,
    tokens_per_step,
    yielding,
)
from moeplan.tests.support.long_runs import examples


def test_tokens_of_a_step_by_hand() -> None:
    half = read_acceptance("0.5")
    assert tokens_per_step(0, half) == 1
    assert tokens_per_step(2, half) == 1 + 0.5 + 0.25
    assert share_accepted(2, half) == 0.375
    assert chances_of_counts(2, half) == (0.5, 0.25, 0.25)
    printed = read_acceptance("0.8,0.6,0.5")  # shares of drafts, as vLLM prints them
    assert tokens_per_step(3, printed) == pytest.approx(2.9)
    assert tokens_per_step(1, printed) == 1.8


def test_never_and_always() -> None:
    assert counts_of_steps(3, read_acceptance(0.0), 0, 5) == [0] * 5
    assert counts_of_steps(3, read_acceptance(1), 7, 5) == [3] * 5
    assert tokens_per_step(MOST_DRAFTED, read_acceptance("1")) == MOST_DRAFTED + 1


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(1, 16), st.floats(0, 1))
def test_a_yield_says_how_many_are_accepted(length: int, share: float) -> None:
    tokens = 1 + share * length
    assert tokens_per_step(length, yielding(length, tokens)) == pytest.approx(tokens, abs=1e-6)


def test_a_yield_that_drafts_cannot_have_is_refused() -> None:
    for tokens in (0.5, 4.2):
        with pytest.raises(InputError, match="what 3 guesses can yield"):
            yielding(3, tokens)


@settings(max_examples=examples(30), deadline=None)
@given(st.integers(0, 8), st.floats(0, 1), st.integers(0, 10_000))
def test_steps_accept_what_their_chances_say(length: int, chance: float, first: int) -> None:
    acceptance = Acceptance(chance=chance)
    counts = counts_of_steps(length, acceptance, first, 400)
    assert counts == [counts_of_steps(length, acceptance, first + step, 1)[0] for step in range(400)]
    assert sum(chances_of_counts(length, acceptance)) == pytest.approx(1)
    assert 1 + sum(counts) / 400 == pytest.approx(tokens_per_step(length, acceptance), abs=0.02 * length)


def test_files_say_the_same(tmp_path: Path) -> None:
    wanted = read_acceptance("0.9,0.7")
    for name, content in {
        "a.json": json.dumps([0.9, 0.7]),
        "b.json": json.dumps({"acceptance": [0.9, 0.7]}),
        "c.txt": "0.9\n0.7\n",
    }.items():
        (tmp_path / name).write_text(content, "utf-8")
        assert read_acceptance(str(tmp_path / name)) == wanted
        assert read_acceptance(tmp_path / name) == wanted
    assert read_acceptance(wanted.to_text()) == wanted
    assert read_acceptance([0.9, 0.7]) == wanted


@pytest.mark.parametrize(
    ("given_text", "says"),
    [
        ("1.2", r"--acceptance = '1\.2': outside 0\.\.1"),
        ("-0.1", "outside"),
        ("nan", "not a number"),
        ("0.5,0.7", "rises"),
        ("0.5,x", "no such file"),
        ("", "no such file"),
        ([], "no number"),
        ([True], "not a number"),
    ],
)
def test_what_is_no_acceptance_is_refused(given_text: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_acceptance(given_text)  # type: ignore[arg-type]


def test_no_answer_beyond_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known for 2 positions"):
        tokens_per_step(3, read_acceptance("0.9,0.7"))
    with pytest.raises(InputError, match="draft length = -1"):
        tokens_per_step(-1, read_acceptance("0.9"))
    (tmp_path / "bad.json").write_text('{"acceptance": {"x": 1}}', "utf-8")
    with pytest.raises(InputError, match="not a number"):
        read_acceptance(tmp_path / "bad.json")
