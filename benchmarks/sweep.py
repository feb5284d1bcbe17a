"""How much a study costs beside its runs: `python -m benchmarks.sweep`.

Printed: what each run costs over the simulation itself (one process, the same questions asked of `simulate` with nouns that are loaded; in
turns, the median of several rounds); how long a study of 100,000 runs that are all there takes to see so, from the command to its
end; how well two processes share a study, against one (t1 / 2 t2). Modelled: small runs on the bundled recording, so that overhead shows.
Ignored: clusters and database servers, whose networks decide.

    python -m benchmarks.sweep [--runs 300] [--rounds 3] [--resume-runs 100000] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moeplan
from moeplan.api.load import Recording
from moeplan.base.units import MS_PER_S
from moeplan.studies.keys import Keys
from moeplan.studies.store import Store
from moeplan.studies.study import open_study
from moeplan.studies.work import DONE, Answer

BASE = {"model": "tiny-moe", "hardware": "t4", "trace": "bundled"}
SHORT, LONG = 8, 300
"""Passes of a run: where overhead shows, and where sharing does."""


def study(runs: int, window: int) -> dict[str, Any]:
    """Return a study of so many runs, all different."""
    side = math.ceil(math.sqrt(runs / 4))
    links = [f"{12 + at / 100:.2f}GB/s" for at in range(math.ceil(runs / 4 / side))]
    grid = {
        "memory": [f"{450 * 1024 + at}KiB" for at in range(side)], "machine.host_to_device.pinned_bytes_per_s": links,
        "cache.experts_per_layer": [1, 2, 3, 4],
    }  # fmt: skip
    return {"study": "bench", "base": BASE | {"window": window}, "grid": grid}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume-runs", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            **overhead(Path(folder), given.runs, given.rounds),
            **resume(Path(folder), given.resume_runs),
            **sharing(Path(folder), given.runs, given.rounds),
        }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"a run costs           {found['overhead_ms']:.2f} ms over its simulation, {found['overhead_cpu_ms']:.2f} ms of processor time "
          f"beside {found['simulate_cpu_ms']:.2f}   ({found['runs']} runs, rounds: {_list(found['overheads_cpu_ms'])})")  # fmt: skip
    print(f"{found['resume_runs']:,} runs resume   in {found['resume_s']:.2f} s ({found['resume_cpu_s']:.2f} s of processor time), "
          f"{found['resume_command_s']:.2f} s ({found['resume_command_cpu_s']:.2f}) with the command's start")  # fmt: skip
    print(f"two processes         {found['efficiency']:.0%} efficient, {found['cpu_efficiency']:.0%} by processor time   "
          f"({found['one_s']:.2f} s and {found['two_s']:.2f} s for {found['runs']} runs, rounds: {_list(found['efficiencies'])}; "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f})")  # fmt: skip


def overhead(folder: Path, runs: int, rounds: int) -> dict[str, Any]:
    """Return what a run of a study costs over asking `simulate`, in milliseconds, by the clock and of processor time."""
    content = study(runs, SHORT)
    model, machine, trace = moeplan.load_model("tiny-moe"), moeplan.load_machine("t4"), moeplan.load_trace("bundled")
    asked = [dict(fields) for fields in open_study(content).asked()]
    _ask(model, machine, trace, asked[:1])
    differences, alone = [], []
    for number in range(rounds):
        before = _clocks()
        _ask(model, machine, trace, asked)
        between = _clocks()
        found = moeplan.sweep(content, store=folder / f"overhead{number}.sqlite", jobs=1)
        after = _clocks()
        assert found.num_new == len(asked) == found.states[DONE]
        direct, swept = between - before, after - between
        differences.append((swept - direct) / len(asked) * MS_PER_S)
        alone.append(direct / len(asked) * MS_PER_S)
    wall, cpu = np.median(differences, axis=0)
    return {"runs": len(asked), "overhead_ms": wall, "overhead_cpu_ms": cpu, "simulate_cpu_ms": np.median(alone, axis=0)[1],
            "overheads_cpu_ms": [one[1] for one in differences]}  # fmt: skip


def _clocks() -> npt.NDArray[np.float64]:
    """Return (seconds of the clock, of the processor in this process and in those that have ended)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), time.process_time() + ended.ru_utime + ended.ru_stime])


def _ask(model: moeplan.ModelSpec, machine: moeplan.Profile, trace: Recording, asked: list[dict[str, Any]]) -> None:
    for fields in asked:
        settings = {name: value for name, value in fields.items() if "." in name}
        moeplan.simulate(
            model, machine, trace=trace, window=fields["window"], memory=fields["memory"], settings=settings
        )


def resume(folder: Path, runs: int) -> dict[str, Any]:
    """Return how long a study takes whose runs are all there, in this process and as a command."""
    content, where = study(runs, SHORT), folder / "resume.sqlite"
    opened = open_study(content)
    keys = Keys(opened.predict)
    asked = {keys.key(fields): fields for fields in opened.asked()}
    with Store(where) as store:
        store.enter(opened, list(asked))
        store.write([Answer(key, DONE, None, '{"decode_tokens_per_s":1.0}') for key in asked], asked)
    began = _clocks()
    found = moeplan.sweep(content, store=where)
    within = _clocks() - began
    assert (found.num_done, found.num_new) == (len(asked), 0)
    file = folder / "bench.yaml"
    file.write_text(json.dumps(content))
    began = _clocks()
    command = [sys.executable, "-m", "moeplan", "sweep", str(file), "--store", str(where), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert json.loads(done.stdout)["num_new"] == 0
    command_s, command_cpu_s = _clocks() - began
    return {"resume_runs": len(asked), "resume_s": within[0], "resume_cpu_s": within[1], "resume_command_s": command_s,
            "resume_command_cpu_s": command_cpu_s}  # fmt: skip


def sharing(folder: Path, runs: int, rounds: int) -> dict[str, Any]:
    """Return how well two processes share a study: one process's time over twice that of two, and over the processor time of both."""
    content = study(runs, LONG)
    times: dict[int, list[Any]] = {1: [], 2: []}
    for number in range(rounds):
        for jobs in (1, 2):
            began = _clocks()
            moeplan.sweep(content, store=folder / f"sharing{jobs}-{number}.sqlite", jobs=jobs)
            times[jobs].append(_clocks() - began)
    one, two = (np.median(times[jobs], axis=0) for jobs in (1, 2))
    found = [float(a[0] / (2 * b[0])) for a, b in zip(times[1], times[2], strict=True)]
    return {"one_s": one[0], "two_s": two[0], "efficiency": statistics.median(found), "efficiencies": found,
            "cpu_efficiency": one[1] / two[1]}  # fmt: skip


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
