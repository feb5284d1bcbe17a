"""How long an offload search takes: `python -m benchmarks.search [--recording FILE] [--json FILE]`.

A recording like gpt-oss-20b's (24 layers of 32 experts, 4 a token; made up in its family's routing unless --recording names one)
is searched over a window of 2,000 steps on a card of 6 GiB, in several weight formats, the next smaller one also as a second
format. Then again with one input changed: another objective, which the same simulation answers; a slower link and a smaller
card, each a simulation of its own, as it is to a new command. Candidates are counted as a plan counts them. Targets, on two cores:
10,000 candidates in 20 s, a repeat in 5 s.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from moeplan.api.load import load_machine, load_model, load_trace
from moeplan.api.settings import Settings
from moeplan.planner.offload.plan import OffloadRequest, base_schedule
from moeplan.planner.offload.scoring import SearchResult
from moeplan.planner.offload.search import search
from moeplan.sim.offload.simulate import Simulation
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.recording import RoutingTrace
from moeplan.traces.synthesis.prior import prior_recording

FORMATS = ("16", "8", "mxfp4", "3", "2")
MACHINE, MEMORY_BYTES = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", 6 * 2**30
SLOWER_LINK, LESS_BYTES = "12GB/s", 5 * 2**30
REQUESTS, PROMPT, REPLY, WINDOW = 5, 64, 420, 2000
COUNTS = ("evaluated", "abandoned", "raced_out", "pruned")


def main() -> None:
    """Search, search again, and print what both took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recording", help="a recording of gpt-oss-20b; default: made up")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    arguments = parser.parse_args()
    model = load_model("gpt-oss-20b")
    if arguments.recording is None:
        lengths = RequestLengths.alike(prompt_tokens=PROMPT, reply_tokens=REPLY, requests=REQUESTS)
        trace = prior_recording(model, lengths)
    else:
        loaded = load_trace(arguments.recording)
        if not isinstance(loaded, RoutingTrace):
            parser.error("the recording must be of single tokens")
        trace = loaded
    simulation = Simulation(model=model, profile=load_machine(MACHINE, engine="llama.cpp"), trace=trace, window_steps=WINDOW,
                            memory_bytes=MEMORY_BYTES)  # fmt: skip
    simulation.warm(base_schedule(OffloadRequest(), FORMATS[0]))
    rows = [timed(simulation, "first", "tokens_per_s"), timed(simulation, "another objective", "decode_tokens_per_s")]
    slower = Settings(machine={"host_to_device.pinned_bytes_per_s": SLOWER_LINK}).changed_machine(simulation.profile)
    rows.append(timed(simulation.over(trace, profile=slower), f"a link of {SLOWER_LINK}", "tokens_per_s"))
    rows.append(timed(simulation.over(trace, memory_bytes=LESS_BYTES), "a card of 5 GiB", "tokens_per_s"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def timed(simulation: Simulation, name: str, objective: str) -> dict[str, Any]:
    """Return what searches of every format took and counted, and print it."""
    began, used = time.perf_counter(), time.process_time()
    results: list[SearchResult] = []
    for number, bits in enumerate(FORMATS):
        smaller = FORMATS[number + 1] if number + 1 < len(FORMATS) else None
        base = base_schedule(OffloadRequest(), bits)
        results.append(search(simulation, base, objective=objective, low_bits=smaller))
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - used
    counts = {each: sum(getattr(one.tally, f"num_{each}") for one in results) for each in COUNTS}
    best = min((one.best for one in results), key=lambda one: one.total_ns)
    steps = simulation.workload(base_schedule(OffloadRequest(), FORMATS[0])).num_steps
    print(f"{name}: {sum(counts.values()):,} candidates over {steps:,} steps in {wall_s:.1f} s ({cpu_s:.1f} s of processor time): "
          f"{counts['evaluated']:,} evaluated, {counts['abandoned']:,} given up, {counts['raced_out']:,} raced out, "
          f"{counts['pruned']:,} pruned", flush=True)  # fmt: skip
    return {"name": name, "wall_s": wall_s, "cpu_s": cpu_s, "steps": steps, "step_s": best.figures["step_s"]} | counts


if __name__ == "__main__":
    main()
