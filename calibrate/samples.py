"""Raw measurements of a machine, and the file they are kept in.

    {"schema_version": 1, "kind": "samples", "device": {...}, "conditions": {...}, "warnings": [...],
     "samples": [{"kind": "expert", "labels": {"bits": "16"}, "arguments": {"tokens": 4, ...}, "seconds": [...], "passes": [4, 4, 4]}, ...]}

Modelled: every repetition of every measurement, with what was measured, in which passes and under which conditions, so that a
fit can be redone without the machine. A machine that others use too is slow for seconds or minutes at a time; where there are
several passes, figures are medians over passes, so that a slow one does not count. Plain JSON, checked by plain code, because the
machine that measures may have nothing else. Ignored: what the numbers mean (`fit`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..base import plain_json
from ..base.errors import InputError
from ..base.text_files import read_text
from ..base.version import __version__
from .all_to_all_matrices import matrix_from_text

SCHEMA_VERSION = 1
# Passes, and repetitions in each, from which on figures are medians over passes: fewer do not show which pass is the odd one.
_LEAST_PASSES, _LEAST_IN_PASS = 3, 3
MAX_FILE_BYTES = 256 * 2**20
COLUMNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # kind: (labels, arguments)
    "expert": (("bits",), ("tokens", "hidden", "intermediate", "gated")),
    "grouped": (("bits",), ("tokens", "experts", "hidden", "intermediate", "gated")),
    "expert_while": (("bits", "companion"), ("tokens", "hidden", "intermediate", "gated")),
    "dense": (
        (),
        ("tokens", "context", "requests", "weight_bytes", "flops", "kv_bytes", "attention_flops", "value_bytes"),
    ),
    "head": ((), ("tokens", "weight_bytes", "flops", "value_bytes")),
    "copy": (("direction", "memory"), ("bytes",)),
    "copy_piece": (("direction", "memory"), ("bytes", "pieces")),
    "copy_while": (("direction", "memory", "companion"), ("bytes",)),
    "disk": (("cache",), ("bytes",)),
    "cpu_expert": (("bits",), ("tokens", "hidden", "intermediate", "gated")),
    "cpu_expert_while": (("bits", "companion"), ("tokens", "hidden", "intermediate", "gated")),
    "host": (("what",), ()),
    "run_expert": (
        ("bits", "cache", "stream", "state", "beside"),
        ("tokens", "hidden", "intermediate", "gated", "experts"),
    ),
    "run_grouped": (
        ("bits", "cache", "stream", "beside"),
        ("tokens", "hidden", "intermediate", "gated", "experts", "fresh", "ahead"),
    ),
    "run_dense": (
        ("bits", "cache", "stream", "beside"),
        ("tokens", "context", "requests", "weight_bytes", "flops", "kv_bytes", "attention_flops", "value_bytes"),
    ),
    "run_head": (("bits", "cache", "stream", "beside"), ("tokens", "weight_bytes", "flops", "value_bytes")),
    "run_copy": (("bits", "cache", "stream", "direction", "beside"), ("bytes", "experts")),
    "memory": ((), ("bytes",)),
    "matmul": (("dtype",), ("rows", "columns", "inner")),
    "all_to_all": (("backend", "pattern", "companion"), ("ranks", "bytes")),
    "rank_product": (("backend", "companion"), ("ranks", "computing", "bytes")),
    "rank_stage": (("what", "shape", "features"), ("ranks", "nodes", "tokens")),
    "rank_fact": (("what",), ("ranks", "nodes")),
    "layer_experts": (("kernel",), ("rows", "experts", "launches", "share")),
    "layer_beside": (("what",), ("rows", "experts", "bytes")),
}
"""What each kind of sample must say. Experts of a run: how many a layer step uses, on average, rounded; of a grouped launch in a run: how
many it computes, of which so many were fresh or ahead, with so many tokens together.
Bytes of an all-to-all: the larger of what the busiest rank sends to the others and receives from them; a label `matrix`, where
there is one, holds the bytes from each rank to each. A rank's product: of `ranks` ranks so many were computing. A layer's
experts: with so many rows each, in so many launches, on a share of the multiprocessors; beside copies of so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement, repeated."""

    kind: str
    labels: Mapping[str, str]
    arguments: Mapping[str, float]
    seconds: tuple[float, ...]
    passes: tuple[int, ...] = ()
    """How many of the repetitions each pass made, one after the other; empty: all in one."""

    def __post_init__(self) -> None:
        check_sample(self)

    @property
    def median_s(self) -> float:
        """Median over the repetitions; of several passes, that of their medians."""
        return self._over_passes(np.median)

    @property
    def midmean_s(self) -> float:
        """Mean of the middle half: like the median, but between two heaps where their weights say; of several passes, the median."""
        return self._over_passes(_midmean)

    @property
    def mean_s(self) -> float:
        """Mean of all; of several passes, the median of theirs."""
        return self._over_passes(np.mean)

    def lap_medians(self) -> list[float] | None:
        """Return the median of each pass; None where there are too few passes, or too few repetitions in one."""
        return [float(np.median(seconds)) for seconds in self._passes()] if self._has_passes else None

    def _over_passes(self, figure: Callable[[Sequence[float]], Any]) -> float:
        return float(
            np.median([figure(seconds) for seconds in self._passes()]) if self._has_passes else figure(self.seconds)
        )

    @property
    def _has_passes(self) -> bool:
        return len(self.passes) >= _LEAST_PASSES and min(self.passes) >= _LEAST_IN_PASS

    def _passes(self) -> list[tuple[float, ...]]:
        ends = np.cumsum(self.passes).tolist()
        return [self.seconds[end - count : end] for end, count in zip(ends, self.passes, strict=True)]

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / self.median_s

    @property
    def standard_error(self) -> float:
        """Relative standard error of the median, estimated from the quartiles as for normal noise."""
        return 1.2533 * self.spread / 1.349 / math.sqrt(len(self.seconds))  # √(π/2) · IQR/1.349 / √n


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """Everything measured in one calibration."""

    device: Mapping[str, Any]
    conditions: Mapping[str, Any]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()
    model: str | None = None
    quick: bool = False
    produced_by: str = field(default=f"moeplan {__version__}")

    def of(self, kind: str, **labels: str) -> list[Sample]:
        """Return the samples of a kind whose labels are as given."""
        return [
            sample
            for sample in self.samples
            if sample.kind == kind and all(sample.labels.get(name) == value for name, value in labels.items())
        ]

    def values_of(self, kind: str, label: str) -> list[str]:
        """Return the distinct values of a label among samples of a kind, in order of appearance."""
        return list(dict.fromkeys(sample.labels[label] for sample in self.samples if sample.kind == kind))

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


def merge(sets: Iterable[SampleSet]) -> SampleSet:
    """Return one set in which repetitions of the same measurement stand together, each former sample a pass.

    Raises InputError for sets of different devices.
    """
    parts = list(sets)
    if not parts:
        raise InputError("samples", "none", "nothing to merge", "measure first")
    names = {str(part.device.get("name")) for part in parts}
    if len(names) > 1:
        raise InputError("device", sorted(names), "samples of different devices", "fit each device on its own")
    return SampleSet(
        device=parts[0].device,
        conditions=parts[0].conditions,
        samples=once_each(sample for part in parts for sample in part),
        model=parts[0].model,
        quick=parts[0].quick,
        warnings=tuple(dict.fromkeys(warning for part in parts for warning in part.warnings)),
    )


def once_each(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return samples in which repetitions of the same measurement stand together, each of `samples` a pass or several."""
    found: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        key = (sample.kind, tuple(sorted(sample.labels.items())), tuple(sorted(sample.arguments.items())))
        found.setdefault(key, []).append(sample)
    return tuple(together(of_one) for of_one in found.values())


