"""How fast and how level our EPLB is on recorded expert loads: 32 ranks, one redundant expert each.

Every file is planned by the compiled version, timed many times after compiling, and by the slow statement of the published
algorithm, timed once; the two must agree slot for slot, so that their balance is the same. Targets: at most 15 ms for 58 layers
of 256 experts, and max/mean rank load of 1.006 to 1.008 under the global rule. Prints a table; `--json FILE` keeps every sample.

`python -m benchmarks.eplb [--loads FOLDER] [--json FILE]`; the loads are recordings of SGLang, read from `../shared/data` when
that folder is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from moeplan import __version__
from moeplan.base.text_files import write_atomic
from moeplan.base.units import MS_PER_S
from moeplan.planner.placement.eplb import even_rank_load, max_over_mean, rebalance
from moeplan.planner.placement.eplb_reference import rebalance_layer
from moeplan.traces.readers import import_trace
from moeplan.traces.recording import LoadProfile

LOADS = Path(__file__).resolve().parents[2] / "shared" / "data" / "loads"
RANKS, NODES, REDUNDANT, GROUPS = 32, 4, 32, 8
REPEATS = 50
MOST_S = 0.015


def measure(file: Path) -> dict[str, object]:
    """Return the balance and the samples of one file."""
    profile = import_trace("sglang-stat", file)
    if not isinstance(profile, LoadProfile):
        raise TypeError(f"{file} holds tokens, not loads")
    load = np.asarray(profile.counts)
    slots = load.shape[1] + REDUNDANT
    line: dict[str, object] = {"file": file.name, "num_layers": load.shape[0], "num_experts": load.shape[1]}
    for rule, groups in (("global", None), ("hierarchical", GROUPS)):
        placement = rebalance(load, slots, RANKS, NODES, groups)  # compiles
        samples = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            placement = rebalance(load, slots, RANKS, NODES, groups)
            samples.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        slow = [rebalance_layer(row, slots, RANKS, NODES, groups) for row in load.tolist()]
        reference_s = time.perf_counter() - begin
        ratio = max_over_mean(even_rank_load(load, placement))
        line[rule] = {
            "max_over_mean": float(ratio.mean()), "max_over_mean_by_layer": ratio.tolist(), "samples_s": samples,
            "reference_s": reference_s, "equal_to_reference": placement.physical_to_logical.tolist() == slow,
        }  # fmt: skip
        middle = statistics.median(samples)
        print(f"{file.name:28s} {rule:12s} max/mean {ratio.mean():.4f}   median {middle * MS_PER_S:.2f} ms, worst "
              f"{max(samples) * MS_PER_S:.2f} ms ({'met' if middle <= MOST_S else 'MISSED'})   reference "
              f"{reference_s * MS_PER_S:.0f} ms, {'equal' if line[rule]['equal_to_reference'] else 'DIFFERENT'}")  # type: ignore[index]  # fmt: skip
    return line


def main() -> None:
    """Measure every file and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", type=Path, default=LOADS)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    files = sorted(args.loads.glob("*.json")) if args.loads.is_dir() else []
    if not files:
        print(f"no loads at {args.loads}: name a folder with --loads")
        return
    found = {"schema_version": 1, "version": __version__, "num_cores": os.cpu_count(),
             "ranks": RANKS, "nodes": NODES, "redundant": REDUNDANT, "files": [measure(file) for file in files]}  # fmt: skip
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
