"""How well a calibration of all-to-alls foresees traffic it has not seen, between processes of this machine.

For each number of ranks: the calibration as `moeplan calibrate` makes it, then exchanges of other sizes and other traffic (random
matrices, everything to one rank, everything to the next rank), then the calibration's own exchanges once more, which tell the noise.
Prints median, 90th percentile and worst of |predicted / measured - 1|, how many lie within the stated uncertainty, and the same for
the rule that knows the busiest port only. `--json FILE` keeps all samples.

`python -m benchmarks.collectives [--ranks 2,4] [--backend gloo] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeplan import __version__
from moeplan.base.text_files import write_atomic
from moeplan.base.units import KIB
from moeplan.calibrate.all_to_all_matrices import Matrix, busiest_port, matrix_from_text, port_bytes
from moeplan.calibrate.costs.all_to_all_table import ExchangeTable, curve_name, read_table
from moeplan.calibrate.costs.surface import nine_in_ten
from moeplan.calibrate.fitting.all_to_all_fit import fit_exchanges
from moeplan.calibrate.microbenchmarks.collectives import FULL_EXCHANGES, measure_all_to_all, measure_matrices
from moeplan.calibrate.samples import Sample, SampleSet, sample_to_dict

# Between the calibrated sizes, which are powers of four KiB.
SIZES = tuple(KIB * 4**power * 5 // 2 for power in range(8))
SEED = 20


def held_out(ranks: int) -> list[tuple[str, Matrix]]:
    """Return traffic that the calibration has not seen, every rank sending about as much as a size says."""
    rng = np.random.default_rng(SEED)
    found = []
    for size in SIZES:
        mixed = np.floor(size * rng.dirichlet(np.ones(ranks), ranks)).astype(np.int64)
        np.fill_diagonal(mixed, 0)
        found.append(("random", mixed))
        one = np.zeros((ranks, ranks), np.int64)
        one[1:, 0] = size
        found.append(("to one", one))
        found.append(("to the next", np.roll(np.eye(ranks, dtype=np.int64) * size, 1, axis=1)))
    return found


def foreseen(table: ExchangeTable, sample: Sample) -> float:
    """Return the seconds that the busiest rank's port is predicted to take."""
    matrix = matrix_from_text(sample.labels["matrix"], table.num_ranks)
    port, total = busiest_port(matrix)[0], int(port_bytes(matrix)[0].sum())
    return float(table.seconds(np.array([port]), np.array([total]))[0])


def figures(errors: Any) -> dict[str, float]:
    """Return median, 90th percentile and worst of absolute errors."""
    off = np.abs(errors)
    return {"median": float(np.median(off)), "p90": nine_in_ten(off), "worst": float(off.max())}


def measure(ranks: int, backend: str) -> dict[str, Any]:
    """Return what one number of ranks gives."""
    began = time.monotonic()
    first = measure_all_to_all(ranks, backend=backend)
    calibrated_s = time.monotonic() - began
    others = measure_matrices(held_out(ranks), backend=backend)
    again = measure_all_to_all(ranks, backend=backend)
    fit = fit_exchanges(_set(first), "this run")
    balanced = [s for s in first if s.kind != "all_to_all" or s.labels["pattern"] == "balanced"]
    plain = fit_exchanges(_set(balanced), "this run")
    if fit is None or plain is None:
        raise ValueError("nothing was measured")
    name = curve_name(backend, ranks)
    table, by_port = (read_table(name, ranks, each.curves) for each in (fit, plain))
    errors = np.array([foreseen(table, sample) / sample.midmean_s - 1 for sample in others])
    port_errors = np.array([foreseen(by_port, sample) / sample.midmean_s - 1 for sample in others])
    repeated = np.array(
        [b.midmean_s / a.midmean_s - 1 for a, b in zip(first, again, strict=True) if a.kind == "all_to_all"]
    )
    line = {
        "ranks": ranks,
        "backend": backend,
        "calibrated_s": calibrated_s,
        "held_out": figures(errors),
        "busiest_port_alone": figures(port_errors),
        "noise": figures(repeated),
        "stated_uncertainty": table.relative_uncertainty,
        "within": float((np.abs(errors) <= table.relative_uncertainty).mean()),
        "fit": {
            key: figures(quality.errors) | {"parameters": dict(quality.parameters)} for key, quality in fit.quality.items()
        },
        "by_pattern": {
            pattern: figures(errors[[s.labels["pattern"] == pattern for s in others]])
            for pattern in dict.fromkeys(s.labels["pattern"] for s in others)
        },
        "samples": {
            part: [sample_to_dict(s) | {"seconds": [round(each, 9) for each in s.seconds]} for s in samples]
            for part, samples in (("calibration", first), ("held_out", others), ("again", again))
        },
    }  # fmt: skip
    for key in ("held_out", "busiest_port_alone", "noise"):
        print(f"{ranks} ranks  {key:20s}" + "".join(f"  {what} {value:7.1%}" for what, value in line[key].items()))
    print(f"{ranks} ranks  within the stated {line['stated_uncertainty']:.1%}: {line['within']:.0%}")
    for key, told in line["fit"].items():
        print(f"         {key:34s} median {told['median']:6.1%}  p90 {told['p90']:6.1%}  {told['parameters']}")
    return line


def _set(samples: list[Sample]) -> SampleSet:
    return SampleSet(device={}, conditions={}, samples=tuple(samples))


def main() -> None:
    """Measure every number of ranks and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default=",".join(str(number) for number in FULL_EXCHANGES.ranks))
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    found = {"schema_version": 1, "version": __version__, "num_cores": os.cpu_count(),
             "ranks": [measure(int(part), args.backend) for part in args.ranks.split(",")]}  # fmt: skip
    if args.json:
        write_atomic(args.json, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
