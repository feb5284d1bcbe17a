"""Rules of the tests themselves: properties obey MOEPLAN_LONG, and no test asserts how long something takes."""

from __future__ import annotations

import ast

from house import ROOT

TESTS = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "tests").rglob("*.py"))}


def test_properties_draw_more_examples_when_asked() -> None:
    fixed = [
        f"{path.name}:{word.value.lineno}"
        for path, tree in TESTS.items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if (word.arg == "max_examples" and isinstance(word.value, ast.Constant))
        or (word.arg == "derandomize" and path.name != "conftest.py" and isinstance(word.value, ast.Constant))
    ]
    assert fixed == []


def test_no_test_asserts_wall_clock_time() -> None:
    clocks = ("monotonic", "perf_counter", "time")
    timed = [
        f"{path.name}:{check.lineno}"
        for path, tree in TESTS.items()
        for check in ast.walk(tree)
        if isinstance(check, ast.Assert)
        for call in ast.walk(check)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr) in {("time", clock) for clock in clocks}
    ]
    assert timed == []
