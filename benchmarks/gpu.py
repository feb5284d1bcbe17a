"""Everything there is to measure on a GPU, in four stages; `make gpu OUT=folder [STAGE=n] [DRY=1]`.

    1  kernels      right first, then their speed beside cuBLAS and the measured roofline             kernels.json
    2  copies       samples and profile of the machine; copies and overlap of the executor             copies.json, profile.json
    3  validation   the executor against the simulator over a grid that took no part in the profile    validation.json
    4  speedups     the papers' schedules over their baselines, measured and predicted                 speedups.json

Each stage runs in a process of its own and ends within its budget; what is not done by then is done by the next run with the same
folder, and nothing is done twice. Stages 3 and 4 read the samples of stage 2. Needs torch, triton, numpy, scipy and numba alone, and no
network. --dry plans and runs every stage at tiny sizes on any machine (kernels in Triton's interpreter, the executor on the CPU) and
writes the same files; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan.errors import MoeplanError

STAGES = {1: "kernels", 2: "copies", 3: "validation", 4: "speedups"}
DEFAULT_BUDGET_S = 450.0
# A part that runs when the budget ends may finish within this; then its process is ended.
_GRACE_S = 25.0
_MOST_RESTARTS = 3
_LOST = 75
_SIGNALLED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns 0 when all of them are complete and right, 1 when something is missing or wrong, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results; an earlier run's is continued")
    parser.add_argument("--stage", type=int, choices=STAGES, help="one stage only")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--budget-s", type=float, default=DEFAULT_BUDGET_S, help="seconds for each stage")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = [given.stage] if given.stage else list(STAGES)
    try:
        if given.here:
            return run_stage(given.stage, given.out, dry=given.dry, budget_s=given.budget_s)
        return run_all(chosen, given.out, dry=given.dry, budget_s=given.budget_s)
    except MoeplanError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
        return _SIGNALLED


def run_all(chosen: Sequence[int], out: Path, *, dry: bool, budget_s: float) -> int:
    """Run each stage in a process of its own; return the worst of their exit statuses."""
    began, worst = time.monotonic(), 0
    for stage in chosen:
        print(f"--- stage {stage}: {STAGES[stage]}", file=sys.stderr, flush=True)
        status = run_apart(stage, out, dry=dry, budget_s=budget_s)
        if status == _SIGNALLED:
            return status
        worst = max(worst, status)
        print(summary(out, stage), flush=True)
    print(f"{time.monotonic() - began:.0f} s; results in {out}", flush=True)
    return worst


def run_apart(stage: int, out: Path, *, dry: bool, budget_s: float) -> int:
    """Return the exit status of a stage in a process of its own, started again when the device is lost, ended at its budget."""
    environment = dict(os.environ)
    if dry and STAGES[stage] == "kernels":
        environment["TRITON_INTERPRET"] = "1"  # settled when triton is imported
    else:
        environment.pop("TRITON_INTERPRET", None)
    deadline = time.monotonic() + budget_s
    status = _LOST
    for _ in range(_MOST_RESTARTS):
        left = deadline - time.monotonic()
        if status != _LOST or left <= 0:
            break
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--stage", str(stage), "--out", str(out)]
        command += ["--budget-s", f"{left:.1f}", *(["--dry"] if dry else [])]
        child = subprocess.Popen(command, env=environment)  # noqa: S603 - this very program
        try:
            status = child.wait(left + _GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            print(f"stage {stage} was ended at its budget; what it had finished is kept", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            child.wait()  # it got the signal too
            return _SIGNALLED
    return 1 if status == _LOST else status


def run_stage(stage: int, out: Path, *, dry: bool, budget_s: float) -> int:
    """Run one stage in this process; return 0 when it is complete and right, else 1."""
    # Imported here, one of them: each brings torch or triton, and its own idea of the environment.
    deadline_s = time.monotonic() + budget_s
    if STAGES[stage] == "kernels":
        from .kernels import run
    elif STAGES[stage] == "copies":
        from .gpu_copies import run
    elif STAGES[stage] == "validation":
        from .gpu_validation import run
    else:
        from .gpu_speedups import run
    return 0 if run(out, dry=dry, deadline_s=deadline_s) else 1


def summary(out: Path, stage: int) -> str:
    """Return a stage's targets, failures and what is still to do as lines of text."""
    path = out / f"{STAGES[stage]}.json"
    if not path.exists():
        return f"stage {stage}: nothing was written"
    document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"stage {stage}: {len(document['parts'])} parts done, {len(document['pending'])} to do"]
    for one in document.get("targets", []):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[one["met"]]
        got = "" if one["got"] is None else f", got {one['got']:.4g}"
        lines.append(
            f"  {verdict}: {one['name']}: {'at most' if one['at_most'] else 'at least'} {one['target']:g}{got}"
        )
    lines += [f"  FAILED {name}: {failure['error']}" for name, failure in document["failures"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
