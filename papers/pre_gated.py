"""Pre-gated MoE (ISCA 2024, arXiv 2308.12066): block latency, throughput and memory of Switch Transformers on one A100.

Modelled: Switch-Base with 8, 64 and 128 experts and Switch-Large with 128 in 32-bit floats, batch 1, 256 tokens in and 256 out,
routed experts in every second layer; MoE-OnDemand (an expert is fetched after its gate), MoE-Prefetch (every expert of the next
block is), Pre-gated (the chosen expert of the next block is). The first block's chosen expert is fetched inline in every mode.
tokens/s is generated tokens over the whole time, encoder included, and the encoder is on demand in every mode. A block is what
repeats: a layer with experts and the one without before it.

One constant is fitted, to the mean tokens/s of the Base models: what the host adds to a block (synchronisation, launches,
handing over buffers) beyond the profile. It leaves the measured transfers of 25 GB/s alone (PCIe 4 x16 on an A100, ZaidQureshi/bam
issue 54; the bundled profile's rate was read off another paper). Routing is synthetic and follows no publication; at batch 1
nothing of the decoder depends on it, and of the encoder only how many experts its 256 tokens use. Ignored: attention to the
encoder's output (256 keys), what an engine pays once a request.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import scipy.optimize

from ..base.units import GIGA, MS_PER_S
from ..sim.offload.simulate import Prediction, Simulation
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import load_hardware
from ..specs.models import ModelSpec, weight_format
from ..specs.models.load import load_model
from ..specs.schedules.offload import OffloadSchedule
from ..specs.schedules.presets import load_preset
from ..traces.format import RoutingTrace
from ..traces.synthesis.dial import Dials
from ..traces.synthesis.synthesise import synth_trace
from .cells import CHECKED, FITTED, PREDICTED, Cell, FittedConstant, Reproduction, median

CITATION = (
    "Hwang et al., Pre-gated MoE, ISCA 2024, arXiv 2308.12066: A100 80 GB, PCIe 4, 32-bit, batch 1, 256 in, 256 out"
)
BASE, LARGE = ("switch-base-8", "switch-base-64", "switch-base-128"), "switch-large-128"
MODELS = (*BASE, LARGE)
ON_DEMAND, PREFETCH, PRE_GATED = "on-demand", "prefetch", "pre-gated"
MODES = (ON_DEMAND, PREFETCH, PRE_GATED)
MACHINE, BITS = "a100-80gb-sxm", "32"
Key = tuple[str, str, str]
"""(table, row, column)"""
_LATENCY, _THROUGHPUT, _RATE, _SIZE = "block latency", "throughput", "tokens/s", "model size"
_BASE_MEAN, _BASE_MAX = "switch-base, mean", "switch-base, largest"
PUBLISHED: Mapping[Key, float] = MappingProxyType(
    {
        (_LATENCY, LARGE, "on-demand over pre-gated"): 1.9,
        (_LATENCY, LARGE, "prefetch over pre-gated"): 125.0,
        (_THROUGHPUT, LARGE, "pre-gated over on-demand"): 1.6,
        (_THROUGHPUT, LARGE, "pre-gated over prefetch"): 52.0,
        (_THROUGHPUT, _BASE_MEAN, "pre-gated over on-demand"): 1.5,
        (_THROUGHPUT, _BASE_MAX, "pre-gated over on-demand"): 1.6,
        (_THROUGHPUT, _BASE_MEAN, "pre-gated over prefetch"): 27.0,
        (_THROUGHPUT, _BASE_MAX, "pre-gated over prefetch"): 55.0,
        (_RATE, _BASE_MEAN, PRE_GATED): 111.0,
        (_RATE, LARGE, PRE_GATED): 42.0,
        (_SIZE, "switch-base-8", "GPU-only"): 2.8,
        (_SIZE, "switch-base-64", "GPU-only"): 15.2,
        (_SIZE, "switch-base-128", "GPU-only"): 30.0,
        (_SIZE, LARGE, "GPU-only"): 105.6,
    }
)
FITTED_CELL: Key = (_RATE, _BASE_MEAN, PRE_GATED)
NOTES: Mapping[Key, str] = MappingProxyType(
    {
        (_THROUGHPUT, LARGE, "pre-gated over prefetch"): (
            "published figures contradict each other: Prefetch moves 12 blocks of 128 experts of 33.6 MB a token, 51.5 GB; to be "
            "only 52 times slower than 42 tokens/s it would need 42 GB/s through PCIe 4 x16, which carries 32 at most. The same "
            "paper's block latency, 125 times, needs 26. This cell takes no part in any fit"
        ),
        (_LATENCY, LARGE, "prefetch over pre-gated"): (
            "published, a block of Prefetch is 125 of Pre-gated: 164 ms for 128 experts if those are 1.31 ms, so 26.2 GB/s in large "
            "copies, where 25 are assumed here; and Pre-gated's blocks are 1.48 ms here because the first block of every "
            "token waits for its own transfer. Prefetch's first block fetches its chosen expert alone; with all 128 the ratio is "
            "12/11 of this one"
        ),
        (_SIZE, "switch-base-8", "GPU-only"): (
            "0.3 GB above the parameters: three further copies of the embedding (encoder, decoder, output) are 0.30 GB"
        ),
        (_SIZE, LARGE, "GPU-only"): "more than the 80 GB of the machine: GPU-only does not fit, as published",
    }
)  # fmt: skip
_LINK_BYTES_PER_S = 25 * GIGA
_TOKENS_IN, _TOKENS_OUT = 256, 256
_MOST_HOST_S = 5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One model under one mode."""

    tokens_per_s: float
    block_s: float
    """Time of a block of the decoder."""
    peak_bytes: int
    """Device memory, most at any time."""


