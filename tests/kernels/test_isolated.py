"""Runs the tests of Triton kernels in processes of their own.

Whether Triton compiles or interprets is settled when it is first imported; a variable set for these tests must not reach any
other. The files in `isolated_kernels/` are ordinary pytest files, named so that a plain run does not collect them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "isolated_kernels"
INTERPRETED = ("check_grouped_gemm.py", "check_dequant_gemm.py", "check_permute.py", "check_runners.py")
NEEDED = ("torch", "triton")
# A loop with a bound known only when it runs: what every kernel has, and what some pairs of triton and numpy cannot interpret.
PROBE = """
import torch, triton, triton.language as tl
@triton.jit
def count(out_ptr, n_ptr):
    n = tl.load(n_ptr)
    for i in range(0, n):
        tl.store(out_ptr + i, 1)
count[(1,)](torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs torch and triton (the extra `run`)"
)


def run(files: tuple[str, ...], interpret: bool) -> str:
    """Return what pytest prints about `files`; fails with all of it where anything failed, or nothing ran."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
        # A file, for Triton reads the kernel's source.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(FOLDER / name) for name in files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or re.search(r"\b[1-9]\d* passed", done.stdout) is None or "skipped" in done.stdout:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def test_kernels_in_the_interpreter(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    probed = subprocess.run(
        [sys.executable, "-W", "error", str(probe)], env=environment, capture_output=True, text=True, check=False
    )
    if probed.returncode:
        reason = probed.stderr.strip().splitlines()[-1]
        pytest.skip(f"this triton's interpreter does not run with this numpy: {reason}")
    run(INTERPRETED, interpret=True)


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="triton ships its assembler for Linux on x86-64"
)
def test_kernels_compile_for_gpus():
    run(("check_compiled.py",), interpret=False)


def test_every_file_is_run():
    assert sorted(path.name for path in FOLDER.glob("*.py")) == sorted((*INTERPRETED, "check_compiled.py"))


def test_the_package_and_the_room_import_without_torch():
    names = (
        "moeplan",
        *(f"moeplan.kernels{leaf}" for leaf in ("", ".tuning", ".slot_layout", ".roofline", ".activation")),
    )
    code = f"import sys, {', '.join(names)}; sys.exit(any(name in sys.modules for name in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_cpu_tensor_without_the_interpreter_is_refused_in_one_line():
    code = (
        "import torch\n"
        "from moeplan.base.errors import InputError\n"
        "from moeplan.kernels.permute import sort_by_expert\n"
        "try:\n"
        "    sort_by_expert(torch.zeros(2, 2, dtype=torch.int32), 2)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert (
        said.startswith("device = 'cpu': Triton kernels run on a GPU; use moeplan.kernels.cpu")
        and said.count("\n") == 1
    )
