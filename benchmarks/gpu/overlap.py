"""Stage 5: what overlapping a layer's experts with exchanges costs them on this GPU.

    grouped or dense: N rows     all experts in one launch, or a plain product for each, by rows of each expert
    groups: N rows               the same experts in 1, 2, 4 … launches one after the other, each of fewer experts
    multiprocessors: N rows      one grouped launch on fewer multiprocessors, as an exchange leaves them
    copies beside products       copies within the device on two streams of their own, as exchanges make them, beside a grouped launch

Modelled: experts of one shape with even rows, 16 bits; a copy's and a launch's time alone and together. What is measured goes into the
machine's profile (`calibrate.costs.overlap_table`), where planning finds it. Ignored: NCCL, which needs several GPUs; uneven routing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeplan.base.units import MIB
from moeplan.calibrate.samples import Sample, sample_to_dict
from moeplan.kernels.activation import ACTIVATIONS
from moeplan.kernels.expert_weights import DenseMatrix
from moeplan.kernels.grouped_gemm import grouped_down, grouped_gate_up
from moeplan.kernels.row_groups import RowGroups, groups_from_counts

from .opening import open_results
from .profile import keep_overlap
from .results import Part

_ROWS, _DRY_ROWS = (16, 64, 256, 1024, 4096), (4, 16)
_EXPERTS, _HIDDEN, _INNER = 16, 5120, 1536
"""EPS-MoE's layer: DeepSeek-V2's experts (arXiv 2410.12247)."""
_DRY_EXPERTS, _DRY_HIDDEN, _DRY_INNER = 4, 64, 64
_GROUPS = (1, 2, 4, 8, 16)
_SHARES = (1.0, 124 / 132, 116 / 132, 108 / 132, 100 / 132, 92 / 132)
"""Of the multiprocessors, those that EPS-MoE measured its products with."""
_RUNS, _DRY_RUNS = 20, 1
_COPY_BYTES, _DRY_COPY_BYTES = 256 * MIB, 64 * 1024


class Layer:
    """Experts of one shape on the device, with rows for each."""

    def __init__(self, kind: str, rows: int, *, dry: bool) -> None:
        self.kind, self.rows, self.runs = kind, rows, _DRY_RUNS if dry else _RUNS
        self.experts = _DRY_EXPERTS if dry else _EXPERTS
        hidden, inner = (_DRY_HIDDEN, _DRY_INNER) if dry else (_HIDDEN, _INNER)
        make = partial(torch.randn, device=kind, dtype=torch.bfloat16)
        self.activation = ACTIVATIONS["swiglu"]
        self.gate_up = make(self.experts, 2 * inner, hidden).mul_(hidden**-0.5)
        self.down = make(self.experts, hidden, inner).mul_(inner**-0.5)
        self.x = make(self.experts * rows, hidden)

    def grouped(self, groups: int = 1, multiprocessors: int | None = None) -> None:
        """Run all experts in `groups` launches."""
        each = self.experts // groups
        for first in range(0, self.experts, each):
            found = self._row_groups(each)
            x = self.x[first * self.rows : (first + each) * self.rows]
            h = grouped_gate_up(
                x,
                DenseMatrix(values=self.gate_up[first : first + each]),
                found,
                self.activation,
                multiprocessors=multiprocessors,
            )
            grouped_down(h, DenseMatrix(values=self.down[first : first + each]), found, multiprocessors=multiprocessors)

    def dense(self) -> None:
        """Run one expert after the other as plain products."""
        for expert in range(self.experts):
            x = self.x[expert * self.rows : (expert + 1) * self.rows]
            gate, up = (x @ self.gate_up[expert].T).chunk(2, dim=1)
            (torch.nn.functional.silu(gate) * up) @ self.down[expert].T

    def _row_groups(self, experts: int) -> RowGroups:
        return groups_from_counts([self.rows] * experts, self.kind)

    def times_s(self, work: Callable[[], object]) -> tuple[float, ...]:
        """Return the seconds of every run of `work`, which is waited for each time; one more run before them warms up."""
        times = []
        for number in range(self.runs + 1):
            _wait(self.kind)
            began = time.perf_counter()
            work()
            _wait(self.kind)
            if number:
                times.append(time.perf_counter() - began)
        return tuple(times)

    def sample(self, kernel: str, seconds: Sequence[float], launches: int = 1, share: float = 1.0) -> Sample:
        """Return these times as a sample of a calibration."""
        arguments = {"rows": self.rows, "experts": self.experts, "launches": launches, "share": share}
        return Sample(
            kind="layer_experts", labels={"kernel": kernel}, seconds=tuple(seconds),
            arguments={key: float(value) for key, value in arguments.items()},
        )  # fmt: skip


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Measure what is not measured yet and write overlap.json; return whether all of it is done."""
    began = open_results(out, "overlap", dry=dry, deadline_s=deadline_s)
    rows = _DRY_ROWS if dry else _ROWS
    parts: list[Part] = [
        *((f"grouped or dense: {n} rows", partial(_kernels, began.kind, n, dry=dry)) for n in rows),
        *((f"groups: {n} rows", partial(_groups, began.kind, n, dry=dry)) for n in rows),
        *((f"multiprocessors: {n} rows", partial(_fewer, began.kind, n, dry=dry)) for n in rows[-2:]),
        ("copies beside products", partial(_copies, began.kind, rows[-1], dry=dry)),
    ]
    began.results.run(parts)
    kept = keep_overlap(out, began.told, began.results.parts)
    return began.results.close(targets=[], warnings=[*began.warnings, *kept.pop("warnings", [])], **kept)