def together(samples: Sequence[Sample]) -> Sample:
    """Return the repetitions of one measurement in one sample, each of `samples` a pass or several."""
    if len(samples) == 1:
        return samples[0]
    seconds = tuple(value for sample in samples for value in sample.seconds)
    passes = tuple(count for sample in samples for count in sample.passes or (len(sample.seconds),))
    return dataclasses.replace(samples[0], seconds=seconds, passes=passes)


def _midmean(values: Sequence[float]) -> float:
    if len(values) < 3:  # two have no middle half
        return float(np.mean(values))
    low, high = np.percentile(values, [25, 75])
    return float(np.mean([value for value in values if low <= value <= high]))


def check_sample(sample: Sample) -> None:
    """Return nothing; raises InputError for an unknown kind, an absent column or a time that is not one."""
    columns = COLUMNS.get(sample.kind)
    if columns is None:
        raise InputError("samples: kind", sample.kind, f"one of {', '.join(COLUMNS)}", "measure with this version")
    for names, given, what in ((columns[0], sample.labels, "label"), (columns[1], sample.arguments, "argument")):
        for name in names:
            if name not in given:
                raise InputError(f"samples: {sample.kind}.{name}", "(absent)", f"a {what} is missing", "measure again")
    for name, value in sample.arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise InputError(
                f"samples: {sample.kind}.{name}", value, "not a finite number of at least zero", "measure again"
            )
    if sample.kind == "all_to_all" and "matrix" in sample.labels:
        matrix_from_text(sample.labels["matrix"], int(sample.arguments["ranks"]))
    if not sample.seconds:
        raise InputError(f"samples: {sample.kind}.seconds", [], "no repetitions", "measure again")
    for value in sample.seconds:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise InputError(f"samples: {sample.kind}.seconds", value, "not a finite time above zero", "measure again")
    for count in sample.passes:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"samples: {sample.kind}.passes", count, "not a whole number above zero", "measure again")
    if sample.passes and sum(sample.passes) != len(sample.seconds):
        rule = f"they add up to {sum(sample.passes)} of {len(sample.seconds)} repetitions"
        raise InputError(f"samples: {sample.kind}.passes", list(sample.passes), rule, "measure again")


