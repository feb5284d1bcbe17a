"""What is published speaks of the product alone: no paths of anybody's machine, no package hosts, no loose ends."""

from __future__ import annotations

import ast
import re
import tokenize

import pytest

from house import ROOT, kept_files, modules

BINARY = {".safetensors", ".npz", ".png", ".parquet"}
# The patterns are put together from parts so that this file does not contain what it forbids.
HOSTS = re.compile(
    "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "ana" + r"conda\.org", "download\\." + "py" + "torch"))
)
FOLDERS = "|".join(("wo" + "rk", "ho" + "me", "ro" + "ot", "tm" + "p", "Us" + "ers"))
OWN_FOLDERS = re.compile(r"(?<![\w.~*}-])/(?:" + FOLDERS + r")(?:/|\b)")
LOOSE_ENDS = re.compile(
    r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b|@[A-Z]{4,}[0-9]?@"
)

SCALES = {float(scale) for scale in (10**3, 10**6, 10**9, 10**12, 1e-3, 1e-6, 1e-9, 2**30, 2**40)}


def text_files() -> list[str]:
    return [path.as_posix() for path in kept_files() if path.suffix not in BINARY]


@pytest.mark.parametrize("name", text_files())
def test_file_names_no_host_no_folder_of_a_machine_and_no_loose_end(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert HOSTS.findall(text) == []
    assert OWN_FOLDERS.findall(text) == []
    if not name.endswith(".tsv"):  # lists of other people's file names
        assert LOOSE_ENDS.findall(text) == []


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (OWN_FOLDERS, "see /" + "tmp/x", True),
        (OWN_FOLDERS, "in /" + "home", True),
        (OWN_FOLDERS, "https://example.net/" + "work/x and ../" + "work/", False),
        (OWN_FOLDERS, "a/" + "tmp.txt", False),
        (HOSTS, "https://" + "py" + "pi.org/simple", True),
        (LOOSE_ENDS, "# " + "TO" + "DO later", True),
        (LOOSE_ENDS, "@" + "FIGURES@", True),
        (LOOSE_ENDS, "todos are fine", False),
    ],
)
def test_the_patterns_see_what_they_should(pattern: re.Pattern[str], text: str, found: bool) -> None:
    assert bool(pattern.search(text)) is found


def literal(node: ast.AST) -> float | None:
    """Return the value of a number, or of two joined by `**` or `<<`; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        base, exponent = literal(node.left), literal(node.right)
        if base is not None and exponent is not None:
            return base**exponent if isinstance(node.op, ast.Pow) else base * 2**exponent
    return None


def scaled(tree: ast.AST) -> list[tuple[int, str]]:
    """Return (line, source) of every multiplication or division by a literal scale."""
    arithmetic = (ast.Mult, ast.Div, ast.FloorDiv)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, arithmetic)]
    return [(node.lineno, ast.unparse(node)) for node in nodes if {literal(node.left), literal(node.right)} & SCALES]


def test_scale_literals_are_seen() -> None:
    scaling = ("b * 1e9", "d / 10**6", "1000 * f", "h // 2**30", "x / (1 << 40)")
    other = ("j * 7", "l + 1e9", "n * m", "n % 1000")
    assert [bool(scaled(ast.parse(source))) for source in scaling] == [True] * len(scaling)
    assert [bool(scaled(ast.parse(source))) for source in other] == [False] * len(other)


def test_scales_come_from_units_only() -> None:
    trees = {path: tree for path, tree in modules().items() if path.name != "units.py"}
    found = [f"{path}:{line}: {source}" for path, tree in trees.items() for line, source in scaled(tree)]
    assert found == []


def test_no_blanket_ignores() -> None:
    blanket = re.compile(r"#\s*(?:noqa(?!:)|type:\s*ignore(?!\[))")
    found = []
    for path in modules():
        with (ROOT / path).open("rb") as source:
            found += [f"{path}:{token.start[0]}" for token in tokenize.tokenize(source.readline)
                      if token.type == tokenize.COMMENT and blanket.match(token.string)]  # fmt: skip
    assert found == []
