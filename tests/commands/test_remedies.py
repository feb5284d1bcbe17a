"""A remedy never names an option that does not exist: every remedy in the sources is read, and its options looked up."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from typing import Any

import typer

from house import modules
from moeplan.commands.app import app
from moeplan.planner.emit import engines
from moeplan.planner.emit.table import EngineTable

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_OTHER_COMMAND = re.compile(r"moeplan ([a-z]+(?: [a-z]+)?)((?: --[a-z-]+)+)")
_ERRORS = ("InputError", "MissingCalibration", "unreadable")


def options_by_command(group: Any = None, name: str = "") -> dict[str, set[str]]:
    """Return the options of every command."""
    group = typer.main.get_command(app) if group is None else group
    if not hasattr(group, "commands"):
        return {name: {one for parameter in group.params for one in parameter.opts}}
    found: dict[str, set[str]] = {}
    for word, inner in group.commands.items():
        found |= options_by_command(inner, f"{name} {word}".strip())
    return found


def engine_flags() -> set[str]:
    """Return the flags of all engines' tables: what modules that write or read an engine's files may name too."""
    found: set[str] = set()
    for one in pkgutil.iter_modules(engines.__path__):
        module = importlib.import_module(f"{engines.__name__}.{one.name}")
        for table in vars(module).values():
            if isinstance(table, EngineTable):
                found |= set(table.flags)
    return found


def remedies() -> list[tuple[str, str, str]]:
    """Return (module, line, text) of every remedy; what is put into one at run time stands as …."""
    found = []
    for path, tree in modules().items():
        for call in ast.walk(tree):
            if not (
                isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _ERRORS and call.args
            ):
                continue
            texts = [
                node.value
                for node in ast.walk(call.args[-1])
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            found.append((str(path), str(call.lineno), " ".join(texts)))
    return found


def test_remedies_name_options_that_exist() -> None:
    options = options_by_command()
    own = {}  # options of the commands of each module of `commands/`
    for module in {path for path, _, _ in remedies() if path.startswith("commands/")}:
        words = {"measure": ("calibrate", "validate"), "trace_synth": ("trace synth",)}.get(
            module[len("commands/") : -len(".py")]
        )
        stem = module[len("commands/") : -len(".py")]
        names = words or [name for name in options if name.split()[0] == stem]
        own[module] = set().union(*(options[name] for name in names)) if names else set().union(*options.values())
    of_engines, wrong, seen = engine_flags(), [], 0
    for path, line, text in remedies():
        for command, named in _OTHER_COMMAND.findall(text):
            known = options.get(command) or options.get(command.split()[0], set())
            wrong += [f"{path}:{line}: {one} of {command}" for one in _OPTION.findall(named) if one not in known]
        for one in _OPTION.findall(_OTHER_COMMAND.sub("", text)):
            seen += 1
            of_an_engine = path.startswith(("planner/emit/", "traces/readers/")) and one in of_engines
            if one not in own.get(path, set().union(*options.values())) and not of_an_engine:
                wrong.append(f"{path}:{line}: {one}")
    assert wrong == []
    assert seen >= 10
