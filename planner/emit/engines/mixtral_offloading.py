"""Mixtral-offloading, offload: the numbers of its `OffloadConfig`.

Modelled: equally many cached experts in every layer and the shared buffers (arXiv 2312.17238; the published notebook uses 4).
Ignored: the quantisation of its checkpoint, models other than Mixtral.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ....base.errors import InputError, UnknownName
from ....base.json_files import parse_json
from ....specs.models import ModelSpec
from ..checks import text_of
from ..choices import Emission, OffloadChoice, as_run
from ..flags import WHOLE
from ..offload_notes import COMMON, NO_GUESSES, guess_notes, other_notes, per_layer, pool_notes
from ..table import EngineTable, check_keys, row
from ..target import OffloadTarget, Target

CONFIG_FILE = "offload_config.json"
FAMILIES = ("mixtral",)
_NOTEBOOK_BUFFERS = 4
TABLE = EngineTable(
    engine="mixtral-offloading",
    checked="2026-11-28",
    how="keys and sums compared with the published dataclass and notebook (no release to install)",
    source="dvmazur/mixtral-offloading: src/build_model.py, notebooks/demo.ipynb",
    keys={
        f"{CONFIG_FILE}.main_size": row(WHOLE, "experts on the device, over all layers", least=0),
        f"{CONFIG_FILE}.offload_size": row(WHOLE, "experts in host memory, over all layers", least=0),
        f"{CONFIG_FILE}.buffer_size": row(WHOLE, "buffers of an expert that swaps go through", least=1),
        f"{CONFIG_FILE}.offload_per_layer": row(WHOLE, "experts of each layer in host memory", least=0),
    },
    places=frozenset(FAMILIES),
)


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
    changes = {"cache__policy": "lru" if kept else "none", "cache__experts_per_layer": kept or None, "cache__pooled_experts": None,
               "cache__bytes": None, "copy__write_back": True, "copy__overlap": False}  # fmt: skip
    return Emission(
        engine=TABLE.engine,
        files={CONFIG_FILE: text},
        usage=usage,
        notes=tuple(notes),
        facts=("its checkpoint is quantised as its notebook does it (HQQ); other checkpoints are not read",),
        runs=as_run(choice.schedule, COMMON, **changes, **NO_GUESSES),
    )


def check(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where the numbers are not those of one `OffloadConfig` for the model."""
    given = parse_json(text_of(files, CONFIG_FILE), CONFIG_FILE, CONFIG_FILE)
    check_keys(given, TABLE, CONFIG_FILE, {"main_size", "offload_size", "buffer_size", "offload_per_layer"})
    away, layers = given["offload_per_layer"], model.num_moe_layers
    if away > model.num_experts:
        raise InputError(
            f"{CONFIG_FILE}: offload_per_layer", away, f"a layer has {model.num_experts} experts", "emit again"
        )
    sizes = {"main_size": layers * (model.num_experts - away), "offload_size": layers * away}
    for key, size in sizes.items():
        if given[key] != size:
            raise InputError(
                f"{CONFIG_FILE}: {key}", given[key], f"offload_per_layer={away} makes it {size}", "emit again"
            )


TARGET = Target(table=TABLE, offload=OffloadTarget(render=render, check=check))
