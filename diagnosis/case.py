"""A run as its owner describes it becomes rows of a field report, and those what every prediction needs.

Modelled: machine, engine and model by name, weight format, where experts are, micro-batch, context, threads, requests together; one row
for decoding and one for prompts, predicted as public reports are (`papers.field`). What is changed of a case is predicted the same way.
Ignored: what was measured (`diagnose`), and where the case comes from (a command line, lines of a benchmark: `origin`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.units import GIB
from ..calibrate.imports.bench_line import BenchLine
from ..papers.field.machine import NotExpressible
from ..papers.field.own.machine import with_room
from ..papers.field.own.model import formats_of_line
from ..papers.field.predict import Predicted, predict_setup
from ..papers.field.rows import Report
from ..papers.field.setup import Setup, set_up_on
from ..sim.offload.simulate import Simulation
from ..specs.machines.compose import compose, host_bytes_per_s
from ..specs.machines.engines import load_engine
from ..specs.machines.parts import Parts
from ..specs.machines.profile import Profile
from ..specs.models import ModelSpec, WeightFormat

DECODE, PREFILL = "decode_tokens_per_s", "prefill_tokens_per_s"
METRICS = (DECODE, PREFILL)
CORES = ("cpu-moe", "n-cpu-moe", "gpu-experts")
"""Placements where card and cores share the experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way a model is run on a machine."""

    model: ModelSpec
    model_name: str
    """As it was asked for."""
    quant: str | None
    """Weight format as files are named; None: the checkpoint's, or the file's own."""
    parts: Parts | None
    """None: the machine is a profile."""
    profile: Profile
    """Of the parts under the engine, or the profile itself."""
    engine: str
    backend: str
    placement: Mapping[str, Any]
    """As field reports have it."""
    ubatch: int = 512
    kv_types: tuple[str, str] = ("f16", "f16")
    prompt: int = 512
    reply: int = 128
    depth: int = 0
    """Tokens of context before the prompt."""
    concurrency: int = 1
    context: int | None = None
    """Tokens of context that memory is kept for; None: what the requests need."""
    built: str | None = None
    """Month of the engine's build."""
    parallel: str | None = None
    """How several cards divide the model, as field reports have it; None: as the engine does of itself."""
    card_shares: tuple[float, ...] = ()
    """What share of it each takes; empty: by their memory."""
    threads: int | None = None
    """As told; there may be more of them than cores."""
    line: BenchLine | None = None
    """The measured line it is of: file size and format as that states them."""
    assumed: tuple[str, ...] = ()
    _kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def changed(self, **changes: Any) -> Case:
        """Return the case with fields changed; a change of parts composes the machine anew."""
        made = dataclasses.replace(self, **changes, _kept={})
        if "parts" in changes and made.parts is not None:
            made = dataclasses.replace(made, profile=machine_of(made.parts, made.engine, made.backend, made.built))
        return made

    @property
    def kind(self) -> str:
        """Where experts are."""
        return str(self.placement["kind"])

    @property
    def host_layers(self) -> int:
        """Layers whose experts are on the cores."""
        if self.kind in ("cpu-moe", "cpu"):
            return self.model.num_moe_layers
        if self.kind == "layers":  # the first ones stay off the card
            off = self.model.num_layers - int(self.placement["gpu_layers"])
            return sum(layer < off for layer in self.model.moe_layers)
        return int(self.placement.get("cpu_layers") or 0)

    @property
    def upload_tokens(self) -> int | None:
        """From how many tokens of a pass on experts of host memory are copied to the card; None: never."""
        if self.kind not in CORES or "prefill_compute" in self.placement:
            return None
        return load_engine(self.engine).upload_from(self.model.num_experts, self.model.top_k)

    def formats(self) -> tuple[ModelSpec, WeightFormat, WeightFormat]:
        """Return the model with its experts as stored, and how experts and the rest are stored."""
        if "formats" not in self._kept:
            line = self.line
            if line is None:
                line = BenchLine(
                    where="the command",
                    test="",
                    prompt_tokens=1,
                    generated_tokens=0,
                    tokens_per_s=1.0,
                    engine=self.engine,
                )
            self._kept["formats"] = formats_of_line(line, self.model, self.quant)
        found: tuple[ModelSpec, WeightFormat, WeightFormat] = self._kept["formats"]
        return found

    def row(self, metric: str, value: float = 1.0) -> dict[str, Any]:
        """Return one line of a file of field reports."""
        decodes = metric == DECODE
        context = self.depth + (self.prompt + self.reply // 2 if decodes else self.prompt // 2)
        keys, values = self.kv_types
        size = None if self.line is None else self.line.model_bytes
        return {
            "id": f"own-{'decode' if decodes else 'prefill'}", "rig": "own", "source": "own measurement", "date": self.built,
            "model": self.model_name, "quant": {"experts": self.quant, "dense": self.quant, "bits_per_weight": None, "file_bytes": size},
            "gpus": [], "host": {}, "disk": None, "engine": {"name": self.engine, "version": None, "backend": self.backend},
            "placement": {**self.placement, **self._division},
            "workload": {"prompt_tokens": self.prompt, "generated_tokens": self.reply, "context_tokens": max(1, context),
                         "batch": self.concurrency if decodes else 1, "ubatch": self.ubatch,
                         "kv_type": keys if keys == values else f"{keys}/{values}"},
            "metric": metric, "value": value, "assumed": list(self.assumed), "note": None,
        }  # fmt: skip

    @property
    def _division(self) -> dict[str, Any]:
        """How cards divide the model, as field reports have it."""
        told = {"parallel": self.parallel, "tensor_split": list(self.card_shares)}
        return {key: value for key, value in told.items() if value}

    def setup(self, metric: str) -> Setup:
        """Return what predicting a metric needs; raises InputError where that cannot be said."""
        if metric not in self._kept:
            model, experts, dense = self.formats()
            report = Report(id="own", row=self.row(metric), folder=Path())
            profile = with_room(self.profile, self.parts)
            rate = None if self.parts is None else host_bytes_per_s(self.parts)
            assumed: list[str] = []
            try:
                self._kept[metric] = set_up_on(report, model, profile, (experts, dense), assumed, host_bytes_per_s=rate)
            except NotExpressible as reason:
                raise InputError("placement", self.kind, str(reason), "describe another run") from None
        found: Setup = self._kept[metric]
        return found

    def predicted(self, metric: str) -> Predicted:
        """Return the prediction of a metric, made once; raises DoesNotFit where the host cannot hold the experts."""
        key = f"{metric} predicted"
        if key not in self._kept:
            self._kept[key] = predict_setup(self.setup(metric))
        found: Predicted = self._kept[key]
        return found

    def speed(self, metric: str) -> float:
        """Return the tokens per second that are predicted."""
        return float(self.predicted(metric).value or 0.0)

    def memory(self) -> Simulation:
        """Return the simulation that says what fits the card and the host, at the context that memory is kept for."""
        if "memory" not in self._kept:
            setup = self.setup(DECODE)
            longest = int(setup.trace.position.max()) + 1
            wanted = self.context or self.depth + self.prompt + self.reply
            self._kept["memory"] = Simulation(
                model=setup.model, profile=self.profile, trace=setup.trace, dense_format=setup.dense_format,
                kv_bytes_per_value=setup.kv_bytes_per_value, context_tokens=max(longest, wanted), upload_tokens=self.upload_tokens,
                split=setup.split, layers_off=setup.layers_off,
            )  # fmt: skip
        found: Simulation = self._kept["memory"]
        return found

    @property
    def host_memory_bytes(self) -> float | None:
        """The host's memory, None where nobody says."""
        if (
            self.parts is not None
            and not self.parts.unified_memory
            and (self.parts.memory is None or self.parts.memory.capacity_bytes is None)
        ):
            return None
        return self.profile.host.memory_bytes.value


def machine_of(parts: Parts, engine: str, backend: str, built: str | None) -> Profile:
    """Return the machine of some parts under an engine."""
    return compose(parts, load_engine(engine), backend, built=built)


def described_machine(parts: Parts) -> dict[str, Any]:
    """Return the keys of a field report that say what a machine consists of; raises InputError for a card outside the catalogue."""
    from ..specs.machines.catalogue import known_gpu

    gpu, memory = parts.gpu, parts.memory
    if gpu is not None and known_gpu(gpu.name) is None:
        raise InputError(
            "--share", gpu.name, "reports name cards of the catalogue", "name the card (moeplan machine --list gpus)"
        )
    cards = [] if gpu is None else [
        {"name": gpu.name, "memory_gib": gpu.memory_bytes / GIB, "count": 1, "pcie": parts.pcie}
    ]  # fmt: skip
    host = {
        "cpu": None if parts.cpu is None else parts.cpu.name, "sockets": parts.sockets, "cores": None,
        "memory": None if memory is None else f"{memory.kind.upper()}-{memory.mt_per_s}",
        "channels": None if memory is None else memory.channels,
        "memory_gib": None if memory is None or memory.capacity_bytes is None else memory.capacity_bytes / GIB,
        "measured_bytes_per_s": None,
    }  # fmt: skip
    disk = None if parts.disk_bytes_per_s is None else {"read_bytes_per_s": parts.disk_bytes_per_s}
    note = None if parts.threads is None else f"{parts.threads} threads"
    return {"gpus": cards, "host": host, "disk": disk, "note": note}