@functools.cache
def routing(model: ModelSpec, prompt_tokens: int, decode_tokens: int) -> RoutingTrace:
    """Return a synthetic recording of one request for `model`."""
    dials = Dials(num_layers=model.num_moe_layers, num_experts=model.num_experts, top_k=model.top_k,
                  prompt_tokens=(prompt_tokens,), decode_tokens=(decode_tokens,))  # fmt: skip
    return synth_trace(dials, num_requests=1, seed=0, model=model.name)


def encoder_of(model: ModelSpec) -> ModelSpec:
    """Return the encoder of an encoder–decoder as a model of its own."""
    return dataclasses.replace(
        model, name=f"{model.name}, encoder", num_layers=model.num_encoder_layers, moe_layers=model.encoder_moe_layers,
        num_encoder_layers=0, encoder_moe_layers=(), cross_attention=False,
    )  # fmt: skip


def schedule_of(mode: str, bits: str, block_host_s: float) -> OffloadSchedule:
    """Return the schedule of one of the paper's modes."""
    preset = {ON_DEMAND: "on-demand", PREFETCH: "prefetch-all", PRE_GATED: "pre-gated"}[mode]
    return load_preset(preset).with_options(experts__bits=bits, host__per_layer_s=block_host_s)


def run_mode(name: str, mode: str, block_host_s: float, *, profile: Profile, bits: str = BITS) -> Mode:
    """Return what one mode does to one model; raises DoesNotFit where it exceeds the machine."""
    model = load_model(name)
    encoding = _predict(encoder_of(model), schedule_of(ON_DEMAND, bits, block_host_s), profile, _TOKENS_IN, 0)
    decoding = _predict(model, schedule_of(mode, bits, block_host_s), profile, 0, _TOKENS_OUT)
    seconds = decoding.metrics.window_s
    total = seconds + encoding.metrics.window_s
    return Mode(tokens_per_s=_TOKENS_OUT / total, block_s=seconds / _TOKENS_OUT / model.num_moe_layers,
                peak_bytes=decoding.memory_breakdown.device_bytes)  # fmt: skip


def _predict(model: ModelSpec, schedule: OffloadSchedule, profile: Profile, prompt: int, decode: int) -> Prediction:
    dense = weight_format("32" if schedule.experts.bits == "32" else "16")
    return Simulation(model=model, profile=profile, trace=routing(model, prompt, decode), dense_format=dense).predict(
        schedule
    )


def machine(name: str) -> Profile:
    """Return a machine; the paper's A100 with the link's rate from a source that is not another paper's table."""
    profile = load_hardware(name)
    if profile.name != MACHINE:
        return profile
    link = profile.host_to_device
    rate = dataclasses.replace(
        link.pinned_bytes_per_s, value=float(_LINK_BYTES_PER_S), citation="ZaidQureshi/bam issue 54"
    )
    return dataclasses.replace(profile, host_to_device=dataclasses.replace(link, pinned_bytes_per_s=rate))


