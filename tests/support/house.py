"""The house as files: what the tests of its rules walk over. Everything is found from the checkout, never from the installation."""

from __future__ import annotations

import ast
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Folders of the root that are no rooms of the package.
BESIDE = frozenset({"tests", "examples", "benchmarks", "docs", "out", "build", "dist"})


@cache
def project() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def package_files() -> tuple[Path, ...]:
    """Return every file below the rooms of the package and the root's modules, relative to the root."""
    files = [path for path in ROOT.iterdir() if path.suffix == ".py" or path.name == "py.typed"]
    for room in ROOT.iterdir():
        if room.is_dir() and room.name not in BESIDE and not room.name.startswith(".") and room.suffix != ".egg-info":
            files += [path for path in room.rglob("*") if path.is_file()]
    inside = (path.relative_to(ROOT) for path in files)
    return tuple(
        sorted(path for path in inside if not any(part.startswith((".", "__pycache__")) for part in path.parts))
    )


@cache
def modules() -> dict[Path, ast.Module]:
    """Return the package's modules, parsed, by path relative to the root."""
    return {
        path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in package_files() if path.suffix == ".py"
    }


@cache
def kept_files() -> tuple[Path, ...]:
    """Return the files that are published, relative to the root: what git tracks or would, or all of an unpacked release."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        names = [Path(name) for name in listed.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    hidden = (".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__", "moeplan.egg-info")
    return tuple(sorted(n for n in names if not any(part in hidden for part in n.parts) and (ROOT / n).is_file()))


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Return (line, first part of the name) of every absolute import in `tree`, nested ones included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.partition(".")[0]))
    return found