# --- files ------------------------------------------------------------------------------------------------------------


def samples_to_json(found: SampleSet) -> str:
    """Return the samples as JSON text, one sample a line."""
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "samples",
        "produced_by": found.produced_by,
        "model": found.model,
        "quick": found.quick,
        "device": dict(found.device),
        "conditions": dict(found.conditions),
        "warnings": list(found.warnings),
    }
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    lines = [json.dumps(sample_to_dict(sample), ensure_ascii=False, allow_nan=False) for sample in found]
    return text[: text.rindex("\n}")] + ',\n "samples": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def samples_from_json(text: str, where: str = "samples") -> SampleSet:
    """Return the samples that `text` holds; raises InputError, naming field and rule, for anything that is not such a file."""
    try:
        data = plain_json.parse(text)
    except ValueError as error:
        raise InputError(where, "(text)", str(error), "measure again") from None
    if not isinstance(data, dict) or data.get("kind") != "samples":
        raise InputError(where, "(text)", "not a file of samples", "give the file that calibrate wrote")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version",
            data.get("schema_version"),
            f"this version reads {SCHEMA_VERSION}",
            "measure again",
        )
    for name, kind in (("device", dict), ("conditions", dict), ("samples", list), ("warnings", list)):
        if not isinstance(data.get(name), kind):
            raise InputError(f"{where}: {name}", data.get(name), "absent or of the wrong type", "measure again")
    samples = [sample_from_dict(row, f"{where}: samples[{at}]") for at, row in enumerate(data["samples"])]
    return SampleSet(
        device=data["device"],
        conditions=data["conditions"],
        samples=tuple(samples),
        model=data.get("model"),
        quick=bool(data.get("quick")),
        warnings=tuple(str(w) for w in data["warnings"]),
        produced_by=str(data.get("produced_by")),
    )


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """Return a sample as plain values."""
    found: dict[str, Any] = {
        "kind": sample.kind,
        "labels": dict(sample.labels),
        "arguments": dict(sample.arguments),
        "seconds": list(sample.seconds),
    }
    return found | ({"passes": list(sample.passes)} if sample.passes else {})


def sample_from_dict(row: Any, where: str) -> Sample:
    """Return the sample that plain values describe; raises InputError for anything else."""
    parts = ("kind", str), ("labels", dict), ("arguments", dict), ("seconds", list)
    if not isinstance(row, dict) or any(not isinstance(row.get(name), kind) for name, kind in parts):
        raise InputError(where, row, "needs kind, labels, arguments and seconds", "measure again")
    passes = row.get("passes", row.get("laps", []))  # "laps": as older versions wrote it
    if not isinstance(passes, list):
        raise InputError(f"{where}: passes", passes, "not a list", "measure again")
    return Sample(
        kind=row["kind"],
        labels=row["labels"],
        arguments=row["arguments"],
        seconds=tuple(row["seconds"]),
        passes=tuple(passes),
    )


def read_samples(path: str | os.PathLike[str]) -> SampleSet:
    """Return the samples in a file; raises InputError for one that is absent, too large or not of this form."""
    return samples_from_json(read_text(path, "samples", MAX_FILE_BYTES), os.fspath(path))
