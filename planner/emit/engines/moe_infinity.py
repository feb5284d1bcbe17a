"""MoE-Infinity, offload: the `ArcherConfig` file.

Modelled: the share of device memory for parameters, and whether it prefetches. Ignored: which experts are kept and guessed; the
engine decides that from its own traces of activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from ....base.errors import UnknownName
from ....base.json_files import parse_json
from ....specs.models import ModelSpec
from ..checks import text_of
from ..choices import Emission, OffloadChoice
from ..flags import BOOLEAN, NUMBER, TEXT, WHOLE
from ..offload_notes import other_notes
from ..table import EngineTable, check_keys, row
from ..target import OffloadTarget, Target

CONFIG_FILE = "archer_config.json"
# What the memory breakdown calls the parameters that this engine keeps in its pool of device memory.
_PARAMETERS = ("embeddings", "dense weights", "staging", "resident experts")
_STEPS = 200
# Classes that the engine's own list knows (it looks for the names in the class of the model).
FAMILIES = (
    "switch_transformers",
    "nllb_moe",
    "mixtral",
    "grok1",
    "arctic",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
)
TABLE = EngineTable(
    engine="MoE-Infinity (d617801)",
    checked="2026-11-28",
    how="keys, types and the list of models compared with the repository's own dataclass and constants (read, not built)",
    source="EfficientMoE/MoE-Infinity d617801 of 2026-03-03: moe_infinity/utils/config.py, moe_infinity/common/constants.py",
    keys={
        f"{CONFIG_FILE}.offload_path": row(TEXT, "folder of parameters, one for each model"),
        f"{CONFIG_FILE}.device_memory_ratio": row(NUMBER, "share of device memory for parameters", least=0, most=1),
        f"{CONFIG_FILE}.host_memory_ratio": row(NUMBER, "share of host memory for parameters", least=0, most=1),
        f"{CONFIG_FILE}.prefetch": row(BOOLEAN, "fetch ahead"),
        f"{CONFIG_FILE}.trace_capacity": row(WHOLE, "sequences remembered", least=1),
        f"{CONFIG_FILE}.trace_path": row(TEXT, "file of sequences"),
        f"{CONFIG_FILE}.num_threads": row(WHOLE, "threads", least=1),
    },
    places=frozenset(FAMILIES),
)


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the configuration file; raises UnknownName for a family that the engine's list does not have."""
    if model.family not in FAMILIES:
        raise UnknownName(f"model {model.name}: family for MoE-Infinity", model.family, FAMILIES)
    parameters = sum(choice.device_bytes.get(name, 0) for name in _PARAMETERS)
    # Rounded down, so that the pool is never larger than planned.
    ratio = math.floor(min(1.0, parameters / choice.memory_bytes) * _STEPS) / _STEPS
    cache, predictor = choice.schedule.cache, choice.schedule.predictor
    config = {"offload_path": "./offload", "device_memory_ratio": ratio, "prefetch": predictor.kind != "none"}
    pool = f"{choice.cached_experts} experts share a pool of {parameters} bytes with all other parameters"
    notes = [f"cache.policy={cache.policy}: {pool}; the engine's own traces choose victims"]
    if predictor.kind != "none":
        notes.append(f"predictor.kind={predictor.kind} (depth {predictor.depth}, staging {predictor.staging}): "
                     "guesses come from the engine's own traces")  # fmt: skip
    notes += other_notes(choice)
    usage = (
        f"give {CONFIG_FILE} as the configuration of MoE(checkpoint, config)",
        "offload_path is a folder for parameters: choose one on a fast disk",
        f"device_memory_ratio is of the plan's {choice.memory_bytes} bytes: scale it where the device has more",
    )
    text = json.dumps(config, indent=1) + "\n"
    return Emission(
        engine=TABLE.engine,
        files={CONFIG_FILE: text},
        usage=usage,
        notes=tuple(notes),
        facts=(f"its list of models has {model.family}; this version does not run over several nodes",),
        unlike="the engine chooses victims and guesses from traces of its own",
    )


def check(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where `ArcherConfig` would refuse the file, or the engine the model."""
    check_keys(parse_json(text_of(files, CONFIG_FILE), CONFIG_FILE, CONFIG_FILE), TABLE, CONFIG_FILE, {"offload_path"})
    if model.family not in FAMILIES:
        raise UnknownName(f"model {model.name}: family for MoE-Infinity", model.family, FAMILIES)


TARGET = Target(table=TABLE, offload=OffloadTarget(render=render, check=check))
