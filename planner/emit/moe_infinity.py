"""MoE-Infinity, offload: the `ArcherConfig` file.

Modelled: the share of device memory for parameters, and whether it prefetches. Ignored: which experts are kept and guessed; the
engine decides that from its own traces of activations.
"""

from __future__ import annotations

import json
import math

from ...specs import ModelSpec
from .choices import Emission, OffloadChoice
from .offload_notes import other_notes

CONFIG_FILE = "archer_config.json"
# What the ledger calls the parameters that this engine keeps in its pool of device memory.
_PARAMETERS = ("embeddings", "dense weights", "staging", "resident experts")
_STEPS = 200


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the configuration file."""
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
    return Emission(engine="MoE-Infinity", files={CONFIG_FILE: text}, usage=usage, notes=tuple(notes))