def _sampled(samples: Sequence[Sample]) -> dict[str, Any]:
    return {"samples": [sample_to_dict(sample) for sample in samples]}


def _kernels(kind: str, rows: int, *, dry: bool) -> dict[str, Any]:
    layer = Layer(kind, rows, dry=dry)
    times = {"grouped": layer.times_s(layer.grouped), "dense": layer.times_s(layer.dense)}
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "faster": min(seconds, key=lambda name: seconds[name]),
        "experts": layer.experts,
        **_sampled([layer.sample(name, each) for name, each in times.items()]),
    }


def _groups(kind: str, rows: int, *, dry: bool) -> dict[str, Any]:
    layer = Layer(kind, rows, dry=dry)
    times = {count: layer.times_s(partial(layer.grouped, count)) for count in _GROUPS if count <= layer.experts}
    found = {count: statistics.median(each) for count, each in times.items()}
    return {"seconds": {str(count): value for count, value in found.items()},
            "over_one_launch": {str(count): value / found[1] for count, value in found.items()},
            **_sampled([layer.sample("grouped", each, launches=count) for count, each in times.items()])}  # fmt: skip


def _fewer(kind: str, rows: int, *, dry: bool) -> dict[str, Any]:
    layer = Layer(kind, rows, dry=dry)
    whole = torch.cuda.get_device_properties(0).multi_processor_count if kind == "cuda" else 4
    counts = sorted({max(1, round(share * whole)) for share in _SHARES}, reverse=True)
    times = {count: layer.times_s(partial(layer.grouped, 1, count)) for count in counts}
    return {"multiprocessors": whole, "seconds": {str(count): statistics.median(each) for count, each in times.items()},
            **_sampled([layer.sample("grouped", each, share=count / whole) for count, each in times.items()])}  # fmt: skip


def _copies(kind: str, rows: int, *, dry: bool) -> dict[str, Any]:
    layer = Layer(kind, rows, dry=dry)
    size = _DRY_COPY_BYTES if dry else _COPY_BYTES
    pairs = [[torch.empty(size, dtype=torch.uint8, device=kind) for _ in range(2)] for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in pairs] if kind == "cuda" else [None, None]
    products = layer.times_s(layer.grouped)
    once = statistics.median(layer.times_s(partial(_copy, pairs, streams, 1)))
    # As long as the products, so that they are beside each other all the time.
    number = max(1, round(statistics.median(products) / once))
    times = {
        "products": products,
        "copies": layer.times_s(partial(_copy, pairs, streams, number)),
        "together": layer.times_s(lambda: (_copy(pairs, streams, number), layer.grouped())),
    }
    seconds = {what: statistics.median(each) for what, each in times.items()}
    moved = 2 * 2 * size * number
    arguments = {"rows": float(rows), "experts": float(layer.experts), "bytes": float(moved)}
    samples = [
        Sample(kind="layer_beside", labels={"what": what}, arguments=arguments, seconds=each)
        for what, each in times.items()
    ]
    return {**{f"{what}_s": value for what, value in seconds.items()}, "bytes": moved,
            "stretch": seconds["together"] / max(seconds["products"], seconds["copies"]), **_sampled(samples)}  # fmt: skip


def _copy(pairs: Sequence[Sequence[torch.Tensor]], streams: Sequence[Any], times: int) -> None:
    for (there, source), stream in zip(pairs, streams, strict=True):
        if stream is None:
            for _ in range(times):
                there.copy_(source)
            continue
        with torch.cuda.stream(stream):
            for _ in range(times):
                there.copy_(source)


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
