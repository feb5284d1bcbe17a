"""Serving engines: how each uses a machine's parts, as facts from its source and as constants fitted on public reports.

Modelled: an engine on a backend has a share of every peak and a fixed time a layer; most are those of a generic engine of
that backend times a factor of its own, and few factors are fitted (`python -m benchmarks.fits.engines`). Facts that are
written down rather than fitted: from how many tokens on experts in host memory are copied to the device, up to how many
tokens kernels only stream weights, what an engine cannot do. Ignored: versions between those named.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any

from ...base.errors import InputError, UnknownName
from ..catalog import ENGINES_FOLDER
from .profile import DELTA_KERNELS, Constant, Profile

BACKENDS = ("cuda", "rocm", "vulkan", "sycl", "metal", "cpu")
GENERIC = "generic"
FUSED = 0.85
"""Kernels' time of builds that merge some of them, over what constants are of, which are of both sorts: two steps of 4 to 8 % of a token's
time each (pull requests 16130 and 16991 of llama.cpp)."""
_FIRST = re.compile(r"20[0-9]{2}(?:-[01][0-9])?")
LAUNCHES = ("graph", "eager", "python")
PRODUCTS = ("peak", "units")
_HOST_PACED = {"sycl": "2026-06"}
"""Backends whose host waits for each layer's choice and asks for its experts one at a time, as loops in Python do: a B70 under SYCL decodes
Qwen3-Coder-30B-A3B at 17 tokens/s (issue 22413 of llama.cpp), three times slower than under Vulkan (issue 26010). Builds from that month on
no longer do: 93 tokens/s of Qwen3-30B-A3B on the same card (build 9739)."""
DELTA_APART = 110
"""Kernels of a mixer with a delta rule whose rule is a product, a sum and a scale at a time: what a layer took longer in builds of November
2025 to February 2026 (Qwen3-Next on one Ryzen AI Max under Vulkan, on two cards under CUDA: 190 and 87 kernels)."""
UNSORTED = 1.7
"""Time of an expert's products in a prompt where its tokens are looked up by every workgroup, over that where they are sorted first:
models on cards of AMD under ROCm before and after pull request 15525 of llama.cpp, under Vulkan before and after 15524 and 18352."""
LARGE_CARD_BYTES = 70 << 30
UNTUNED_LAYER_S, UNTUNED_UNCERTAINTY = 700e-6, 1.0
"""What a layer takes on top on cards that an engine has no kernels for: vLLM on four MI50 560 us, on a Ryzen AI Max 650 us with 16-bit
weights and 2,500 with AWQ's, on two B70 750 (pull request 43 of vllm-gfx906, 968 of ROCm's vLLM, issue 72 of kyuz0's toolboxes, issue
41663 of vLLM)."""
_OTHER_BACKEND = 1.0
"""How much further off a backend without reports may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine, as far as predictions depend on it."""

    name: str
    summary: str
    checked: str
    """Versions or dates that the facts below were read from."""
    backends: tuple[str, ...]
    """The first is the one taken where a machine allows several."""
    matvec_tokens: int = 8
    launches: str = "graph"
    """How kernels of a decoding step are launched: as one graph, one by one (eager), or one by one from Python."""
    eager_before: str | None = None
    """Builds before that month (2025-10) launched one by one."""
    fused_since: str | None = None
    """From that month on builds merge kernels of a layer (router's choice, gates, rotation with cache writes) on CUDA and ROCm."""
    delta_merged_since: str | None = None
    """From that month on builds compute a delta rule (linear attention) as one operation."""
    delta_launches: int = DELTA_KERNELS
    """Kernels of a mixer with a delta rule where the rule is one operation."""
    delta_serial: bool = False
    """A prompt's delta rule goes token by token, in one kernel of few instructions a clock, not in blocks of matrix products."""
    prompts_since: Mapping[str, str] = field(default_factory=dict)
    """By backend, the month from which on builds sort a prompt's tokens by expert before they multiply."""
    prompt_chunks: tuple[int, int] = (512, 512)
    """Tokens of a prompt's pass where the engine is told nothing: on a card of less than `LARGE_CARD_BYTES`, and on others."""
    kernels_for: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By backend, the generations of cards that it has kernels of its own for, where not for all: others run what compilers make of
    kernels for them, each layer with `UNTUNED_LAYER_S` on top."""
    copies: str = "pinned"
    """From what memory experts are copied: page-locked (pinned), or ordinary (pageable), which the driver stages."""
    pageable_before: str | None = None
    """Builds before that month copied experts from ordinary memory."""
    products: str = "peak"
    """What limits large products: the card's 16-bit peak, or (units) what each multiprocessor does with 8-bit blocks and their scales,
    which is much the same from generation to generation."""
    products_reported: bool = True
    """Whether reports of speeds say what its large products reach; where not, those of other kernels say nothing of them either, and shares
    are those that the fit starts from."""
    upload_tokens: int | None = None
    """Passes of at least so many tokens copy experts that lie in host memory to the device."""
    upload_tokens_per_share: int | None = None
    """As above, times the number of experts over those chosen: the engine weighs tokens of an expert."""
    cores_attention: float = 0.45
    """On cores alone, the rate of products with keys and values of heads 128 wide over that of products with weights; in between of those
    that are known where it is not."""
    codebooks: tuple[float, float] = (2.5, 2.7)
    """How many times longer cores take for formats with codebooks than for others, of prompts and of decoding steps."""
    repacks_on: tuple[str, ...] = ()
    """Vector units of cores for which it lays out some formats' blocks anew when it runs on cores alone (`is_repacked`)."""
    one_writer: bool = False
    """Uploads to several cards pass buffers that one process fills."""
    steps_ahead: bool = False
    """The host prepares a step while the one before runs, so that no time passes between them."""
    follows_over_cards: bool = False
    """Passes of a prompt follow each other over cards that hold layers: as many are under way as there are cards."""
    input_copies: int = 1
    """How many times each card keeps the inputs of a pass where every layer lies on cards, one after another."""
    split: str = "layer"
    """What it does with several cards when it is told nothing: layers over cards, or a slice of every layer on each (tensor)."""
    memory_share: float = 1.0
    """How much of a card's memory it fills when it is told nothing (`SERVED_SHARE`)."""
    whole_layers: bool = False
    """It leaves whole layers off the card, attention included, never experts alone, and chooses how many itself."""
    gguf: bool = False
    """It reads models from GGUF files, which store all matrices in formats of their own, not those of the checkpoint."""
    memory_layout: str = "plain"
    """Where it puts what it holds: `plain`, or one of the names in `memory.LAYOUTS`."""
    offload: tuple[str, ...] = ()
    """Presets that describe what it can do with experts that are not on the card; empty: everything must fit."""
    cannot: tuple[str, ...] = ()
    source: str = ""

    fetches_on_card: bool = False
    """Misses of a cache are asked for by kernels within the step, which read page-locked memory over the link: no host between."""

    def to_dict(self) -> dict[str, Any]:
        """Return the engine's facts as plain values."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    def launched(self, built: str | None, backend: str) -> str:
        """Return how a build of month `built` launches kernels; an unknown month counts as one of the versions that were checked."""
        early = built is not None and self.eager_before is not None and built < self.eager_before
        if backend in _HOST_PACED:
            return "python" if built is not None and built < _HOST_PACED[backend] else "eager"
        return LAUNCHES[max(LAUNCHES.index(self.launches), int(early))]

    def earlier(self, built: str | None) -> bool:
        """Return whether a build of month `built` is from before any version that was looked at, where those are known by their months."""
        first = _FIRST.search(self.checked)
        return built is not None and first is not None and built[: len(first[0])] < first[0][: len(built)]

    def kernels_left(self, built: str | None, backend: str) -> float:
        """Return how many kernels a layer of a build has, over those of the versions that constants are of, where its month says so."""
        if built is None or self.fused_since is None or backend not in ("cuda", "rocm"):
            return 1.0
        return FUSED if built >= self.fused_since else 1 / FUSED

    def delta_kernels(self, built: str | None) -> int:
        """Return how many kernels a mixer with a delta rule has in a build of month `built`; an unknown month counts as a late one."""
        return DELTA_APART if self.delta_apart(built) else self.delta_launches

    def delta_apart(self, built: str | None) -> bool:
        """Return whether a build of month `built` computes a delta rule as operations of their own."""
        return built is not None and self.delta_merged_since is not None and built < self.delta_merged_since

    def unsorted(self, built: str | None, backend: str) -> bool:
        """Return whether a build of month `built` looks an expert's tokens up in every workgroup of a prompt's products."""
        return built is not None and built < self.prompts_since.get(backend, "")

    def untuned(self, backend: str, architecture: str | None) -> bool:
        """Return whether the engine has no kernels of its own for a generation of cards."""
        known = self.kernels_for.get(backend)
        return (known is not None and architecture not in known) or backend not in self.backends

    def prompt_chunk(self, memory_bytes: float) -> int:
        """Return how many tokens of a prompt pass at once on a card of `memory_bytes`, where the engine is told nothing."""
        return self.prompt_chunks[int(memory_bytes >= LARGE_CARD_BYTES)]

    def copies_pageable(self, built: str | None) -> bool:
        """Return whether a build of month `built` copies experts from ordinary memory."""
        early = built is not None and self.pageable_before is not None and built < self.pageable_before
        return early or self.copies == "pageable"

    def upload_from(self, num_experts: int, top_k: int) -> int | None:
        """Return from how many tokens of a pass on experts in host memory are copied to the device; None: never."""
        if self.upload_tokens_per_share is not None:
            return -(-self.upload_tokens_per_share * num_experts // top_k)
        return self.upload_tokens


_FACTOR, _ROW = 0.25, 0.15
"""How far engines lie from a generic one, and reports of one machine from each other (logarithms, as the fit has them)."""
_OTHER_GENERATION = 0.3
"""How much further off a card of a generation without reports may be."""
_OF_MACHINES = ("upload_share",)
"""What engines have no part in."""
_PRODUCTS = ("dense_efficiency", "expert_efficiency", "attention_efficiency")
_SEVERAL_CARDS = 1.3
"""How much further off predictions of several cards may be: so wide, intervals hold four in five reports of them, never fitted."""
_OF_GENERATIONS = (
    "memory_efficiency",
    "graph_kernel_s",
    "dense_efficiency",
    "expert_efficiency",
    "attention_efficiency",
)
_OF_CARDS = (
    *_OF_GENERATIONS, "unit_bytes_per_cycle", "kv_efficiency", "eager_kernel_s", "python_kernel_s", "pass_layer_s", "tile_tokens",
    "upload_share",
)  # fmt: skip


SERVED_SHARE = 0.9
"""Share of a card's memory that serving engines fill of themselves: vLLM's gpu_memory_utilization, TensorRT-LLM's
free_gpu_memory_fraction; SGLang's mem_fraction_static comes to 0.83 to 0.9 of H100, H200 and B200, activations and graphs aside, which
are counted apart here (server_args.py, 2025)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRates:
    """Fitted constants of one engine on one backend, by name."""

    constants: Mapping[str, Constant]

    def __getitem__(self, name: str) -> Constant:
        """Return the constant called `name`."""
        return self.constants[name]


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


@cache
def engines() -> Mapping[str, Engine]:
    """Return the bundled engines by name, the generic one last."""
    rows: dict[str, Any] = json.loads((ENGINES_FOLDER / "engines.json").read_text(encoding="utf-8"))
    found = {}
    for name, row in rows.items():
        values: dict[str, Any] = {key: _frozen(value) for key, value in row.items()}
        found[name] = Engine(name=name, **values)
    return MappingProxyType(found)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(each) for key, each in value.items()})
    return tuple(value) if isinstance(value, list) else value


