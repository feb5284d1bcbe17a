"""Tables and constants from one set of samples, table by table.

Modelled: medians of repetitions are the points; every table's uncertainty is what leaving points out got wrong nine times in ten.
Points far slower than their neighbours (a kernel choice that was not tuned, a disturbance) are flagged by name, kept in the samples
and left out of the tables. Ignored: what a profile needs in all (`fit`), how tables are used (`costs.fitted`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ...base.errors import InputError
from ...specs.machines.profile import (
    Constant,
    CpuConstants,
    Curve,
    DeviceConstants,
    DiskConstants,
    HostConstants,
    LinkDirection,
    NodeConstants,
)
from ...specs.machines.ranges import LEAST_TOGETHER
from ...specs.models.pass_shape import matmul_flops
from ..costs.forms import copy_form, dense_form, expert_form, head_form
from ..costs.surface import Form, Surface, cross_validate, fit_surface, nine_in_ten
from ..samples import Sample, SampleSet
from .all_to_all_fit import fit_exchanges
from .fit_runs import expert_row
from .grouped import LEAST_S, share_of_groups
from .rank_fit import fit_ranks

_FLAGGED_RATIO = 2.5
_MIN_POINTS_TO_FLAG = 6
# Where experts are too small for their bytes to matter, the fit cannot tell their bandwidth, and may say anything.
_LEAST_SHARE = 1e-3
_CPU_RUNTIME_BYTES = 0.0
HOST_PARTS = ("step", "layer", "kernel", "transfer")
# What a layer step that fetches waits for besides: from a submission to the first byte, from an arrival to its kernel,
# from one piece of a copy to the next; and what one guess about one later layer takes, where a model's own gates were run early.
_HANDOVERS = ("start", "wake", "piece", "guess")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFit:
    """How well one table predicts its own points when they are left out."""

    num_points: int
    median_error: float
    p90_error: float
    parameters: Mapping[str, float]
    flagged: tuple[str, ...]


class Fitter:
    """Collects tables and constants from one set of samples."""

    def __init__(self, samples: SampleSet) -> None:
        self.samples = samples
        self.is_gpu = samples.device.get("kind") == "cuda"
        self.units = float(samples.device.get("num_sms", 1))
        self.citation = f"calibration of {samples.device.get('name', 'this machine')} by {samples.produced_by}"
        self.curves: dict[str, Curve] = {}
        self.tables: dict[str, TableFit] = {}
        self.surfaces: dict[str, Surface] = {}

    def constant(self, value: float, uncertainty: float, what: str = "") -> Constant:
        """Return a measured constant."""
        citation = f"{self.citation}{': ' if what else ''}{what}"
        return Constant(
            value=float(value), source="measured", citation=citation, relative_uncertainty=float(uncertainty)
        )

    def table(self, name: str, form: Form, rows: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> Surface:
        """Fit a table, note how good it is, and keep its points as a curve."""
        columns = {axis: np.array([row[axis] for row in rows], float) for axis in rows[0]}
        times = np.array(seconds, float)
        keep = _usual(form, columns, times)
        flagged = tuple(
            ", ".join(f"{axis} {columns[axis][at]:g}" for axis in form.axes) for at in np.flatnonzero(~keep).tolist()
        )
        columns, times = {axis: column[keep] for axis, column in columns.items()}, times[keep]
        surface = fit_surface(name, form, columns, times)
        errors = cross_validate(name, form, columns, times)
        self.surfaces[name] = surface
        self.tables[name] = TableFit(
            num_points=len(times),
            median_error=float(np.median(errors)),
            p90_error=nine_in_ten(errors),
            parameters={key: surface.parameter(key) for key in form.parameters},
            flagged=flagged,
        )
        self.curves[name] = Curve(
            arguments={axis: tuple(column.tolist()) for axis, column in columns.items()},
            seconds=tuple(times.tolist()),
            relative_uncertainty=nine_in_ten(errors),
            citation=self.citation,
        )
        return surface

    # --- tables -----------------------------------------------------------------------------------------------------

    def expert_row(self, sample: Sample) -> dict[str, float]:
        """Return a sample's arguments with what the form needs besides."""
        return expert_row(sample, self.units)

    def experts(self) -> None:
        """Fit one expert's kernel, an expert's share of a grouped launch, and experts beside copies, by weight format."""
        form = expert_form(many_units=self.is_gpu)
        for bits in self.samples.values_of("expert", "bits"):
            found = self.samples.of("expert", bits=bits)
            self.table(f"expert.{bits}", form, [self.expert_row(s) for s in found], [s.median_s for s in found])
        for bits in self.samples.values_of("grouped", "bits"):
            shares, base = share_of_groups(self.samples.of("grouped", bits=bits))
            self.table(f"grouped_item.{bits}", form, [self.expert_row(s) for s, _ in shares], [t for _, t in shares])
            self.curves[f"grouped_base.{bits}"] = Curve(
                arguments={"experts": (0.0,)},
                seconds=(max(base, LEAST_S),),
                citation=self.citation,
                relative_uncertainty=self.curves[f"grouped_item.{bits}"].relative_uncertainty,
            )
        cpu = expert_form(many_units=False)
        for bits in self.samples.values_of("cpu_expert", "bits"):
            found = self.samples.of("cpu_expert", bits=bits)
            self.table(f"cpu_expert.{bits}", cpu, [self.expert_row(s) for s in found], [s.median_s for s in found])

    def dense(self) -> None:
        """Fit the dense part of a layer and the output matrix."""
        for kind, form in (("dense", dense_form()), ("head", head_form())):
            found = self.samples.of(kind)
            self.table(kind, form, [dict(s.arguments) for s in found], [s.median_s for s in found])

    def copies(self) -> dict[str, LinkDirection]:
        """Fit copies by direction and memory, the engine's cost of a piece included; return both directions' constants."""
        links = {}
        piece_s = host_cost(self.samples, "piece")
        for direction in ("h2d", "d2h"):
            rates = {}
            latency = 0.0
            uncertainty = 0.0
            for memory in ("pinned", "pageable"):
                found = self.samples.of("copy", direction=direction, memory=memory)
                if not found:
                    continue
                surface = self.table(
                    f"copy.{direction}.{memory}",
                    copy_form(),
                    [dict(s.arguments) for s in found],
                    [s.median_s + piece_s for s in found],
                )
                rates[memory] = surface.parameter("bandwidth")
                latency = max(latency, surface.parameter("latency_s"))
                uncertainty = max(uncertainty, self.curves[surface.name].relative_uncertainty)
            both = {memory: rates.get(memory, next(iter(rates.values()))) for memory in ("pinned", "pageable")}
            links[direction] = LinkDirection(
                pinned_bytes_per_s=self.constant(both["pinned"], uncertainty),
                pageable_bytes_per_s=self.constant(both["pageable"], uncertainty),
                latency_s=self.constant(latency, uncertainty),
                half_size_bytes=self.constant(0.0, 0.0, "the latency holds it"),
            )
        return links

    def contention(self) -> dict[str, Constant]:
        """Return how much of its speed each lane keeps while another one runs, and keep experts beside copies as tables."""
        found: dict[str, Constant] = {}
        ratios: dict[str, list[float]] = {}
        for kind, lane in (("expert", "compute"), ("cpu_expert", "cpu")):
            for companion in self.samples.values_of(f"{kind}_while", "companion"):
                for bits in self.samples.values_of(f"{kind}_while", "bits"):
                    mine = self.samples.of(f"{kind}_while", bits=bits, companion=companion)
                    pairs = [(s, _twin(self.samples.of(kind, bits=bits), s)) for s in mine]
                    rows = [
                        (self.expert_row(s), s.median_s / alone.median_s) for s, alone in pairs if alone is not None
                    ]
                    if not rows:
                        continue
                    ratios.setdefault(f"{lane}/{companion}", []).extend(1.0 / ratio for _, ratio in rows)
                    self.curves[f"slowdown.{lane}/{companion}.{bits}"] = Curve(
                        arguments={
                            axis: tuple(float(row[axis]) for row, _ in rows) for axis in ("tokens", "weight_bytes")
                        },
                        seconds=tuple(max(1.0, ratio) for _, ratio in rows),
                        relative_uncertainty=0.0,
                        citation=self.citation,
                    )
        for sample in self.samples.of("copy_while"):
            alone = _twin(
                self.samples.of("copy", direction=sample.labels["direction"], memory=sample.labels["memory"]), sample
            )
            if alone is not None:
                lane, companion = sample.labels["direction"], sample.labels["companion"].partition(" ")[0]
                ratios.setdefault(f"{lane}/{companion}", []).append(alone.median_s / sample.median_s)
        for pair, values in ratios.items():
            middle = float(np.median(values))
            spread = float(np.median(np.abs(np.array(values) / middle - 1)))
            found[pair] = self.constant(min(1.0, max(LEAST_TOGETHER, middle)), spread, f"median of {len(values)} pairs")
        return found

    # --- constants --------------------------------------------------------------------------------------------------

    def device(self) -> DeviceConstants:
        """Return the device's constants."""
        memory = self.samples.of("memory")
        products = self.samples.of("matmul")
        bandwidth = max(s.arguments["bytes"] / s.median_s for s in memory)
        peaks = {
            s.labels["dtype"]: matmul_flops(s.arguments["rows"], s.arguments["columns"], s.arguments["inner"])
            / s.median_s
            for s in products
        }
        plain = next(
            (self.surfaces[f"expert.{bits}"] for bits in ("16", "32") if f"expert.{bits}" in self.surfaces), None
        )
        reached = plain.parameter("bandwidth") if plain is not None else bandwidth
        uncertainty = {name: curve.relative_uncertainty for name, curve in self.curves.items()}
        expanded = {
            bits: self.constant(
                _share(self.surfaces[f"expert.{bits}"].parameter("bandwidth") / reached),
                uncertainty[f"expert.{bits}"],
            )
            for bits in ("8", "4", "3", "2")
            if f"expert.{bits}" in self.surfaces
        }
        start = plain.parameter("start_s") if plain is not None else LEAST_S
        shared = not self.is_gpu
        total = float(self.samples.device.get("memory_bytes", self.samples.device.get("memory_limit_bytes", 0)))
        return DeviceConstants(
            kind="gpu" if self.is_gpu else "cpu",
            memory_bytes=self.constant(total, 0.0, "as the system reports it"),
            runtime_bytes=self.constant(_CPU_RUNTIME_BYTES, 0.0, "memory limits count what is allocated"),
            memory_bytes_per_s=self.constant(
                bandwidth, 0.1, "a large copy inside device memory, bytes read plus written"
            ),
            memory_efficiency=self.constant(_share(reached / bandwidth), 0.1, "expert kernels against that copy"),
            peak_flops_per_s={
                name: self.constant(value, 0.1, "a large square product") for name, value in peaks.items()
            },
            compute_efficiency=self.constant(1.0, 0.1, "peaks are what products reach"),
            launch_s=self.constant(start, 0.5, "the constant part of an expert kernel"),
            dequantise_efficiency=expanded,
            host_shares_compute=shared,
        )

    def host(self) -> HostConstants:
        """Return the host's constants."""
        cpu = None
        name = next((n for n in ("cpu_expert.16", "cpu_expert.32") if n in self.surfaces), None)
        if name is not None:
            surface, wrong = self.surfaces[name], self.curves[name].relative_uncertainty
            cpu = CpuConstants(
                flops_per_s=self.constant(surface.parameter("rate"), wrong),
                memory_bytes_per_s=self.constant(surface.parameter("bandwidth"), wrong),
                launch_s=self.constant(surface.parameter("start_s"), wrong),
            )
        parts = {what: self._host(what) for what in HOST_PARTS}
        return HostConstants(
            memory_bytes=self.constant(self._host_memory_bytes(), 0.0, "as the system reports it"),
            per_step_s=parts["step"],
            per_layer_s=parts["layer"],
            per_kernel_s=parts["kernel"],
            per_transfer_s=parts["transfer"],
            kernels_per_dense_layer=self.constant(1.0, 0.0, "the dense part was measured as one activity"),
            kernels_per_head=self.constant(1.0, 0.0, "the output matrix was measured as one activity"),
            cpu=cpu,
        )

    def _host_memory_bytes(self) -> float:
        found = self.samples.device.get("host_memory_bytes")
        if not isinstance(found, (int, float)) or found <= 0:
            raise InputError("samples: device.host_memory_bytes", found, "not a number above zero", "measure again")
        return float(found)

    def _host(self, what: str) -> Constant:
        found = self.samples.of("host", what=what)
        return self.constant(found[0].midmean_s, min(1.0, found[0].spread), "the executor's own runs")

    def disk(self) -> DiskConstants | None:
        """Return the disk's constants, None where it was not measured."""
        found = self.samples.of("disk", cache="dropped") or self.samples.of("disk")
        if not found:
            return None
        sizes = np.array([sample.arguments["bytes"] for sample in found])
        # Means: reads follow each other, so slow ones add up. A disk's times are skewed, and the median would forget them.
        taken = np.array([float(np.mean(sample.seconds)) for sample in found])
        # Relative errors count: a small read is to be told as well as a large one. Neither term may be below zero.
        design = np.stack([1.0 / taken, sizes / taken], 1)
        if len(found) > 1 and np.ptp(sizes) > 0:
            start_s, per_byte_s = nnls(design, np.ones(len(found)))[0]
        else:
            start_s, per_byte_s = 0.0, float((taken / sizes).mean())
        per_byte_s = per_byte_s or float((taken / sizes).min())
        missed = float(np.abs((start_s + per_byte_s * sizes) / taken - 1).max())
        wrong = min(1.0, max(missed, *(sample.spread for sample in found)))
        return DiskConstants(
            read_bytes_per_s=self.constant(1 / per_byte_s, wrong),
            latency_s=self.constant(float(start_s), wrong, "from reads of two sizes"),
        )

    def handovers(self) -> None:
        """Keep what handing an expert over between threads costs."""
        for what in _HANDOVERS:
            found = self.samples.of("host", what=what)
            if found:
                self.curves[f"host.{what}"] = Curve(
                    arguments={"layer_steps": (1.0,)},
                    seconds=(found[0].midmean_s,),
                    relative_uncertainty=min(1.0, found[0].spread),
                    citation=self.citation,
                )

    def ranks(self) -> NodeConstants | None:
        """Return what ranks of this machine have between them by laws of their steps, and keep these; None where none were measured."""
        node = None
        for found in fit_ranks(self.samples, self.citation):
            self.curves |= found.curves
            for name, errors in found.errors.items():
                terms = {str(at): value for at, value in enumerate(found.curves[name].seconds)}
                self.tables[name] = TableFit(
                    num_points=len(errors), median_error=float(np.median(errors)), p90_error=nine_in_ten(errors),
                    parameters=terms, flagged=(),
                )  # fmt: skip
            node = found.node(self.citation)
        return node

    def exchanges(self, contention: dict[str, Constant]) -> NodeConstants | None:
        """Return what ranks of this machine have between them, and keep all-to-alls as tables; None where none were measured."""
        found = fit_exchanges(self.samples, self.citation)
        if found is None:
            return None
        self.curves |= found.curves
        for name, quality in found.quality.items():
            self.tables[name] = TableFit(
                num_points=quality.num_points,
                median_error=float(np.median(quality.errors)),
                p90_error=nine_in_ten(quality.errors),
                parameters=quality.parameters,
                flagged=(),
            )
        contention |= {pair: self.constant(speed, wrong) for pair, (speed, wrong) in found.speeds.items()}
        return NodeConstants(
            num_gpus=found.num_ranks,
            gpu_link_bytes_per_s=self.constant(
                found.bytes_per_s, found.relative_uncertainty, "large balanced exchanges"
            ),
            gpu_link_latency_s=self.constant(found.latency_s, found.relative_uncertainty),
        )


def _share(ratio: float) -> float:
    """Return a share of a ceiling as a profile may hold it."""
    return min(1.0, max(_LEAST_SHARE, ratio))


def host_cost(samples: SampleSet, what: str) -> float:
    """Return one of the executor's own overheads, 0 where it was not measured."""
    found = samples.of("host", what=what)
    return found[0].midmean_s if found else 0.0


def _twin(candidates: Sequence[Sample], sample: Sample) -> Sample | None:
    """Return the sample with the same arguments."""
    return next((other for other in candidates if dict(other.arguments) == dict(sample.arguments)), None)


def _usual(form: Form, columns: Mapping[str, Any], seconds: Any) -> Any:
    """Return which points are not far slower than the form that fits the others."""
    if len(seconds) < max(_MIN_POINTS_TO_FLAG, len(form.parameters) + 2):
        return np.ones(len(seconds), bool)
    surface = fit_surface("points", form, columns, seconds)
    expected = form.seconds(columns, surface.parameters)
    return seconds <= _FLAGGED_RATIO * expected
