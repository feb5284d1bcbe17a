"""Everything there is to measure on a GPU, in five stages; `make gpu OUT=folder [STAGE=n] [DRY=1]`.

    1  kernels      right first, then their speed beside cuBLAS and the measured roofline             kernels.json
    2  copies       samples and profile of the machine; copies and overlap of the executor             copies.json, profile.json
    3  validation   the executor against the simulator over a grid that took no part in the profile    validation.json
    4  speedups     the papers' schedules over their baselines, measured and predicted                 speedups.json
    5  overlap      experts in one launch, in several, on fewer multiprocessors, and beside copies     overlap.json

Each stage runs in a process of its own and ends within its budget, with figures of what it has and the names of what it left out; that
is done by the next run with the same folder, and nothing is done twice. Stages 3 and 4 read the samples of stage 2; once there are any,
stage 1 searches no further launch configurations, since kernels are to run as they were measured. Needs torch, triton, numpy, scipy and
numba alone, and no network. --dry plans and runs every stage at tiny sizes on any machine (kernels in Triton's interpreter, the executor
on the CPU) and writes the same files; its times mean nothing.
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

from moeplan.base.errors import MoeplanError

from .machine import lines

STAGES = {1: "kernels", 2: "copies", 3: "validation", 4: "speedups", 5: "overlap"}
# With the two below it is under eight minutes.
DEFAULT_BUDGET_S = 430.0
# A part that runs when the budget ends may finish within this; then its process is ended, and another one has so long for the figures.
_GRACE_S = 20.0
_CLOSING_S = 25.0
_MOST_RESTARTS = 3
_LOST = 75
_SIGNALLED = 130
_ENDED = -1
_MOST_LINES = 8


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
    print("\n".join(lines()), flush=True)
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
    if dry and STAGES[stage] in ("kernels", "overlap"):
        environment["TRITON_INTERPRET"] = "1"  # settled when triton is imported
    else:
        environment.pop("TRITON_INTERPRET", None)
    deadline = time.monotonic() + budget_s
    status = _LOST
    for _ in range(_MOST_RESTARTS):
        left = deadline - time.monotonic()
        if status != _LOST or left <= 0:
            break
        status = _child(stage, out, environment, dry=dry, budget_s=left, patience_s=_GRACE_S)
        if status == _ENDED:
            print(f"stage {stage} was ended at its budget; what it had finished is kept", file=sys.stderr)
            _child(stage, out, environment, dry=dry, budget_s=0.0, patience_s=_CLOSING_S)
    return 1 if status in (_LOST, _ENDED) else status


def _child(
    stage: int, out: Path, environment: Mapping[str, str], *, dry: bool, budget_s: float, patience_s: float
) -> int:
    """Return the exit status of one process of a stage, _ENDED where it outlasted budget and patience."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--stage", str(stage), "--out", str(out)]
    command += ["--budget-s", f"{budget_s:.1f}", *(["--dry"] if dry else [])]
    child = subprocess.Popen(command, env=environment)  # noqa: S603 - this very program
    try:
        return child.wait(budget_s + patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return _ENDED
    except KeyboardInterrupt:
        child.wait()  # it got the signal too
        return _SIGNALLED


def run_stage(stage: int, out: Path, *, dry: bool, budget_s: float) -> int:
    """Run one stage in this process; return 0 when it is complete and right, else 1."""
    # Imported here, one of them: each brings torch or triton, and its own idea of the environment.
    deadline_s = time.monotonic() + budget_s
    if STAGES[stage] == "kernels":
        from ..kernels import run as run_kernels
        from .opening import bring_configurations

        if not dry:
            bring_configurations(out)
        return 0 if run_kernels(out, dry=dry, deadline_s=deadline_s, search=not calibrated(out)) else 1
    if STAGES[stage] == "copies":
        from .copies import run
    elif STAGES[stage] == "validation":
        from .validation import run
    elif STAGES[stage] == "overlap":
        from .overlap import run
    else:
        from .speedups import run
    return 0 if run(out, dry=dry, deadline_s=deadline_s) else 1


def calibrated(out: Path) -> bool:
    """Return whether stage 2 has measured kernels, as they are launched now."""
    path = out / f"{STAGES[2]}.json"
    return path.exists() and any(
        "samples" in part for part in json.loads(path.read_text(encoding="utf-8"))["parts"].values()
    )


def summary(out: Path, stage: int) -> str:
    """Return a stage's targets, the figures of its groups, its failures and what is still to do as lines of text."""
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
    lines += [f"  {name}: {_group(group)}" for name, group in document.get("groups", {}).items()]
    lines += _few([f"  WARNING {said}" for said in document.get("warnings", []) if not document["dry"]])
    lines += [f"  FAILED {name}: {failure['error']}" for name, failure in document["failures"].items()]
    left = document["left_out"].items()
    lines += _few(
        [f"  left out: {name}" + ("" if seconds is None else f" (about {seconds:.0f} s)") for name, seconds in left]
    )
    return "\n".join(lines)


def _few(lines: Sequence[str]) -> list[str]:
    """Return lines as they are, or the first of them and how many there are."""
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"  … and {more} more of these"] if more > 0 else [])]


def _group(group: Mapping[str, Any]) -> str:
    """One group of a validation as a line."""
    done, figures = f"{len(group['parts'])} of {len(group['parts']) + len(group['pending'])} parts", group["figures"]
    if not figures:
        return done
    return (
        f"{done}, {figures['num_configurations']} configurations, error median {figures['median_relative_error']:.1%}, "
        f"p90 {figures['p90_relative_error']:.1%}, worst {figures['worst_relative_error']:.1%}, noise {figures['noise_floor'] or 0:.1%}, "
        f"intervals hold {figures['coverage']:.0%}, counts {'equal' if figures['counts_equal'] else 'DIFFER'}"
    )


if __name__ == "__main__":
    sys.exit(main())
