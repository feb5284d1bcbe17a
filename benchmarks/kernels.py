"""The kernels on a GPU: first whether they are right, then how fast, beside cuBLAS and the device's own memory bandwidth.

    python -m benchmarks.kernels --out FOLDER [--dry] [--budget-s 420]

Every case is checked element by element against float64 before it is timed. Kernels are timed as replays of CUDA graphs, so that
what is measured is the device, not Python; the times are the harness's, all of them kept. Shipped launch configurations are
measured first, for all cases; then, while time is left, configurations are searched case by case and what is found is kept: in
FOLDER/tuned, and where later runs on this machine look for it. Each case is a part of `gpu.results`: what is done is not repeated.

--dry runs tiny sizes in Triton's interpreter on the CPU and writes the same JSON; its times mean nothing. Targets: 85 % of cuBLAS's
rate at 4096 rows and more, 80 % of the copy bandwidth where weights' bytes bind, 70 % of it for 4-bit weights at 1 to 16 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.base.errors import InputError, MoeplanError

from .gpu.results import Part, Results, target

if TYPE_CHECKING:
    from moeplan.calibrate.microbenchmarks.harness import Harness
    from moeplan.devices.device import Device
    from moeplan.kernels.tuning import Config

    from .kernel_cases import Case, CaseSpec

DEFAULT_BUDGET_S = 420.0
CUBLAS_TARGET, MEMORY_TARGET, DECODE_TARGET = 0.85, 0.80, 0.70
MOST_DECODE_ROWS = 16
_ROUNDS, _REPETITIONS = 5, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json and tuned/")
    parser.add_argument("--dry", action="store_true", help="tiny sizes in the interpreter, on any machine")
    parser.add_argument(
        "--budget-s", type=float, default=DEFAULT_BUDGET_S, help="seconds after which nothing new is searched"
    )
    parser.add_argument("--no-search", action="store_true", help="measure shipped configurations only")
    given = parser.parse_args(arguments)
    if given.dry:
        if "triton" in sys.modules:
            parser.error("--dry needs a process of its own: triton is already imported")
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which is why imports below are inside
    try:
        done = run(given.out, dry=given.dry, deadline_s=time.monotonic() + given.budget_s, search=not given.no_search)
    except MoeplanError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0 if done else 1


def run(out: Path, *, dry: bool, deadline_s: float, search: bool = True) -> bool:
    """Measure what is not measured yet, write FOLDER/kernels.json; return whether all of it is done and right."""
    from .kernel_cases import interpreter_trouble

    if dry and (trouble := interpreter_trouble()) is not None:
        raise InputError("DRY", 1, f"this triton's interpreter does not run with this numpy ({trouble})",
                         "use triton 3.7 or later, or numpy before 2.4")  # fmt: skip
    benchmark = Benchmark(dry=dry, deadline_s=deadline_s, search=search, out=out)
    done = benchmark.run()
    print(table(benchmark.results.document))
    return done


class Benchmark:
    """One run: a device, a harness, and the clock it must keep."""

    def __init__(self, *, dry: bool, deadline_s: float, search: bool, out: Path) -> None:
        from moeplan.calibrate.microbenchmarks.harness import Harness
        from moeplan.devices.device import metadata_of, open_device
        from moeplan.kernels.grouped_gemm import device_of

        self.dry, self.out, self.search = dry, out, search and not dry
        self.deadline = deadline_s
        self.device: Device = open_device("cpu" if dry else "cuda")
        self.harness: Harness = Harness(self.device)
        self.name, self.capability = device_of(self.device.place)
        self.results = Results(
            out / "kernels.json",
            stage="kernels",
            dry=dry,
            device={**metadata_of(self.device), "triton": _version("triton")},
            deadline_s=deadline_s,
            alive=self.device.synchronize,
        )

    def run(self) -> bool:
        """Do what is left; return whether everything is done and nothing is wrong."""
        from moeplan.calibrate.microbenchmarks.harness import conditions_now
        from moeplan.kernels.tuning import origin

        from .kernel_cases import all_specs

        conditions = {"began": conditions_now(self.device)}
        configurations = origin(self.name, self.capability)
        specs = all_specs(dry=self.dry)
        counts = (2, 5) if self.dry else (1, 16, 4096)
        parts: list[Part] = [("ceilings", self.ceilings)]
        parts += [(spec.name, partial(self.one, spec, search=False)) for spec in specs]
        parts += [(f"sort, permute and combine {count} tokens", partial(self.moves, count)) for count in counts]
        if self.search:
            parts += [(f"search: {spec.name}", partial(self.one, spec, search=True)) for spec in specs]
        self.results.run(parts, require=1)
        conditions["ended"] = conditions_now(self.device)
        done = self.results.close(
            conditions=conditions,
            configurations=configurations,
            targets=targets(measurements(self.results.parts), dry=self.dry),
        )
        return done and all(check["passed"] for check in checks(self.results.parts))

    def ceilings(self) -> dict[str, float]:
        """Return the copy bandwidth (bytes read and written) and the rate of a square bfloat16 product, both measured here."""
        from moeplan.calibrate.microbenchmarks.ceilings import ceiling_benches, sizes_for

        copy_bytes, side = (1 << 20, 64) if self.dry else sizes_for(self.device, quick=False)
        self.device.synchronize()
        found = self.harness.measure(
            ceiling_benches(self.device, copy_bytes=copy_bytes, side=side), rounds=3, repetitions=5
        )
        copy, matmul = found[0], next(sample for sample in found if sample.labels.get("dtype") == "float16")
        return {
            "copy_bytes_per_s": copy.arguments["bytes"] / copy.median_s,
            "matmul_flops_per_s": 2 * side**3 / matmul.median_s,
        }

    def one(self, spec: CaseSpec, *, search: bool) -> dict[str, Any]:
        """Check and measure one case, with what is shipped or with the best a search finds; its memory is free afterwards."""
        from .kernel_cases import prepare

        try:
            case = prepare(spec, self.device.place)
            return self.searched(case) if search else self.record(case, self.shipped(case), searched=False)
        finally:
            case = None
            gc.collect()
            if not self.dry:
                import torch

                torch.cuda.empty_cache()

    def shipped(self, case: Case) -> Config:
        """Return the configuration that a call without one would take."""
        from moeplan.kernels.tuning import find_config

        return find_config(case.spec.key, case.groups.rows_per_expert, self.name, self.capability)

    def searched(self, case: Case) -> dict[str, Any]:
        """Search the best configuration of a case, keep it for later runs, and measure with it."""
        from moeplan.kernels.error_bounds import worst_ratio
        from moeplan.kernels.search import candidates, tune
        from moeplan.kernels.tuning import save_configs

        key, rows, first = case.spec.key, case.groups.rows_per_expert, self.shipped(case)
        tuned = tune(
            [first, *(other for other in candidates(key, rows, self.capability) if other != first)],
            lambda config: case.run(config, 0),
            lambda call: self.seconds([call]).median_s,
            lambda config, result: worst_ratio(result, case.expected, case.bound(config)) <= 1,
            deadline_s=self.deadline,
        )
        note = f"searched by benchmarks.kernels, triton {_version('triton')}"
        for folder in (self.out / "tuned", None):
            save_configs({key: {rows: tuned.best}}, self.name, note=note, folder=folder)
        found = self.record(case, tuned.best, searched=True)
        found["tried"] = [
            {"config": dataclasses.asdict(config), "median_s": seconds} for config, seconds in tuned.seconds.items()
        ] + [{"config": dataclasses.asdict(config), "refused": why} for config, why in tuned.refused.items()]
        return found

    def record(self, case: Case, config: Config, *, searched: bool) -> dict[str, Any]:
        """Return the check of a case and, where it is right, its measurement."""
        from moeplan.kernels.error_bounds import worst_ratio

        spec, ceilings = case.spec, self.results.parts["ceilings"]
        ratio = worst_ratio(case.run(config, 0), case.expected, case.bound(config))
        check = {"name": spec.name, "config": dataclasses.asdict(config), "worst_ratio": ratio, "passed": ratio <= 1}
        if ratio > 1:
            return {"checks": [check], "measurements": []}
        calls = [lambda variant=variant: case.run(config, variant) for variant in range(spec.num_variants)]
        sample = self.seconds(calls)
        work = spec.work
        bound_s = work.bound_s(flops_per_s=ceilings["matmul_flops_per_s"], bytes_per_s=ceilings["copy_bytes_per_s"])
        entry: dict[str, Any] = {
            "name": spec.name,
            "kernel": spec.kernel,
            "weights": spec.weights,
            "regime": spec.regime,
            "model": spec.shape.name,
            "rows": sum(spec.rows_of_expert),
            "most_rows_of_an_expert": max(spec.rows_of_expert),
            "num_experts": len(spec.rows_of_expert),
            "num_active": case.groups.num_active,
            "num_outputs": spec.num_outputs,
            "num_inputs": spec.num_inputs,
            "flops": work.flops,
            "bytes": work.num_bytes,
            "config": dataclasses.asdict(config),
            "searched": searched,
            **_times(sample),
            "flops_per_s": work.flops / sample.median_s,
            "bytes_per_s": work.num_bytes / sample.median_s,
            "fraction_of_copy": work.num_bytes / sample.median_s / ceilings["copy_bytes_per_s"],
            "fraction_of_bound": bound_s / sample.median_s,
        }
        if spec.weights in ("16", "8") and spec.regime != "memory":
            cublas = self.cublas(spec)
            entry |= {"cublas_s": cublas.median_s, "fraction_of_cublas": cublas.median_s / sample.median_s}
        print(_line(entry), file=sys.stderr)
        return {"checks": [check], "measurements": [entry]}

    def cublas(self, spec: CaseSpec) -> Any:
        """Return the time of one dense bfloat16 product with the same operations, through torch.mm."""
        import torch

        rows = sum(spec.rows_of_expert)
        x = torch.randn(rows, spec.num_inputs, device=self.device.place).to(torch.bfloat16)
        w = torch.randn(spec.halves * spec.num_outputs, spec.num_inputs, device=self.device.place).to(torch.bfloat16)
        out = torch.empty(rows, w.shape[0], device=self.device.place, dtype=torch.bfloat16)
        return self.seconds([lambda: torch.mm(x, w.T, out=out)])

    def moves(self, num_tokens: int) -> dict[str, Any]:
        """Return the check and the measurements of sorting, gathering and combining `num_tokens` tokens."""
        import torch

        from moeplan.kernels.permute import combine, permute, sort_by_expert
        from moeplan.kernels.roofline import Work, combine_work, permute_work

        from .kernel_cases import QWEN3, TINY

        shape, ceilings = TINY if self.dry else QWEN3, self.results.parts["ceilings"]
        generator = torch.Generator().manual_seed(num_tokens)
        choices = [torch.randperm(shape.num_experts, generator=generator)[: shape.top_k] for _ in range(num_tokens)]
        experts = torch.stack(choices).to(torch.int32).to(self.device.place)
        x = torch.randn(num_tokens, shape.hidden, device=self.device.place).to(torch.bfloat16)
        weights = torch.rand(num_tokens, shape.top_k, device=self.device.place)
        order = sort_by_expert(experts, shape.num_experts)
        rows = permute(x, order)
        # Sorted, stable, nothing lost: by expert first, then in the order of choices.
        places = (experts.flatten().long() * experts.numel() + torch.arange(experts.numel(), device=x.device)).argsort()
        right = torch.equal(
            order.row_of_choice.flatten().long()[places], torch.arange(experts.numel(), device=x.device)
        )
        right = right and torch.equal(rows, x[order.token_of_row.long()])
        summed = (rows.double()[order.row_of_choice.long()] * weights.double().unsqueeze(-1)).sum(1)
        error = float((combine(rows, order, weights).double() - summed).norm() / summed.norm()) / 2.0**-7
        name = f"sort, permute and combine {num_tokens} tokens"
        check = {"name": name, "config": {}, "worst_ratio": error, "passed": right and error < 1}
        found = []
        nothing = Work(flops=0, num_bytes=0)  # a sort is bound by its launch
        for what, call, work in (
            ("sort", lambda: sort_by_expert(experts, shape.num_experts).offsets, nothing),
            ("permute", lambda: permute(x, order), permute_work(num_tokens, shape.top_k, shape.hidden)),
            ("combine", lambda: combine(rows, order, weights), combine_work(num_tokens, shape.top_k, shape.hidden)),
        ):
            sample = self.seconds([call])
            share = work.num_bytes / sample.median_s / ceilings["copy_bytes_per_s"]
            found.append({
                "name": f"{what} {num_tokens} tokens", "kernel": what, "regime": "move", "model": shape.name,
                "rows": num_tokens * shape.top_k, "bytes": work.num_bytes, **_times(sample), "fraction_of_copy": share,
            })  # fmt: skip
        return {"checks": [check], "measurements": found}

    def seconds(self, calls: Sequence[Callable[[], object]]) -> Any:
        """Return the harness's sample of `calls`, taken in turn: replays of graphs on a GPU, plain calls elsewhere."""
        import torch

        from moeplan.calibrate.microbenchmarks.harness import Bench

        runs: list[Callable[[], object]] = []
        kept = []
        for call in calls:
            call()  # compiles, and makes what is made once
            if self.dry:
                runs.append(call)
                continue
            graph = torch.cuda.CUDAGraph()
            self.device.synchronize()
            with torch.cuda.graph(graph):
                kept.append(call())
            runs.append(graph.replay)
        self.device.synchronize()
        self.device.new_epoch()
        bench = Bench(kind="memory", labels={}, arguments={"bytes": 0}, run=lambda number: runs[number % len(runs)]())
        rounds, repetitions = (1, 1) if self.dry else (_ROUNDS, _REPETITIONS)
        return self.harness.measure([bench], rounds=rounds, repetitions=repetitions)[0]


