"""Accelerate with transformers 4, offload: a `device_map` of single experts.

Modelled: the modules of families whose experts are a module list in transformers 4 (4.57): every leaf module is named, because
a hook on a whole layer would move the experts inside it too. Which experts are on the device is the plan's number and the lowest
indices: the plan does not name experts. Ignored: disk, several devices, transformers 5, whose experts are one tensor a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ....base.errors import InputError, UnknownName
from ....base.json_files import parse_json
from ....specs.models import ModelSpec
from ..checks import text_of
from ..choices import Emission, OffloadChoice, as_run
from ..offload_notes import COMMON, NO_GUESSES, guess_notes, other_notes
from ..table import EngineTable
from ..target import OffloadTarget, Target

MAP_FILE = "device_map.json"
DEVICE, HOST = 0, "cpu"
# Family: (module that holds gate and experts, its other modules).
FAMILIES = {
    "mixtral": ("block_sparse_moe", ("gate",)),
    "olmoe": ("mlp", ("gate",)),
    "qwen2_moe": ("mlp", ("gate", "shared_expert", "shared_expert_gate")),
    "qwen3_moe": ("mlp", ("gate",)),
    "deepseek_v2": ("mlp", ("gate", "shared_experts")),
    "deepseek_v3": ("mlp", ("gate", "shared_experts")),
}
TABLE = EngineTable(
    engine="accelerate 1.15.0 with transformers 4.57",
    checked="2026-11-28",
    how="maps given to accelerate's own check_device_map with transformers' models on the meta device, where both are installed",
    source="accelerate 1.15.0: utils/modeling.py; transformers 4.57.6: models",
    places=frozenset(FAMILIES),
)
_AROUND_THE_MLP = ("self_attn", "input_layernorm", "post_attention_layernorm")


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the device map; raises UnknownName for a family whose experts are not a module list."""
    if model.family not in FAMILIES:
        raise UnknownName(f"model {model.name}: family with a module list of experts", model.family, FAMILIES)
    block, others = FAMILIES[model.family]
    each, more = divmod(choice.cached_experts, model.num_moe_layers)
    places: dict[str, int | str] = {"model.embed_tokens": DEVICE}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        if layer not in model.moe_layers:
            places[prefix] = DEVICE
            continue
        places |= {f"{prefix}.{name}": DEVICE for name in (*_AROUND_THE_MLP, *(f"{block}.{other}" for other in others))}
        kept = each + int(model.moe_layers.index(layer) < more)
        places |= {f"{prefix}.{block}.experts.{e}": DEVICE if e < kept else HOST for e in range(model.num_experts)}
    places |= {"model.norm": DEVICE, "model.rotary_emb": DEVICE, "lm_head": DEVICE}
    notes = []
    if choice.cached_experts < model.num_moe_layers * model.num_experts:
        kept_text = str(each) if more == 0 else f"{each} or {each + 1}"
        notes.append(
            f"cache.policy={choice.schedule.cache.policy}: {kept_text} experts of each layer, the lowest indices, are on the "
            "device and never change; the others are copied at every use and not kept"
        )
    notes.append(
        "transformers 5: a layer's experts are one module of a block named mlp; name model.layers.N.mlp.experts as a whole there"
    )
    notes += guess_notes(choice, "nothing is fetched ahead")
    notes += other_notes(choice)
    usage = (f"AutoModelForCausalLM.from_pretrained(…, device_map=json.load(open({MAP_FILE!r})))",)
    text = json.dumps(places, indent=1) + "\n"
    total = model.num_moe_layers * model.num_experts
    changes: dict[str, object] = {} if choice.cached_experts in (0, total) else {"cache__policy": "static"}
    if choice.cached_experts < total:
        changes |= {"copy__overlap": False, "copy__pinned": False}
    return Emission(
        engine=TABLE.engine,
        files={MAP_FILE: text},
        usage=usage,
        notes=tuple(notes),
        runs=as_run(choice.schedule, COMMON, **changes, **NO_GUESSES),
        facts=("copies are made by hooks, on the stream that computes, from memory that is not pinned",)
        if changes
        else (),
    )


def check(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where modules are unknown, named twice or left without a device."""
    table = parse_json(text_of(files, MAP_FILE), MAP_FILE, MAP_FILE)
    modules = _modules(model)
    for key, place in table.items():
        if key not in modules:
            raise UnknownName(f"{MAP_FILE}: module", key, modules)
        if place not in ("cpu", "disk") and (type(place) is not int or place < 0):
            raise InputError(f"{MAP_FILE}: {key}", place, "not a device", "give a device's index, cpu or disk")
    absent = sorted(modules - set(table))
    if absent:
        raise InputError(MAP_FILE, absent[0], "a module has no device", "name every module")


def _modules(model: ModelSpec) -> set[str]:
    """Return every module of the model that a map must name, leaves inside MoE layers, whole layers elsewhere."""
    block, others = FAMILIES[model.family]
    inside = [*_AROUND_THE_MLP, *(f"{block}.{name}" for name in others)]
    inside += [f"{block}.experts.{expert}" for expert in range(model.num_experts)]
    names = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        names |= {f"{prefix}.{name}" for name in inside} if layer in model.moe_layers else {prefix}
    return names


TARGET = Target(table=TABLE, offload=OffloadTarget(render=render, check=check))
