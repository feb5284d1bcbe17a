"""How long one waits before the first answer: importing the package, `--help`, and compiling machine code after installation.

Each figure is a whole process's wall and processor time, repeated and in turn, so that a busy moment falls on all of them; compiling
starts from an empty cache (`NUMBA_CACHE_DIR`) and runs the bundled question once cold and once warm: the difference is what is compiled.
Byte code is written first, as an installation writes it. Targets on two cores: `import moeplan` 0.15 s, `--help` 0.4 s, machine
code 20 s. Prints a table; `--json FILE` keeps all samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_IMPORT = [sys.executable, "-c", "import moeplan"]
_HELP = [sys.executable, "-m", "moeplan", "--help"]
_MACHINE = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
_QUESTION = [sys.executable, "-m", "moeplan", "simulate", "--model", "qwen3-30b-a3b", "--hardware", _MACHINE, "--json"]
_REPEATS = 7


def timed(command: list[str], **environment: str) -> tuple[float, float]:
    """Return (wall, processor) seconds of a process and its children; raises CalledProcessError where it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(  # noqa: S603 - its own commands
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure() -> dict[str, list[tuple[float, float]]]:
    """Return every sample (wall, processor seconds) by what was run."""
    with tempfile.TemporaryDirectory() as byte_code, tempfile.TemporaryDirectory() as machine_code:
        own = {"PYTHONPYCACHEPREFIX": byte_code, "NUMBA_CACHE_DIR": machine_code, "PYTHONDONTWRITEBYTECODE": ""}
        timed(_HELP, **own)
        found: dict[str, list[tuple[float, float]]] = {
            "import moeplan": [],
            "--help": [],
            "first answer, cold": [],
            "warm": [],
        }
        for _ in range(_REPEATS):
            found["import moeplan"].append(timed(_IMPORT, **own))
            found["--help"].append(timed(_HELP, **own))
        found["first answer, cold"].append(timed(_QUESTION, **own))
        found["warm"] = [timed(_QUESTION, **own) for _ in range(3)]
    return found


def main() -> None:
    """Measure, print, and keep the samples where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where all samples go")
    arguments = parser.parse_args()
    samples = measure()
    print(f"{'':24}{'wall s':>10}{'processor s':>14}{'n':>4}   fastest to slowest wall")
    for name, pairs in samples.items():
        wall, work = (sorted(values) for values in zip(*pairs, strict=True))
        print(
            f"{name:24}{statistics.median(wall):10.2f}{statistics.median(work):14.2f}{len(pairs):4}   {wall[0]:.2f} to {wall[-1]:.2f}"
        )
    cold, warm = samples["first answer, cold"][0], samples["warm"]
    print(f"{'machine code':24}{cold[0] - statistics.median(w for w, _ in warm):10.2f}"
          f"{cold[1] - statistics.median(p for _, p in warm):14.2f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": platform.processor(), "cores": os.cpu_count(), "samples": samples}, indent=1)
        )


if __name__ == "__main__":
    main()