def load_engine(name: str) -> Engine:
    """Return the engine called `name`; raises UnknownName with the nearest one."""
    found = engines().get(name.lower())
    if found is None:
        raise UnknownName("engine", name, engines())
    return found


def prompt_chunk_on(profile: Profile) -> int | None:
    """Return how many tokens of a prompt pass at once on a machine where nobody says: as its engine has it, or the one whose kernels it
    has; None where a machine stands for other software.
    """
    name = (
        profile.engine.name
        if profile.engine is not None
        else None
        if profile.kernels is None
        else profile.kernels.engine
    )
    return None if name is None else load_engine(name).prompt_chunk(profile.device.memory_bytes.value)


def choose_backend(engine: Engine, backend: str | None, default: str) -> str:
    """Return the backend to take: the one asked for, else the device's own where the engine has it, else the engine's first.

    Raises InputError for a backend that the engine does not have.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise UnknownName("backend", backend, BACKENDS)
        if backend not in engine.backends:
            raise InputError(
                "backend", backend, f"{engine.name} runs on {', '.join(engine.backends)}", "choose one of these"
            )
        return backend
    if default in engine.backends:
        return default
    if default == "rocm" and "vulkan" in engine.backends:
        return "vulkan"
    if default != "cpu" and "cpu" in engine.backends and len(engine.backends) == 1:
        return "cpu"
    raise InputError("engine", engine.name, f"it has no {default} backend", f"it runs on {', '.join(engine.backends)}")


def rates(
    engine: str, backend: str, table: Mapping[str, Any] | None = None, architecture: str | None = None, maker: str | None = None,
    *, earlier: bool = False, several: bool = False,
) -> EngineRates:  # fmt: skip
    """Return the fitted constants of `engine` on `backend`: the generic ones times its factors, where it has any.

    Of an engine that few machines' reports are of, all constants are less certain; `earlier`: so are those of a build from before any
    version that was looked at; `several`: and those of one of several cards. table: constants in place of the bundled ones, as
    `specs/catalog/engines/fitted.json` has them. architecture: of the card; what kernels reach on one that no report is of is less
    certain. maker: the backend of its maker.
    """
    table = fitted_table() if table is None else table
    values = {name: dict(row) for name, row in table["generic"].items()}
    for name, row in values.items():
        for owner in factor_owners(engine, backend, maker, name):
            row["value"] *= table["factors"].get(owner, {}).get(name, 1.0)
    mine = f"{engine}/{backend}" in table["factors"]
    where = (
        f"of {engine} on {backend}" if mine else f"of a generic engine on {backend}: {engine} has no rows of its own"
    )
    citation = f"{table['citation']}, {where}"
    if not load_engine(engine).products_reported:
        for name in _PRODUCTS:
            values[name]["value"] = table["start"][name]
    machines = 0 if earlier else table.get("machines", {}).get(f"{engine}/{backend}", 0)
    if earlier:
        citation = f"{citation}; an earlier build than any that was looked at"
    for name, row in values.items():
        row["uncertainty"] *= 1.0 if name in _OF_MACHINES else unfamiliarity(machines)
        row["uncertainty"] *= _SEVERAL_CARDS if several and name in _OF_CARDS else 1.0
    if architecture is not None and architecture not in table.get("architectures", (architecture,)):
        citation = f"{citation}; no report is of this generation of cards"
        for name in _OF_GENERATIONS:
            values[name]["uncertainty"] = math.hypot(values[name]["uncertainty"], _OTHER_GENERATION)
    if backend in _HOST_PACED and machines == 0:
        citation = f"{citation}; no report is of this engine on this backend"
        for name in (*_OF_GENERATIONS, "python_kernel_s"):
            values[name]["uncertainty"] = math.hypot(values[name]["uncertainty"], _OTHER_BACKEND)
    return EngineRates(
        constants={
            name: Constant(
                value=_capped(name, row["value"]), source="published", citation=citation,
                relative_uncertainty=row["uncertainty"],
            )
            for name, row in values.items()
        }
    )  # fmt: skip


def unfamiliarity(machines: int) -> float:
    """Return how many times further off an engine may be that so many machines' reports are of than one that very many are of.

    Its factors are drawn to those of a generic engine by as much as engines differ and reports scatter.
    """
    ratio = (_FACTOR / _ROW) ** 2
    return math.sqrt(1.0 + ratio / (1.0 + machines * ratio))


def scatter(table: Mapping[str, Any] | None, *, sockets: int, known: bool) -> float:
    """Return how many times further off the rate at which a host reads experts is than that of one known processor: of several sockets,
    where nothing says on which one weights lie, and of processors that are assumed.
    """
    found = (fitted_table() if table is None else table).get("scatter", {})
    return float((found.get("sockets", 1.0) if sockets > 1 else 1.0) * (1.0 if known else found.get("unknown", 1.0)))


def factor_owners(engine: str, backend: str, maker: str | None, name: str) -> tuple[str, str]:
    """Return whose factors count for the constant called `name`: those of all engines on the backend, and the engine's own.

    NVIDIA's driver gives Vulkan matrices of a whole workgroup (NV_cooperative_matrix2), with which products go as they do under CUDA.
    """
    if backend == "vulkan" and maker == "cuda" and name in _PRODUCTS:
        backend = maker
    return f"*/{backend}", f"{engine}/{backend}"


def parameter_names() -> tuple[str, ...]:
    """Return the names of the fitted constants."""
    return tuple(fitted_table()["generic"])


def _capped(name: str, value: float) -> float:
    """Return a share that a factor pushed above one as one."""
    return min(value, 1.0) if name.endswith(("_efficiency", "_share")) else value


@cache
def fitted_table() -> Mapping[str, Any]:
    """Return the bundled constants: `generic` by name, `factors` by engine/backend."""
    table: dict[str, Any] = json.loads((ENGINES_FOLDER / "fitted.json").read_text(encoding="utf-8"))
    return table
