"""One queueing model in the compiled simulator and in Cimba, a compiled general simulator: the same end, how many events a second.

    pip install cimba
    python -m benchmarks.cimba_queue [--json FILE]

Two servers in a row with fixed service times, the host and the device: for every layer the host works, launches two kernels, and waits
until both have run; each token ends with one more launch. An event is the end of a service, four for each layer and two for each
token. Both must end at the same nanosecond. The two are timed in turn. Ignored: what either is made for besides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cimba as cb
import numpy as np

from moeplan.sim.offload.costs import CostTables, host_costs
from moeplan.sim.offload.simulators import run_compiled
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.policies.state import make_config
from moeplan.sim.timeline import NUM_RATED_LANES, RATE_ONE
from moeplan.specs.schedules.presets import load_preset

from .engine import Case, routing

LAYERS, EXPERTS, TOKENS, REPEATS = 58, 4, 5000, 7
HOST_NS, LAUNCH_NS, DENSE_NS, EXPERT_NS = 30_000, 5_000, 60_000, 20_000
EVENTS = TOKENS * (4 * LAYERS + 2)


class Tandem(cb.Model):
    """The queueing model as Cimba says it."""

    launched: cb.Container
    ran: cb.Container
    ended: cb.Output[float]

    @cb.process
    def host(self):
        """Work on a layer, launch its kernels, wait for them; launch the head after the last."""
        for _ in range(5000):
            for _ in range(58):
                cb.hold(35_000.0)
                self.launched.put(1)
                cb.hold(5_000.0)
                self.launched.put(1)
                self.ran.get(1)
            cb.hold(5_000.0)
            self.launched.put(1)
            self.ran.get(1)

    @cb.process
    def device(self):
        """Run what is launched, in order."""
        for _ in range(5000):
            for _ in range(58):
                self.launched.get(1)
                cb.hold(60_000.0)
                self.launched.get(1)
                cb.hold(20_000.0)
                self.ran.put(1)
            self.launched.get(1)
            cb.hold(0.0)
            self.ran.put(1)
        self.ended = cb.now()


def ours() -> Callable[[], float]:
    """Return a function that runs the model in the compiled simulator and returns its end in nanoseconds."""
    schedule = load_preset("resident").with_options(cache__experts_per_layer=EXPERTS)
    case = Case("tandem queue", LAYERS, EXPERTS, 1, TOKENS, schedule)
    workload = build_workload(routing(case), schedule.workload)
    tables = CostTables(
        step_class=np.zeros(workload.num_steps, np.int64), dense_ns=np.full((1, LAYERS), DENSE_NS), head_ns=np.array([0]),
        kernel_ns=np.array([[0, *[EXPERT_NS] * workload.max_expert_tokens]]), grouped_ns=np.array([0]),
        expert_format=np.zeros(LAYERS * EXPERTS, np.int64), expert_bytes=np.array([1]), num_chunks=np.array([1]),
        chunk_bytes=np.array([[1, 1]]), chunk_ns=np.array([[1, 1]]), back_ns=np.array([1]), cpu_ns=np.zeros((1, 0), np.int64),
        disk_ns=np.zeros(1, np.int64), host_ns=host_costs(step=0, layer=HOST_NS, kernel=LAUNCH_NS, transfer=0),
        rate=np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE),
    )  # fmt: skip
    config = make_config(schedule, num_layers=LAYERS, num_experts=EXPERTS, top_k=1, guess_distances=0, guess_width=0)
    capacities = np.full(LAYERS, EXPERTS)
    return lambda: float(run_compiled(config, workload, tables, capacities, serial=False).makespan_ns)


def theirs() -> Callable[[], float]:
    """Return a function that runs the model in Cimba and returns its end in nanoseconds."""
    model = Tandem()
    return lambda: float(cb.Experiment(model, replications=1, seed=1).run()[model].ended.values.flat[0])


def main() -> None:
    """Run both in turn, and print events a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where all samples go")
    arguments = parser.parse_args()
    runs = {"moeplan, compiled": ours(), "cimba": theirs()}
    ends = {name: run() for name, run in runs.items()}  # compiles both
    if len(set(ends.values())) != 1:
        raise SystemExit(f"they end apart: {ends}")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            samples[name].append(EVENTS / (time.perf_counter() - began))
    print(f"{EVENTS:,} events, both end at {next(iter(ends.values())):,.0f} ns")
    for name, found in samples.items():
        print(
            f"{name:20}{statistics.median(found) / 1e6:8.1f} M events/s ({min(found) / 1e6:.1f} to {max(found) / 1e6:.1f}, n = {REPEATS})"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"events": EVENTS, "ends_ns": ends, "events_per_s": samples}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
