"""Seconds a token of offloading engines on one RTX A5000, as MoE-Infinity's README lists them: predicted, with nothing fitted.

Modelled: the machine as its parts under each engine (`specs.machines`: how it launches kernels, from what memory it copies), and what each
does with expert weights, in the words of its own documentation and code. MoE-Infinity keeps three quarters of the card for experts
(`device_memory_ratio` of its README), one cache over all layers that keeps what like requests used, and fetches pinned and on
demand (its published code has `prefetch` off by default). Accelerate fills the card with whole layers in the model's order and
moves every other layer in at each pass, from ordinary memory, on the kernels' stream. vLLM does the same from pinned memory.
DeepSpeed (ZeRO-Inference) streams the modules that the model's code calls from ordinary memory (`pin_memory` is off unless asked for), the
next one while one computes. Mixtral-offloading keeps an LRU of four 2-bit experts a layer; its software's cost is what its own
paper's table says (`mixtral_offloading`). Which experts a model's code calls is in `model_code`; vLLM and Accelerate move a layer's
experts together.

Assumed, because the README does not say: batch 1, generation alone (prompts and encoders not counted), weights as the
bundled configuration's checkpoint stores them, Switch-128 is Switch-Large-128 (as an earlier README says), routing as synthetic
recordings have it, a host with enough memory. Every cell is checked; misses are explained cell by cell. Ignored: what hooks of single
modules take in Python; Ollama, whose layers on the cores are not stated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

from ..calibrate.costs.cost_model import CostModel
from ..sim.offload.simulate import Simulation
from ..specs.machines.compose import compose_text
from ..specs.machines.profile import Profile
from ..specs.memory import MemoryNeeds, cache_budget_bytes, cache_budget_experts
from ..specs.models import ModelSpec, WeightFormat, weight_format
from ..specs.models.load import load_model
from ..specs.schedules.offload import OffloadSchedule
from ..specs.schedules.presets import load_preset
from ..traces.format import RoutingTrace
from ..traces.synthesis.dial import Dials
from ..traces.synthesis.presets import preset
from ..traces.synthesis.synthesise import synth_trace
from .cells import CHECKED, Cell, Reproduction
from .mixtral_offloading import LRU, fitted, tokens_per_s
from .model_code import CALLS_EVERY_EXPERT

CITATION = "MoE-Infinity README (github.com/EfficientMoE/MoE-Infinity): RTX A5000 24 GB, seconds per token, FLAN + BIG-Bench + MMLU"
TABLE, MACHINE = "time per token", "a5000"
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "Switch-128": "switch-large-128", "NLLB-MoE": "nllb-moe-54b", "Mixtral-8x7B": "mixtral-8x7b",
        "DeepSeek-V2-Lite": "deepseek-v2-lite",
    }
)  # fmt: skip
PUBLISHED: Mapping[str, tuple[float | None, float | None, float | None, float | None]] = MappingProxyType(
    {
        "MoE-Infinity": (0.130, 0.119, 0.735, 0.155),
        "Accelerate": (1.043, 3.071, 6.633, 1.743),
        "DeepSpeed": (4.578, 8.381, 2.486, 0.737),
        "vLLM": (None, None, 2.137, 0.493),
        "Mixtral-offloading": (None, None, 1.752, None),
    }
)
_PARTS = "rtx-a5000 + epyc-7543 + ddr4-3200x8:512GiB"
_ENGINES: Mapping[str, str] = MappingProxyType(
    {"MoE-Infinity": "moe-infinity", "Accelerate": "transformers", "DeepSpeed": "deepspeed", "vLLM": "vllm"}
)
_CACHE_OF_DEVICE = 0.75  # MoE-Infinity's `device_memory_ratio` in its examples
_TOKENS = 256
_UNKNOWN = "batch, prompt, output length and weight format behind the published figure are not known"
_PYTHON = (
    "the published time is mostly not transfer: it is what this engine's Python spends on a layer, of which the constants, those of "
    "its public reports on other models, have a part"
)
_FLOAT32 = "32-bit experts are assumed as in the checkpoint; in 16 bits half the time"
NOTES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("MoE-Infinity", "Switch-128"): f"{_PYTHON}; the encoder's fetches, spread over few generated tokens, may be in it too",
        ("MoE-Infinity", "NLLB-MoE"): f"transfers of 12 experts a token with hardly any reuse, where its requests reuse more; {_UNKNOWN}",
        ("MoE-Infinity", "Mixtral-8x7B"): f"one cached expert of eight a layer more or less is 5 % of the time; {_UNKNOWN}",
        ("MoE-Infinity", "DeepSeek-V2-Lite"): f"{_PYTHON}; its newer README has 0.1 s",
        ("Accelerate", "Switch-128"): (
            f"{_FLOAT32}; or newer model code, which calls chosen experts only, or a decoder partly on the card"
        ),
        ("Accelerate", "NLLB-MoE"): f"{_FLOAT32}, nearer to the published",
        ("Accelerate", "Mixtral-8x7B"): "11.5 GB/s from ordinary memory would give the published time; 9.6 were measured elsewhere",
        ("Accelerate", "DeepSeek-V2-Lite"): (
            "a hook at each of 1,664 expert modules costs Python time that is not modelled, and less of the model may have been "
            "placed on the card"
        ),
        ("DeepSpeed", "Switch-128"): "gathering each of 1,536 expert modules a token costs Python time that is not modelled",
        ("DeepSpeed", "NLLB-MoE"): f"206 GB from ordinary memory at 9.6 GB/s, measured elsewhere; {_UNKNOWN}",
        ("DeepSpeed", "Mixtral-8x7B"): "chosen experts alone from ordinary memory at 9.6 GB/s, measured elsewhere",
        ("DeepSpeed", "DeepSeek-V2-Lite"): (
            "156 chosen experts and all dense layers a token are small transfers; gathering each costs Python time that is not "
            "modelled"
        ),
        ("vLLM", "Mixtral-8x7B"): (
            "how many GB were offloaded is not known; fewer than assumed here, where room is left for a layer on its way"
        ),
        ("vLLM", "DeepSeek-V2-Lite"): (
            "how many GB were offloaded is not known; more than assumed here, since a KV cache is reserved"
        ),
        ("Mixtral-offloading", "Mixtral-8x7B"): (
            "the engine's own paper has 0.34 s on an A100 with the same link, so the published 1.752 s is another "
            f"configuration of it: more bits, fewer cached experts, or prompts counted in; {_UNKNOWN}"
        ),
    }
)  # fmt: skip


@functools.cache
def routing(model: ModelSpec) -> RoutingTrace:
    """Return a synthetic recording of four requests: Mixtral's published locality, DeepSeek's assumed one, or plain dials."""
    dials = {
        "mixtral": preset("mixtral-8x7b"),
        "deepseek_v2": dataclasses.replace(preset("deepseek-r1"), layer_ids=()),
    }.get(model.family, Dials(num_layers=1, num_experts=1, top_k=1))
    dials = dataclasses.replace(
        dials, num_layers=model.num_moe_layers, num_experts=model.num_experts, top_k=model.top_k, guess_recall=(),
        prompt_tokens=(0,), decode_tokens=(_TOKENS,),
    )  # fmt: skip
    return synth_trace(dials, num_requests=4, seed=0, model=model.name)


def seconds_per_token(engine: str, model: ModelSpec) -> float:
    """Return the predicted time of one generated token of `model` under `engine`."""
    if engine == "Mixtral-offloading":
        return 1 / tokens_per_s(LRU, MACHINE, "2", fitted())
    profile = machine(engine)
    if engine == "MoE-Infinity":
        left = cache_budget_bytes(profile.memory_bytes, _needs(model, profile))
        cached = min(int(profile.memory_bytes * _CACHE_OF_DEVICE), left)
        return _run(
            model, profile, load_preset("moe-infinity").with_options(predictor__kind="none", cache__bytes=cached)
        )
    if engine == "DeepSpeed":
        moved = load_preset("prefetch-all" if model.family in CALLS_EVERY_EXPERT else "on-demand")
        return _run(model, profile, moved, unlimited=True) + _dense_copies_s(
            model, profile, model.num_layers, pinned=True
        )
    return _whole_layers(model, profile, pinned=engine == "vLLM", every=True)


@functools.cache
def machine(engine: str) -> Profile:
    """Return the A5000 under one of the table's engines."""
    return compose_text(_PARTS, _ENGINES[engine])


