"""Mixtral-offloading, offload: the numbers of its `OffloadConfig`.

Modelled: equally many cached experts in every layer and the shared buffers (arXiv 2312.17238; the published notebook uses 4).
Ignored: the quantisation of its checkpoint, models other than Mixtral.
"""

from __future__ import annotations

import json

from ...errors import UnknownName
from ...specs import ModelSpec
from .choices import Emission, OffloadChoice
from .offload_notes import guess_notes, other_notes, per_layer, pool_notes

CONFIG_FILE = "offload_config.json"
FAMILIES = ("mixtral",)
_NOTEBOOK_BUFFERS = 4


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the configuration file; raises UnknownName for another family of models."""
    if model.family not in FAMILIES:
        raise UnknownName(f"model {model.name}: family for Mixtral-offloading", model.family, FAMILIES)
    layers, kept = model.num_moe_layers, per_layer(choice, model.num_moe_layers)
    policy, staging = choice.schedule.cache.policy, choice.schedule.predictor.staging
    away = model.num_experts - kept
    config = {
        "main_size": layers * kept,
        "offload_size": layers * away,
        "buffer_size": staging or _NOTEBOOK_BUFFERS,
        "offload_per_layer": away,
    }
    notes = pool_notes(choice, layers)
    if policy != "lru":
        notes.append(f"cache.policy={policy}: the least recently used expert of a layer makes room")
    if not staging:
        notes.append(f"predictor.staging=0: swaps need buffers; {_NOTEBOOK_BUFFERS}, as published")
    notes += guess_notes(choice, "the published code fetches no guesses")
    if not choice.schedule.copy.write_back:
        notes.append("copy.write_back=False: the published code swaps, so every victim is copied back")
    if choice.schedule.copy.overlap:
        notes.append("copy.overlap=True: the published code copies and computes on one stream")
    notes += other_notes(choice, ("copy.write_back", "copy.overlap"))
    usage = (f"OffloadConfig(**json.load(open({CONFIG_FILE!r})))",)
    text = json.dumps(config, indent=1) + "\n"
    return Emission(engine="mixtral-offloading", files={CONFIG_FILE: text}, usage=usage, notes=tuple(notes))
