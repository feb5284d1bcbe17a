"""Scales, the error family and the compiler's door: what every other room leans on."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base import errors, jit, units
from moeplan.base.errors import DoesNotFit, InputError, Internal, MissingCalibration, MoeplanError, UnknownName

# --- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("1024B", 1024), (1024, 1024), ("6GiB", 6 * 2**30), ("6 GB", 6 * 10**9), ("1.5kib", 1536),
        (" 2 MiB ", 2**21), (".5 KB", 500), ("3TB", 3 * 10**12), ("1 tib", 2**40), ("7b", 7), ("1.KB", 1000),
    ],
)  # fmt: skip
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert units.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "nan", "inf", "6 GiB extra", "1,5GB", "0x10", "٣", "--"])
def test_parse_bytes_refuses_what_is_no_quantity(text: str) -> None:
    with pytest.raises(InputError, match="not a non-negative number") as caught:
        units.parse_bytes(text, "--memory")
    assert caught.value.field == "--memory"


def test_parse_bytes_names_an_unknown_suffix() -> None:
    with pytest.raises(InputError, match=r"unknown suffix 'Gb1'|unknown suffix 'gbit'"):
        units.parse_bytes("5gbit")


@pytest.mark.parametrize("text", ["2000000 TiB", "9" * 400 + "B"])
def test_parse_bytes_refuses_absurd_amounts(text: str) -> None:
    with pytest.raises(InputError, match="more than 2"):
        units.parse_bytes(text)


def test_parse_bytes_asks_for_a_unit() -> None:
    with pytest.raises(InputError, match=r"24.*has no unit; write 24GiB or 24MiB, or 24B for bytes"):
        units.parse_bytes("24", "--memory")
    assert units.parse_bytes("24", bare=True) == units.parse_bytes(24) == 24


@given(st.integers(0, 2**60), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB"]))
def test_parse_bytes_of_whole_scales_is_exact(amount: int, suffix: str) -> None:
    scale = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[suffix]
    amount = min(amount // scale, 2**50)  # floats hold these exactly
    assert units.parse_bytes(f"{amount}{suffix}", bare=True) == amount * scale


@given(st.text(max_size=30))
def test_parse_bytes_raises_nothing_else(text: str) -> None:
    try:
        assert 0 <= units.parse_bytes(text) <= 2**60
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (6_442_450_944, "6.00 GiB"), (3 * 2**40, "3.00 TiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)  # fmt: skip
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert units.format_bytes(num_bytes) == text


@given(st.floats(0, 1e6))
def test_nanoseconds_round_up_by_less_than_one(seconds: float) -> None:
    ns = units.seconds_to_ns(seconds)
    assert ns - 1 < seconds * 1e9 <= ns


def test_nanoseconds_of_the_smallest_duration() -> None:
    assert units.seconds_to_ns(0.0) == 0
    assert units.seconds_to_ns(5e-324) == 1
    assert units.seconds_to_ns(1e-9) == 1


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf, -math.inf])
def test_nanoseconds_refuse_what_is_no_duration(seconds: float) -> None:
    with pytest.raises(InputError, match="finite and not negative"):
        units.seconds_to_ns(seconds)


# --- errors ------------------------------------------------------------------------------------------------------------


def test_exit_statuses() -> None:
    made: list[tuple[MoeplanError, int]] = [
        (MoeplanError("x"), 1), (InputError("f", 1, "r", "do"), 2), (UnknownName("f", "x", ["a"]), 2),
        (MissingCalibration("f", None, "r", "do"), 2), (DoesNotFit("plan", 7), 3), (Internal("broken"), 70),
    ]  # fmt: skip
    assert [(error, error.exit_status) for error, _ in made] == made


def test_input_error_says_field_value_rule_remedy() -> None:
    error = InputError("cache.bytes", -3, "below zero", "give a size")
    assert str(error) == "cache.bytes = -3: below zero; give a size"
    assert (error.field, error.value, error.rule, error.remedy) == ("cache.bytes", -3, "below zero", "give a size")


@given(st.text(), st.text(max_size=300))
def test_input_error_is_one_line_whatever_the_value(field: str, value: str) -> None:
    text = str(InputError(field, value, "bad", "mend it"))
    assert len(text.splitlines()) == 1
    assert len(text) < len(field) + errors._VALUE_CHARS + 30


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        raise UnknownName("model", "mixtral-8x7", ["gpt-oss-20b", "mixtral-8x7b"])
    assert str(caught.value) == (
        "model = 'mixtral-8x7': not one of: gpt-oss-20b, mixtral-8x7b; did you mean 'mixtral-8x7b'?"
    )


def test_unknown_name_without_a_near_one() -> None:
    assert str(UnknownName("m", "zzz", ["alpha", "beta"])) == "m = 'zzz': not one of: alpha, beta; use one of these"


def test_unknown_name_shortens_long_lists() -> None:
    text = str(UnknownName("m", "x", [f"name{index:03}" for index in range(100)]))
    assert "name039, … (100 names)" in text and "name040" not in text
    near = str(UnknownName("m", "NAME05", [f"name{index:03}" for index in range(100)]))
    assert "name05" in near and "name000" not in near and near.count("name0") < 12


def test_does_not_fit_carries_the_missing_bytes() -> None:
    error = DoesNotFit("model on\n8 GiB", np.int64(12))  # type: ignore[arg-type]
    assert error.missing_bytes == 12 and type(error.missing_bytes) is int
    assert str(error) == "does not fit: model on 8 GiB; 12 bytes are missing"


# --- jit ---------------------------------------------------------------------------------------------------------------


def _sum_of_squares(values: np.ndarray) -> int:
    total = 0
    for value in values:
        total += value * value
    return total


@pytest.mark.skipif(not jit.compiled(), reason="numba is absent or switched off")
@given(st.lists(st.integers(-1000, 1000), max_size=20))
def test_compiled_and_plain_agree(values: list[int]) -> None:
    array = np.array(values, np.int64)
    assert _COMPILED(array) == _sum_of_squares(array)


_COMPILED = jit.jit(_sum_of_squares)


def test_without_numba_the_function_itself_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "numba", None)
    assert jit.jit(_sum_of_squares) is _sum_of_squares
    assert not jit.compiled()


def test_switched_off_counts_as_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not jit.compiled()


@pytest.mark.skipif(not jit.compiled(), reason="numba is absent or switched off")
def test_the_cache_setting_of_others_is_put_back() -> None:
    from numba.core import config

    before = config.CACHE_DIR
    jit.jit(lambda value: value + 1)
    assert before == config.CACHE_DIR


def test_the_cache_folder_follows_environment_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = Path(jit.__file__)
    monkeypatch.setenv("MOEPLAN_CACHE_DIR", str(tmp_path))
    assert jit.cache_folder(path) == tmp_path / f"compiled-{jit.source_digest(path)}"
    monkeypatch.delenv("MOEPLAN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_folder(path).parent == tmp_path / "xdg" / "moeplan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert jit.cache_folder(path).parent == tmp_path / "home" / ".cache" / "moeplan"


def test_the_digest_is_short_and_stable() -> None:
    path = Path(jit.__file__)
    digest = jit.source_digest(path)
    assert len(digest) == 20 and int(digest, 16) >= 0
    assert digest == jit.source_digest.__wrapped__(path)


def test_errors_survive_another_process() -> None:
    """Sweeps send errors back from workers; what does not survive pickling would hang them."""
    for error in (InputError("f", 1, "r", "do"), DoesNotFit("plan", 7), UnknownName("m", "x", ["a"]), Internal("b")):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error) and str(back) == str(error)