def resident_layers(model: ModelSpec, profile: Profile) -> int:
    """Return how many decoder layers stay on the card when it is filled in the model's order, room kept for one on its way."""
    room = cache_budget_experts(profile.memory_bytes, _needs(model, profile))
    room -= len(model.encoder_moe_layers) * model.num_experts  # the encoder comes first
    whole = room // model.num_experts
    return model.num_moe_layers if whole >= model.num_moe_layers else max(0, whole - 1)


def _needs(model: ModelSpec, profile: Profile) -> MemoryNeeds:
    """Return what takes memory beside cached experts."""
    fmt = _format(model)
    return MemoryNeeds(model=model, expert_format=fmt, dense_format=fmt, context_tokens=_TOKENS,
                       runtime_bytes=int(profile.device.runtime_bytes.value))  # fmt: skip


def _whole_layers(model: ModelSpec, profile: Profile, *, pinned: bool, every: bool) -> float:
    """Return the time of a token when some layers are resident and the others move in at each pass."""
    moved = load_preset("naive" if every else "on-demand").with_options(copy__pinned=pinned, copy__overlap=False)
    still = load_preset("resident")
    away = model.num_moe_layers - resident_layers(model, profile)
    share = away / model.num_moe_layers
    dense = _dense_copies_s(model, profile, away, pinned=pinned)
    # Modules move one by one: a layer need not fit whole.
    streamed = _run(model, profile, moved, unlimited=True)
    return share * streamed + (1 - share) * _run(model, profile, still, unlimited=True) + dense


