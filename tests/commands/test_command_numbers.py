"""Every number on the command line has bounds: what is no number, infinite, negative or absurd is one line, before anything else."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from moeplan.cli import main
from moeplan.commands.app import app

# Options for which nought means something.
NOUGHT = {
    "--baselines",
    "--cached-tokens",
    "--distance",
    "--hidden",
    "--new-tokens",
    "--prompt-tokens",
    "--redundant",
    "--reply-tokens",
    "--search-moves",
    "--seed",
}
WRONG = ["nan", "inf", "-1", "1" * 5000, "1e300", "1\x1b[31m"]


def numbers(group: Any = None, name: str = "") -> Iterator[Any]:
    """Yield (command, option) of every option that takes a number."""
    group = group or typer.main.get_command(app)
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from numbers(command, f"{name}{key} ")
        else:
            hints = typing.get_type_hints(inspect.unwrap(command.callback))
            for option in command.params:
                if {int, float} & {hints[option.name], *typing.get_args(hints[option.name])}:
                    first = next(each for each in option.opts if each.startswith("--"))
                    yield pytest.param(f"{name}{key}", first, id=f"{name}{key} {option.name}")


FOUND = list(numbers())


def test_the_walk_finds_what_is_known_to_be_there():
    found = {(one.values[0], one.values[1]) for one in FOUND}
    assert {("plan", "--floor"), ("plan", "--nodes"), ("simulate", "--window"), ("calibrate", "--seconds"), ("validate", "--repeats"),
            ("trace synth", "--seed")} <= found  # fmt: skip


@pytest.mark.parametrize(("command", "option"), FOUND)
def test_numbers_that_are_none_are_refused(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for value in [*WRONG, *([] if option in NOUGHT else ["0"])]:
        monkeypatch.setattr(sys, "argv", ["moeplan", *command.split(), f"{option}={value}"])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert (stop.value.code, shown.out, shown.err.count("\n")) == (2, "", 1), (value, shown.err)
        # The number is what is complained of, not what else is missing; and at no great length.
        assert option in shown.err and "Missing" not in shown.err and len(shown.err) < 400, shown.err
