"""Accelerate with transformers 4, offload: a `device_map` of single experts.

Modelled: the modules of families whose experts are a module list in transformers 4 (4.57): every leaf module is named, because
a hook on a whole layer would move the experts inside it too. Which experts are on the device is the plan's number and the lowest
indices: the plan does not name experts. Ignored: disk, several devices, transformers 5, whose experts are one tensor a layer.
"""

from __future__ import annotations

import json

from ...errors import UnknownName
from ...specs import ModelSpec
from .choices import Emission, OffloadChoice
from .offload_notes import guess_notes, other_notes

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
    return Emission(
        engine="accelerate 1.15 with transformers 4.57", files={MAP_FILE: text}, usage=usage, notes=tuple(notes)
    )
