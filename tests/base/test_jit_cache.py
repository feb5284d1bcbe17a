"""Machine code is never older than its sources: an edited policy reaches the compiled code that calls it from another file."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from house import ROOT, modules
from moeplan.base import jit

if not jit.compiled():
    pytest.skip("numba is absent or switched off, so nothing is compiled", allow_module_level=True)

POLICY = Path("sim/policies/prefetching.py")
# A caller that is itself never edited, as the simulator is when someone edits a policy.
CALLER = """
from ..base.jit import jit
from .policies.prefetching import hash32

@jit
def call(a: int) -> int:
    return hash32(a, 1, 2, 3)
"""
REPORT = """
import moeplan, json
from moeplan.sim import caller
from moeplan.sim.policies.prefetching import hash32
answer = caller.call(7)
print(json.dumps([moeplan.__file__, answer, hash32.py_func(7, 1, 2, 3), sum(caller.call.stats.cache_hits.values())]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the sources that the policies need, with a caller beside the simulator."""
    package = tmp_path / "moeplan"
    for path in modules():
        needed = path.parts[0] == "base" or path.parts[:2] in (("specs", "schedules"), ("sim", "policies"))
        if needed or path.parent == Path() or path.name == "__init__.py":
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, package / path)
    (package / "sim" / "caller.py").write_text(CALLER, encoding="utf-8")
    return tmp_path


def run(tree: Path) -> tuple[int, int, int]:
    """Return (compiled answer, the source's own answer, functions loaded from the cache) of a fresh process."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "MOEPLAN_CACHE_DIR": str(tree / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    where, compiled, plain, hits = ast.literal_eval(done.stdout)
    assert Path(where).is_relative_to(tree)
    return compiled, plain, hits


def test_an_edited_policy_never_leaves_a_stale_caller(tree: Path) -> None:
    first, plain, hits = run(tree)
    assert (first, hits) == (plain, 0)
    again, _, hits = run(tree)
    assert (again, hits) == (first, 1)  # the same sources: machine code comes from the cache
    policy = tree / "moeplan" / POLICY
    source = policy.read_text(encoding="utf-8")
    before = os.stat(policy)
    edited = source.replace("x = 0x9E3779B9", "x = 0x9E3779B8")
    assert edited != source
    policy.write_text(edited, encoding="utf-8")
    os.utime(policy, ns=(before.st_atime_ns, before.st_mtime_ns))  # not even its date gives the edit away
    changed, plain, hits = run(tree)
    assert changed == plain != first
    assert hits == 0


def compiled_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Return the functions marked `@jit` or one of its companions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        node
        for node in functions
        if any(
            isinstance(mark, ast.Name) and mark.id in ("jit", "jit_lean", "jit_inner", "jit_inline")
            for mark in node.decorator_list
        )
    ]


def test_every_import_of_a_compiled_module_is_found() -> None:
    """A constant of another file is frozen into machine code; were that file not in the digest, an edit would go unseen."""
    compiled = {path: tree for path, tree in modules().items() if compiled_functions(tree)}
    assert len(compiled) >= 5
    missing = []
    for path, tree in compiled.items():
        seen = jit.imported_sources(ROOT / path)
        origin = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                room = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                for alias in node.names:
                    inside = room / f"{alias.name}.py"
                    origin[alias.asname or alias.name] = (
                        inside if (ROOT / inside).is_file() else room.with_suffix(".py")
                    )
        for function in compiled_functions(tree):
            body = [node for statement in function.body for node in ast.walk(statement)]
            used = {node.id for node in body if isinstance(node, ast.Name)} & set(origin)
            missing += [f"{path}: {function.name} uses {name}" for name in used if ROOT / origin[name] not in seen]
    assert missing == []


def test_what_is_imported_is_followed_to_the_end() -> None:
    names = {str(path.relative_to(ROOT)) for path in jit.imported_sources(ROOT / "sim/offload/compiled/overlapped.py")}
    policies = {
        f"sim/policies/{name}.py"
        for name in ("offload", "moves", "caching", "prefetching", "misses", "state", "host_tier")
    }
    assert names >= policies | {"base/jit.py", "sim/offload/compiled/overlapped.py", "sim/offload/costs.py", "sim/timeline.py",
        "specs/schedules/offload.py",
    }  # fmt: skip
    assert "planner/offload/space.py" not in names  # an edit elsewhere does not throw machine code away


def test_digest_changes_with_what_is_imported_and_nothing_else(tree: Path) -> None:
    def digest() -> str:
        code = "from moeplan.base import jit; print(jit.source_digest(jit._PACKAGE / 'sim' / 'caller.py'))"
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout

    before = digest()
    (tree / "moeplan" / "sim" / "unrelated.txt").write_text("no source", encoding="utf-8")
    assert digest() == before
    (tree / "moeplan" / "sim" / "new.py").write_text("", encoding="utf-8")
    assert digest() == before
    imported = tree / "moeplan" / "sim" / "policies" / "state.py"
    imported.write_text(imported.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert digest() != before


def test_lean_code_is_compiled_for_one_kind_of_number_and_inner_code_still_answers_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEPLAN_CACHE_DIR", str(tmp_path))

    @jit.jit_inner
    def inner(tens: int, ones: int) -> int:
        return 10 * tens + ones

    @jit.jit_lean
    def outer(small: np.ndarray) -> int:
        return inner(0, small[0]) + inner(small[0], -1) + inner(small[0] > 2, 5)

    assert outer(np.array([3], np.int16)) == 3 + 29 + 15
    assert [[str(kind) for kind in kinds] for kinds in inner.signatures] == [["int64", "int64"]]
    assert inner(1, 2) == 12


SEEN = """
import json, logging, sys
logging.basicConfig(stream=sys.stderr, format="%(message)s")
logging.getLogger("moeplan").setLevel(logging.INFO)
from moeplan.sim.policies.prefetching import hash32
print(json.dumps([hash32(7, 1, 2, 3), sum(hash32.stats.cache_hits.values())]))
"""


def start(tree: Path, cache: Path) -> subprocess.Popen[str]:
    """Return a process that calls one compiled function, with what the command line would log."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "MOEPLAN_CACHE_DIR": str(cache),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SEEN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def answers(process: subprocess.Popen[str]) -> tuple[int, int, str]:
    """Return (answer, functions loaded from the cache, log) of a finished process."""
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    answer, hits = ast.literal_eval(out)
    return answer, hits, log


def test_processes_that_compile_at_once_leave_code_for_the_next_and_say_so(tree: Path) -> None:
    both = [start(tree, tree / "cache") for _ in range(2)]
    (one, _, first), (other, _, second) = (answers(process) for process in both)
    # Where one of them has waited for a core until the other was done, it finds the code, and has nothing to say.
    said = [log for log in (first, second) if log]
    assert said and all(log.startswith("compiling the simulator, once (up to about ") for log in said)
    assert answers(start(tree, tree / "cache")) == (one, 1, "")
    assert one == other


def test_an_unwritable_folder_means_compiling_again_and_no_code_beside_the_sources(tree: Path) -> None:
    (tree / "file").write_text("not a folder", encoding="utf-8")
    for _ in range(2):
        _, hits, log = answers(start(tree, tree / "file" / "cache"))
        assert hits == 0
        assert log.startswith(
            f"compiling the simulator, as every command will while {tree / 'file' / 'cache'} cannot be written"
        )
    assert not list(tree.rglob("*.nb[ic]"))


def kept_files(cache: Path) -> list[Path]:
    """Return the files of machine code below `cache`."""
    return sorted(path for path in cache.rglob("*.nb[ic]"))


def test_damaged_machine_code_is_rebuilt_with_one_line(tree: Path) -> None:
    cache, rng = tree / "cache", np.random.default_rng(3)
    right = answers(start(tree, cache))[0]
    for suffix, damage in ((".nbi", "empty"), (".nbc", "cut"), (".nbi", "random"), (".nbc", "flipped")):
        for path in kept_files(cache):
            if path.suffix == suffix:
                raw = path.read_bytes()
                flipped = bytearray(raw)
                flipped[len(raw) * 2 // 3] ^= 0x10
                kinds = {
                    "empty": b"",
                    "cut": raw[: len(raw) // 2],
                    "random": rng.bytes(len(raw)),
                    "flipped": bytes(flipped),
                }
                path.write_bytes(kinds[damage])
        answer, hits, log = answers(start(tree, cache))
        assert (answer, hits) == (right, 0), damage
        assert log.count("\n") == 1 and "is damaged" in log, log
    assert answers(start(tree, cache)) == (right, 1, "")


def test_a_full_disk_means_compiling_again_and_one_line(tree: Path) -> None:
    (tree / "moeplan" / "sim" / "full.py").write_text(
        "import errno, io, tempfile\n"
        "from ..base import code_cache\n"
        "def full(self, path, value):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "code_cache._CheckedFiles._write = full\n",
        encoding="utf-8",
    )
    code = SEEN.replace("from moeplan.sim.policies", "import moeplan.sim.full\nfrom moeplan.sim.policies", 1)
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(tree), "MOEPLAN_CACHE_DIR": str(tree / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
    ).stderr  # fmt: skip
    assert [line.startswith("machine code cannot be kept in") for line in said.splitlines()] == [False, True]
    assert "no space left on device" in said
