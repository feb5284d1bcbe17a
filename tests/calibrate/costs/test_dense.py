"""The dense part computes attention as written on paper, with as many weights as the model has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from executor_stages import small_model
from moeplan.base.errors import InputError
from moeplan.devices.dense_part import DensePart
from moeplan.devices.device import CpuDevice
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.specs.models import AttentionSpec, ModelSpec, RecurrentSpec
from moeplan.specs.models.load import load_model
from moeplan.specs.models.pass_shape import PassShape, dense_arguments, largest_shape, pass_shapes

LARGEST = PassShape(tokens=8, context_tokens=64, requests=4)
MLA = AttentionSpec(kind="mla", num_heads=4, num_kv_heads=4, head_dim=24, v_head_dim=16, q_lora_rank=20, kv_lora_rank=12,
                    qk_rope_head_dim=8, qk_nope_head_dim=16)  # fmt: skip


def dense_of(model: ModelSpec) -> DensePart:
    return DensePart(model, CpuDevice(), dtype=torch.float32, largest=LARGEST)


def naive_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: int
) -> torch.Tensor:
    """One query head [d] against keys [c, d] and values [c, v] of its first `seen` tokens, in float64."""
    scores = (keys[:seen].double() @ query.double()) * scale
    return (torch.softmax(scores, 0).unsqueeze(1) * values[:seen].double()).sum(0)


@pytest.mark.parametrize(
    "shape", [PassShape(tokens=5, context_tokens=9, requests=1), PassShape(tokens=3, context_tokens=30, requests=3)]
)
def test_grouped_attention_is_that_on_paper(shape: PassShape) -> None:
    model = small_model()
    dense = dense_of(model)
    mixer, spec = dense._layers[0].mixer, model.attention
    assert mixer is not None
    h = torch.randn(shape.tokens, model.hidden_size, generator=torch.Generator().manual_seed(1))
    each, own = shape.context_tokens // shape.requests, shape.tokens // shape.requests
    found = dense._attention(h, mixer, shape, each)
    query = (h @ mixer.query[0].T).view(shape.tokens, spec.num_heads, spec.head_dim)
    fresh = h @ mixer.key_value.T
    keys = mixer.keys[: shape.requests * each].view(shape.requests, each, spec.num_kv_heads, spec.head_dim)
    values = mixer.values[: shape.requests * each].view(shape.requests, each, spec.num_kv_heads, spec.v_head_dim)
    split = spec.num_kv_heads * spec.head_dim
    torch.testing.assert_close(keys[:, each - own :].reshape(shape.tokens, split), fresh[:, :split])
    expected = torch.zeros(shape.tokens, spec.num_heads, spec.v_head_dim, dtype=torch.float64)
    for token in range(shape.tokens):
        request, place = divmod(token, own)
        for head in range(spec.num_heads):
            group = head // (spec.num_heads // spec.num_kv_heads)
            seen = each - own + place + 1
            expected[token, head] = naive_attention(
                query[token, head], keys[request, :, group], values[request, :, group], spec.head_dim**-0.5, seen
            )
    torch.testing.assert_close(found.double(), expected.flatten(1) @ mixer.output.double().T, rtol=1e-4, atol=1e-5)


def test_latent_attention_is_that_of_expanded_keys_and_values() -> None:
    model = small_model(attention=MLA)
    dense = dense_of(model)
    mixer = dense._layers[0].mixer
    assert mixer is not None and mixer.expand_key is not None and mixer.expand_value is not None
    h = torch.randn(1, model.hidden_size, generator=torch.Generator().manual_seed(1))
    found = dense._attention(h, mixer, PassShape(tokens=1, context_tokens=7, requests=1), 7)
    query = (h @ mixer.query[0].T @ mixer.query[1].T).view(MLA.num_heads, MLA.head_dim).double()
    latent, turned = mixer.keys[:7, 0].double().split([MLA.kv_lora_rank, MLA.qk_rope_head_dim], dim=1)
    heads = []
    for head in range(MLA.num_heads):
        keys = torch.cat([latent @ mixer.expand_key[head].double().T, turned], dim=1)
        values = latent @ mixer.expand_value[head].double()
        # Scores are scaled by the width that is really multiplied: that of the latents.
        scale = (MLA.kv_lora_rank + MLA.qk_rope_head_dim) ** -0.5
        heads.append(naive_attention(query[head], keys, values, scale, 7))
    expected = torch.cat(heads) @ mixer.output.double().T
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": MLA},
        {
            "num_layers": 4,
            "moe_layers": (1, 3),
            "dense_intermediate_size": 40,
            "num_shared_experts": 2,
            "shared_intermediate_size": 24,
        },
        {"gated": False, "num_shared_experts": 1, "shared_intermediate_size": 24},
    ],
)
def test_matrices_have_as_many_weights_as_the_model(changes: dict[str, object]) -> None:
    model = small_model(**changes)
    dense = dense_of(model)
    held = 0
    for layer in dense._layers:
        matrices = list(layer.mlp or ()) + ([layer.router] if layer.router is not None else [])
        if layer.mixer is not None:
            matrices += [*layer.mixer.query, layer.mixer.key_value, layer.mixer.output]
            matrices += [m for m in (layer.mixer.expand_key, layer.mixer.expand_value) if m is not None]
        held += sum(matrix.numel() for matrix in matrices)
    routers = len(model.moe_layers) * model.num_experts * model.hidden_size
    assert held == sum(model.dense_matrix_parameters(layer) for layer in range(model.num_layers)) + routers
    assert dense._head.numel() == model.vocab_size * model.hidden_size


def test_layers_with_a_state_keep_one() -> None:
    state = RecurrentSpec(kind="linear", matrix_parameters=64 * 96, vector_parameters=0, state_values=50)
    dense = dense_of(small_model(recurrent=state, recurrent_layers=(0, 2)))
    assert dense._layers[1].state is None and dense._layers[0].mixer is None
    before = dense._layers[0].state[2].clone()  # type: ignore[index]
    x = dense.embed(torch.arange(2))
    after, h, logits = dense.group(0, x, PassShape(tokens=2, context_tokens=8, requests=2))
    assert after.shape == h.shape == (2, 64) and logits.shape == (2, 8)
    changed = (dense._layers[0].state[2] != before).all(1)  # type: ignore[index]
    assert changed.tolist() == [True, True, False, False]


def test_windows_bound_what_attention_reads() -> None:
    model = small_model(sliding_window=4, sliding_layers=(0,))
    dense = dense_of(model)
    assert dense._layers[0].mixer.keys.shape[0] < dense._layers[1].mixer.keys.shape[0]  # type: ignore[union-attr]
    shape = PassShape(tokens=2, context_tokens=40, requests=2)
    near, far = (dense_arguments(model, [layer], shape, 4) for layer in (0, 1))
    assert near["kv_bytes"] == (2 * 4 + 2) * 64 * 4 and far["kv_bytes"] == (40 + 2) * 64 * 4


def test_only_last_tokens_reach_the_output_matrix() -> None:
    dense = dense_of(small_model())
    x = dense.embed(torch.arange(6))
    whole = dense.logits(x)
    prompt = dense.head(x, PassShape(tokens=6, context_tokens=6, requests=1))
    decoded = dense.head(x, PassShape(tokens=6, context_tokens=60, requests=6))
    torch.testing.assert_close(prompt, whole[-1:])
    torch.testing.assert_close(decoded, whole)


def test_states_stay_finite_through_many_layers() -> None:
    dense = dense_of(small_model(num_layers=24))
    x = dense.embed(torch.arange(4))
    for layer in range(24):
        x, _, _ = dense.group(layer, x, PassShape(tokens=4, context_tokens=40, requests=4))
    assert bool(torch.isfinite(x).all()) and 0.1 < float(x.std()) < 100


def test_shapes_of_passes_span_prompts_and_batches() -> None:
    shapes = pass_shapes((1, 4), (2, 64))
    assert [(s.tokens, s.context_tokens, s.requests) for s in shapes] == [
        (1, 2, 1), (4, 8, 4), (1, 64, 1), (4, 64, 1), (4, 256, 4),
    ]  # fmt: skip
    assert largest_shape(shapes) == PassShape(tokens=4, context_tokens=256, requests=4)


def test_operations_follow_tokens_and_context() -> None:
    model = small_model()
    one = dense_arguments(model, [0], PassShape(tokens=1, context_tokens=100, requests=1), 4)
    four = dense_arguments(model, [0], PassShape(tokens=4, context_tokens=400, requests=4), 4)
    assert four["flops"] == 4 * one["flops"] and four["weight_bytes"] == one["weight_bytes"]
    assert four["attention_flops"] == 4 * one["attention_flops"]
    assert math.isclose(one["attention_flops"], 2 * 4 * (16 + 16) * 100)
    assert np.isclose(one["kv_bytes"], 101 * 2 * 32 * 4)


def test_models_whose_layers_differ_are_not_executed() -> None:
    """Layers that are built alike would be measured, and shown as the model's."""
    for name in ("gemma-4-26b-a4b", "nemotron-3-super"):
        with pytest.raises(InputError, match="simulated but not executed"):
            dense_of(load_model(name))


def test_formats_of_checkpoints_that_no_kernel_runs_are_named() -> None:
    with pytest.raises(InputError, match="bits = 'int4-g32': these kernels run 32, 16, 8, 4, 3, 2"):
        expert_layout(load_model("kimi-k2.5"), "int4-g32")
