"""Leaving out the layers of a draft: what an engine numbers beyond the model's own layers.

Modelled: multi-token-prediction layers, which engines append after the last hidden layer and record like any other.
Ignored: a draft that is a model of its own (its recorder writes its own files).
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from ...base.errors import InputError
from ..recording import LoadProfile, RoutingTrace
from .account import layer_ranges, with_note


def without_draft_layers(recording: RoutingTrace | LoadProfile, hidden_layers: int) -> RoutingTrace | LoadProfile:
    """Return a recording with the layers below `hidden_layers` only; what was left out is named in its metadata.

    Raises InputError when no layer is left.
    """
    ids = np.asarray(recording.layer_ids)
    kept = ids < hidden_layers
    if kept.all():
        return recording
    if not kept.any():
        rule = f"the recording's layers start at {int(ids[0])}"
        raise InputError("hidden_layers", hidden_layers, rule, "give num_hidden_layers of the model's config.json")
    left_out = ids[~kept].tolist()
    said = f"layer {layer_ranges(left_out)} lies beyond the model's {hidden_layers} layers (draft, MTP), left out"
    metadata = with_note({**recording.metadata, "draft_layers": json.dumps(left_out)}, said)
    layers = tuple(ids[kept].tolist())
    if isinstance(recording, LoadProfile):
        return dataclasses.replace(
            recording,
            counts=np.ascontiguousarray(recording.counts[kept]),
            windows=None if recording.windows is None else np.ascontiguousarray(recording.windows[:, kept]),
            layer_ids=layers,
            metadata=metadata,
        )
    if recording.predicted is not None:
        rule = "guesses reach over layers, so none can be left out of a recording that holds them"
        raise InputError("hidden_layers", hidden_layers, rule, "import it without this option")
    return dataclasses.replace(
        recording,
        experts=np.ascontiguousarray(recording.experts[:, kept]),
        weights=None if recording.weights is None else np.ascontiguousarray(recording.weights[:, kept]),
        layer_ids=layers,
        metadata=metadata,
    )