def targets(measured: Sequence[dict[str, Any]], *, dry: bool) -> list[dict[str, Any]]:
    """Return for each target how far its cases got: the fastest measurement of each case, and of those the worst.

    Whether a target is met is None where nothing real was measured.
    """
    best: dict[str, dict[str, Any]] = {}
    for entry in measured:
        if entry["name"] not in best or entry["median_s"] < best[entry["name"]]["median_s"]:
            best[entry["name"]] = entry
    found = []
    for name, goal, figure, applies in (
        ("grouped GEMM against cuBLAS's rate at 4096 rows and more", CUBLAS_TARGET, "fraction_of_cublas",
         lambda e: e["kernel"].startswith("grouped") and e["weights"] == "16" and e["regime"] == "compute"),
        ("grouped GEMM against the copy bandwidth where weights bind", MEMORY_TARGET, "fraction_of_copy",
         lambda e: e["kernel"].startswith("grouped") and e["regime"] == "memory"),
        ("4-bit GEMM against the copy bandwidth at 1 to 16 rows", DECODE_TARGET, "fraction_of_copy",
         lambda e: e["kernel"].startswith("dequant") and e["weights"] == "4" and e["most_rows_of_an_expert"] <= MOST_DECODE_ROWS),
    ):  # fmt: skip
        cases = {entry["name"]: entry[figure] for entry in best.values() if applies(entry)}
        worst = min(cases.values(), default=None)
        found.append(target(name, goal, worst, at_most=False, dry=dry, figure=figure, cases=cases))
    return found


