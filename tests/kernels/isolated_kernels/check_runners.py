"""The GPU's expert runners in Triton's interpreter beside the CPU's: an expert a launch, several, two weight formats in one layer step."""

from __future__ import annotations

import pytest
import torch

from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.devices.device import CpuDevice
from moeplan.devices.runners.cpu import CpuExperts
from moeplan.devices.runners.plain import PlainExperts
from moeplan.devices.runners.runner import ExpertRunner
from moeplan.devices.runners.triton import TritonExperts
from moeplan.devices.stores.host import expert_activation, make_store
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.kernels.expert_weights import slot_views

EXPERTS, TOKENS, TOP_K, HIDDEN = 4, 5, 2, 64


def runners(kind: type[ExpertRunner], formats: tuple[str, ...], device: CpuDevice) -> list[ExpertRunner]:
    """Return a runner for each format over one arena, whose slot `e` holds expert `e` in format `e` modulo their number."""
    model = made_up_model("small", hidden=HIDDEN, intermediate=64, num_layers=1, num_experts=EXPERTS, top_k=TOP_K)
    layouts = [expert_layout(model, bits) for bits in formats]
    each = max(layout.slot_bytes for layout in layouts)
    arena = device.empty((EXPERTS * each,), torch.uint8, "an arena")
    stores = [make_store(model, bits, device, num_keys=EXPERTS) for bits in formats]
    for slot in range(EXPERTS):
        source = stores[slot % len(formats)].bytes_of(slot)
        arena[slot * each : slot * each + len(source)] = source
    weights = [slot_views(arena, layout, expert_activation(model), slot_bytes=each) for layout in layouts]
    if kind is CpuExperts:
        return [CpuExperts(one, device) for one in weights]
    return [
        (PlainExperts if bits == "32" else TritonExperts)(one, device)
        for one, bits in zip(weights, formats, strict=True)
    ]


def computed(kind: type[ExpertRunner], formats: tuple[str, ...], *, grouped: bool) -> torch.Tensor:
    """Return what a layer step adds up to [T, H]; the first format's runner starts and finishes it."""
    mine = runners(kind, formats, CpuDevice())
    generator = torch.Generator().manual_seed(1)
    x, h = (torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16) for _ in range(2))
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    offsets = [0, *torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).tolist()]
    layer_step = mine[0].start(x, h, logits, chosen, offsets)
    for number, runner in enumerate(mine):
        theirs = list(range(number, EXPERTS, len(mine)))
        for launch in [theirs] if grouped else [[expert] for expert in theirs]:
            runner.run(layer_step, launch, launch)
    mine[0].finish(layer_step)
    return layer_step.x.float()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("formats", [("16",), ("4",), ("16", "4"), ("4", "2"), ("32", "16")])
def test_a_layer_step_adds_up_to_what_it_does_on_the_cpu(formats: tuple[str, ...], grouped: bool) -> None:
    expected = computed(CpuExperts, formats, grouped=grouped)
    found = computed(TritonExperts, formats, grouped=grouped)
    assert float((found - expected).norm() / expected.norm()) < 2.0**-6  # a few roundings to bfloat16