def _run(model: ModelSpec, profile: Profile, schedule: OffloadSchedule, *, unlimited: bool = False) -> float:
    """Return the mean time of a decoded token; unlimited: on a card with room for everything."""
    fmt = _format(model)
    simulation = Simulation(model=model, profile=profile, trace=routing(model), dense_format=fmt,
                          memory_bytes=2 * fmt.num_bytes(model.total_parameters) if unlimited else None)  # fmt: skip
    metrics = simulation.predict(schedule.with_options(experts__bits=fmt.name)).metrics
    return metrics.window_s / metrics.num_tokens


def _dense_copies_s(model: ModelSpec, profile: Profile, layers: int, *, pinned: bool) -> float:
    """Return the time of moving what surrounds the experts of so many layers."""
    costs = CostModel(profile, model)
    return (
        layers
        * costs.host_to_device(model.dense_layer_bytes(model.moe_layers[-1], _format(model)), pinned=pinned).seconds
    )


def _format(model: ModelSpec) -> WeightFormat:
    return weight_format(model.native_bits)


def reproduce_engines() -> Reproduction:
    """Return the README's table beside the simulator's; nothing is fitted to it."""
    cells = []
    for engine, row in PUBLISHED.items():
        for (column, name), published in zip(MODELS.items(), row, strict=True):
            if published is None:
                continue
            simulated = seconds_per_token(engine, load_model(name))
            cells.append(Cell(table=TABLE, row=engine, column=column, unit="s/token", published=published,
                              simulated=simulated, role=CHECKED, note=NOTES.get((engine, column), "")))  # fmt: skip
    return Reproduction(
        paper="engines", citation=CITATION, cells=tuple(cells), constants=(),
        notes=(
            f"nothing is fitted to this table; {_UNKNOWN}",
            "Mixtral-offloading's row uses the three constants fitted to that engine's own paper (`reproduce mixtral-offloading`)",
            "Ollama's row is not simulated: the profile has no costs of the host's cores",
        ),
    )  # fmt: skip