def checks(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every check of every part."""
    return [check for part in parts.values() for check in part.get("checks", [])]


def measurements(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every measurement of every part."""
    return [entry for part in parts.values() for entry in part.get("measurements", [])]


def table(document: dict[str, Any]) -> str:
    """Return the results as lines of text: wrong kernels, then every measurement, then targets."""
    lines = [
        f"WRONG {check['name']}: {check['worst_ratio']:.3g} × its bound"
        for check in checks(document["parts"])
        if not check["passed"]
    ]
    lines += [_line(entry) for entry in measurements(document["parts"])]
    for one in document["targets"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[one["met"]]
        worst = "" if one["met"] is None else f", worst case {one['got']:.1%}"
        lines.append(f"{verdict}: {one['name']}, goal {one['target']:.0%}{worst}")
    return "\n".join(lines)


def _times(sample: Any) -> dict[str, Any]:
    return {"median_s": sample.median_s, "spread": sample.spread, "seconds": list(sample.seconds)}


def _line(entry: dict[str, Any]) -> str:
    """One measurement: microseconds, rates, shares of ceilings."""
    parts = [f"{entry['median_s'] * 1e6:9.1f} µs ±{entry['spread']:4.0%}"]
    if "flops_per_s" in entry:
        parts.append(f"{entry['flops_per_s'] / 1e12:7.1f} TFLOP/s {entry['bytes_per_s'] / 1e12:5.2f} TB/s")
    for figure in ("fraction_of_copy", "fraction_of_cublas", "fraction_of_bound"):
        if figure in entry:
            parts.append(f"{figure.removeprefix('fraction_of_')} {entry[figure]:4.0%}")
    return "  ".join([*parts, entry["name"], "searched" if entry.get("searched") else ""]).rstrip()


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


if __name__ == "__main__":
    sys.exit(main())
