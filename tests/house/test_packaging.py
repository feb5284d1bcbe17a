"""The root is the package: what pyproject.toml lists is what is on disk, and what is on disk gets installed."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import sys
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moeplan
from house import ROOT, imported, modules, package_files, project

INSTALLED = Path(str(moeplan.__file__)).parent
# torch's CUDA builds pin the triton they go with.
UNPINNED = {"triton"}
LONGEST_MODULE_LINES = 500
LONGEST_FUNCTION_LINES = 150
MOST_POSITIONAL = 8
# Functions with more: compiled ones that have yet to be given records, and what is called by address, one number at a time.
WIDER = {
    "sim/policies/rule_code.py: expert_shell",
    "sim/policies/rule_code.py: guess_shell",
    "sim/policies/rule_code.py: merit_body",
    "sim/policies/rule_code.py: miss_body",
    "sim/policies/rule_code.py: miss_shell",
    "sim/policies/rule_code.py: prefetch_body",
    "sim/policies/rule_code.py: victim_body",
    "planner/placement/annealing.py: anneal",
    "planner/placement/replica_choice.py: _cap",
    "planner/placement/replica_choice.py: _draw",
    "planner/placement/traffic.py: _count",
    "specs/models/config/mixers.py: _latent",
    "traces/synthesis/kernel.py: fill_choices",
    "traces/synthesis/kernel.py: fill_guesses",
}


def listed_packages() -> list[str]:
    return list(project()["tool"]["setuptools"]["packages"])


def folder_of(package: str) -> PurePosixPath:
    return PurePosixPath(*package.split(".")[1:])


def data_patterns() -> list[str]:
    """Return the glob patterns of packaged data, relative to the root."""
    listed = project()["tool"]["setuptools"]["package-data"]
    return [str(folder_of(package) / pattern) for package, patterns in listed.items() for pattern in patterns]


def matches(path: Path, pattern: str) -> bool:
    # `**/` stands for any number of folders, none included; fnmatch's `*` crosses folders, so both forms are tried.
    return any(fnmatch.fnmatch(path.as_posix(), form) for form in (pattern, pattern.replace("**/", "")))


def test_listed_packages_are_the_folders_with_an_init() -> None:
    on_disk = {".".join(("moeplan", *path.parent.parts)) for path in package_files() if path.name == "__init__.py"}
    assert listed_packages() == sorted(on_disk)


def test_every_module_is_in_a_listed_package() -> None:
    folders = {folder_of(package) for package in listed_packages()}
    assert [str(path) for path in modules() if PurePosixPath(path.parent) not in folders] == []


def test_every_data_file_is_packaged_and_every_pattern_finds_one() -> None:
    data = [path for path in package_files() if path.suffix != ".py"]
    assert [str(path) for path in data if not any(matches(path, pattern) for pattern in data_patterns())] == []
    assert [pattern for pattern in data_patterns() if not any(matches(path, pattern) for path in data)] == []


def test_installation_has_every_file_of_the_package_and_nothing_beside_it() -> None:
    missing = [str(path) for path in package_files() if not (INSTALLED / path).is_file()]
    assert missing == []
    if INSTALLED.resolve() != ROOT:  # an editable installation is the checkout itself
        assert not any((INSTALLED / name).exists() for name in ("tests", "examples", "benchmarks", "docs", "Makefile"))


@pytest.mark.parametrize("package", listed_packages())
def test_packages_open_with_a_sentence(package: str) -> None:
    assert (importlib.import_module(package).__doc__ or "").strip().endswith((".", "…"))


def test_modules_open_with_what_they_model_and_ignore() -> None:
    opening = {path: ast.get_docstring(tree) or "" for path, tree in modules().items()}
    assert [str(path) for path, text in opening.items() if not text] == []
    # `__init__` files are one sentence; every other module says what it leaves out.
    assert [str(path) for path, text in opening.items() if path.name != "__init__.py" and "gnored" not in text] == []


def test_modules_keep_to_a_length_one_can_read() -> None:
    lengths = {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    too_long = {name for name, lines in lengths.items() if lines > LONGEST_MODULE_LINES}
    assert too_long == set()


def test_functions_can_be_taken_in_at_once() -> None:
    """Kernels are apart: their launches are what the hardware asks for."""
    long, wide = [], []
    for path, tree in modules().items():
        if path.parts[0] == "kernels":
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                where = f"{path.as_posix()}: {node.name}"
                if (node.end_lineno or 0) - node.body[
                    0
                ].lineno + 1 > LONGEST_FUNCTION_LINES:  # options are no statements
                    long.append(where)
                named = [
                    each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")
                ]
                if len(named) > MOST_POSITIONAL and path.parts[0] != "commands":  # options are always named
                    wide.append(where)
    assert (long, set(wide)) == ([], WIDER)


def test_no_module_is_called_after_nothing() -> None:
    names = {path.stem for path in modules()} | {path.parent.name for path in modules()}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals and "+" not in version, line
            pins[canonicalize_name(name)] = version
    tables = project()["project"]
    wanted = [Requirement(text) for text in (*tables["dependencies"], *project()["build-system"]["requires"])]
    wanted += [Requirement(text) for texts in tables["optional-dependencies"].values() for text in texts]
    outside = [
        str(need)
        for need in wanted
        if need.name not in UNPINNED
        and not need.specifier.contains(pins.get(canonicalize_name(need.name), "none"), prereleases=True)
    ]
    assert outside == []


# Modules whose distribution has another name.
DISTRIBUTION = {"yaml": "PyYAML"}


def test_everything_imported_is_a_declared_requirement() -> None:
    tables = project()["project"]
    texts = [
        *tables["dependencies"],
        *(text for extra in ("run", "hf") for text in tables["optional-dependencies"][extra]),
    ]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    foreign = {name for tree in modules().values() for _, name in imported(tree)} - sys.stdlib_module_names
    assert {name for name in foreign if canonicalize_name(DISTRIBUTION.get(name, name)) not in declared} == set()


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == moeplan.__version__


def test_public_names_exist() -> None:
    assert [name for name in moeplan.__all__ if not hasattr(moeplan, name)] == []