def fit(published: Mapping[Key, float] = PUBLISHED) -> float:
    """Return the host's seconds a block that meet the fitted cell; no other cell is read."""
    profile = machine(MACHINE)

    def missed(block_host_s: float) -> float:
        rates = [run_mode(name, PRE_GATED, block_host_s, profile=profile).tokens_per_s for name in BASE]
        return sum(rates) / len(rates) / published[FITTED_CELL] - 1

    return float(scipy.optimize.brentq(missed, 0.0, _MOST_HOST_S, xtol=1e-8))


def reproduce_pre_gated(hardware: str | None = None, bits: str | None = None) -> Reproduction:
    """Return the paper's tables beside the simulator's; one constant fitted.

    hardware, bits: predictions for this machine or weight format instead of the paper's. Raises UnknownName for either,
    DoesNotFit where a machine that was asked for cannot hold a model.
    """
    profile = machine(MACHINE if hardware is None else hardware)
    fmt = weight_format(BITS if bits is None else bits).name
    block_host_s = fit()
    found = {
        (name, mode): run_mode(name, mode, block_host_s, profile=profile, bits=fmt) for name in MODELS for mode in MODES
    }
    published = PUBLISHED if hardware is None and fmt == BITS else {}
    cells = [_cell(key, value, published) for key, value in tables(found, fmt).items()]
    return Reproduction(
        paper="pre-gated", citation=CITATION, cells=tuple(cells),
        constants=(FittedConstant(name="host time of a block", value=block_host_s, unit="s", fitted_to="/".join(FITTED_CELL)),),
        notes=(
            *_without_sizes(cells),
            "25 GB/s between host and device, measured on an A100 elsewhere; nothing about the link is fitted",
            f"machine {profile.name}, {fmt} bits",
        ),
    )  # fmt: skip


def _without_sizes(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return a note on the median error of what is not mere counting of parameters, where anything is checked."""
    error = median([cell for cell in cells if cell.table != _SIZE]).get(CHECKED)
    return () if error is None else (f"median error of checked cells without model sizes: {error:.1%}",)


def tables(found: Mapping[tuple[str, str], Mode], bits: str) -> dict[Key, float]:
    """Return every cell's value from the runs of all models under all modes."""
    values: dict[Key, float] = {}
    for other in (ON_DEMAND, PREFETCH):
        for name in MODELS:
            values[_LATENCY, name, f"{other} over pre-gated"] = (
                found[name, other].block_s / found[name, PRE_GATED].block_s
            )
        faster = {name: found[name, PRE_GATED].tokens_per_s / found[name, other].tokens_per_s for name in MODELS}
        column = f"pre-gated over {other}"
        values |= {(_THROUGHPUT, name, column): ratio for name, ratio in faster.items()}
        base = [faster[name] for name in BASE]
        values[_THROUGHPUT, _BASE_MEAN, column] = sum(base) / len(base)
        values[_THROUGHPUT, _BASE_MAX, column] = max(base)
    for mode in MODES:
        rates = [found[name, mode].tokens_per_s for name in BASE]
        values |= {(_RATE, name, mode): found[name, mode].tokens_per_s for name in MODELS}
        values[_RATE, _BASE_MEAN, mode] = sum(rates) / len(rates)
        values |= {("block time", name, mode): found[name, mode].block_s * MS_PER_S for name in MODELS}
        values |= {("peak memory", name, mode): found[name, mode].peak_bytes / GIGA for name in MODELS}
    for name in MODELS:
        values[_SIZE, name, "GPU-only"] = weight_format(bits).num_bytes(load_model(name).total_parameters) / GIGA
    return values


def _cell(key: Key, simulated: float, published: Mapping[Key, float]) -> Cell:
    table, row, column = key
    unit = {_LATENCY: "x", _THROUGHPUT: "x", _RATE: "tokens/s", "block time": "ms"}.get(table, "GB")
    role = PREDICTED if key not in published else FITTED if key == FITTED_CELL else CHECKED
    return Cell(table=table, row=row, column=column, unit=unit, published=published.get(key), simulated=simulated, role=role,
                note=NOTES.get(key, "") if published else "")  # fmt: skip
