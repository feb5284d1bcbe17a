"""The dense part of a layer measured by tokens and context, and the output matrix by tokens.

Modelled: what surrounds the experts of a layer (norms, attention, router, shared experts, sorting tokens by expert,
adding their answers up), with the layers of a model taken in turn, so that weights do not stay in a cache. Prompts are
one request, decoding is one token a request. Ignored: how an engine would fuse these operations; this is the
executor's own dense part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...devices.dense_part import DensePart
from ...devices.device import Device
from ...devices.runners.runner import ExpertRunner
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import PassShape, dense_arguments, head_arguments
from .harness import Bench


def dense_benches(dense: DensePart, runner: ExpertRunner, shapes: Sequence[PassShape]) -> list[Bench]:
    """Return a bench of one layer's dense part for each shape of a pass."""
    model, device = dense.model, dense.device
    groups = dense.groups
    shortest = min(len(group) for group in groups)
    layers = [number for number, group in enumerate(groups) if len(group) == shortest]
    found = []
    for shape in shapes:
        rows = torch.arange(shape.tokens, device=device.place)
        experts, offsets = _spread(shape.tokens, model, device)
        x = dense.embed(rows)

        def run(
            number: int,
            x: torch.Tensor = x,
            shape: PassShape = shape,
            experts: torch.Tensor = experts,
            offsets: list[int] = offsets,
        ) -> None:
            after, h, logits = dense.group(layers[number % len(layers)], x, shape)
            layer_step = runner.start(after, h, logits, experts, offsets)
            runner.finish(layer_step)

        arguments = dense_arguments(model, list(groups[layers[0]]), shape, dense.dtype.itemsize)
        found.append(Bench(kind="dense", labels={}, arguments=arguments, run=run))
    return found


def head_benches(dense: DensePart, tokens: Sequence[int]) -> list[Bench]:
    """Return a bench of the output matrix for each number of tokens."""
    found = []
    for count in tokens:
        x = dense.embed(torch.arange(count, device=dense.device.place))

        def run(_: int, x: torch.Tensor = x) -> torch.Tensor:
            return dense.logits(x).argmax(dim=-1)

        arguments = head_arguments(dense.model, count, dense.dtype.itemsize)
        found.append(Bench(kind="head", labels={}, arguments=arguments, run=run))
    return found


def _spread(tokens: int, model: ModelSpec, device: Device) -> tuple[torch.Tensor, list[int]]:
    """Return experts int64 [T, k], evenly used, and where each expert's rows begin."""
    chosen = (torch.arange(tokens * model.top_k) % model.num_experts).view(tokens, model.top_k)
    counts = torch.bincount(chosen.flatten(), minlength=model.num_experts)
    return chosen.to(device.place), [0, *counts.cumsum(0).tolist()]
