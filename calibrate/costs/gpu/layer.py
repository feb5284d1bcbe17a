"""The matrices of a decoder layer outside its routed experts, one by one, as engines multiply them.

Modelled: fused projections (queries, keys and values; gate and up), shared experts as one MLP, latent attention in its four products.
What a model has beside the usual (indexers, compressors, states) is taken as products of the hidden state. Ignored: biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....specs.models import AttentionSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One product: every token's vector of `depth` becomes one of `width`."""

    role: str
    """mixer, mlp, shared, router or other."""
    width: float
    depth: float

    @property
    def parameters(self) -> float:
        """Weights."""
        return self.width * self.depth


def layer_matrices(model: ModelSpec, layer: int) -> tuple[Matrix, ...]:
    """Return the matrices of decoder layer `layer`; all but the router's add up to `model.dense_matrix_parameters(layer)`."""
    variant, hidden = model.variant(layer), model.hidden_size
    found: list[Matrix] = []
    if model.is_recurrent(layer) and model.recurrent is not None:
        found += _in_and_out("mixer", model.recurrent.matrix_parameters, hidden)
    else:
        found += _attention(variant.attention or model.attention, hidden) * variant.num_mixers
    if model.cross_attention:
        found += _attention(model.attention, hidden)
    if layer in model.moe_layers:
        if model.num_shared_experts:
            found += _mlp("shared", model, model.num_shared_experts * model.shared_intermediate_size)
        found.append(Matrix(role="router", width=model.num_experts + model.zero_experts, depth=hidden))
    if variant.matrix_parameters:
        found.append(Matrix(role="other", width=variant.matrix_parameters / hidden, depth=hidden))
    named = sum(matrix.parameters for matrix in found if matrix.role != "router")
    rest = model.dense_matrix_parameters(layer) - named
    if rest > 0:  # dense MLPs: of whatever width and number the layer has
        into = 2 if model.gated else 1
        found += _mlp("mlp", model, rest / ((into + 1) * hidden))
    return tuple(found)


def _attention(spec: AttentionSpec, hidden: int) -> list[Matrix]:
    """Return the projections of one attention."""
    if spec.projections is not None:
        return _in_and_out("mixer", spec.projections + spec.extra_matrix_parameters, hidden)
    query, heads = spec.num_heads * spec.head_dim, spec.num_heads
    out = Matrix(role="mixer", width=hidden, depth=heads * spec.v_head_dim)
    if spec.kind == "mla":
        rank = spec.q_lora_rank
        down = (query if rank is None else rank) + spec.kv_lora_rank + spec.qk_rope_head_dim
        found = [Matrix(role="mixer", width=down, depth=hidden)]
        if rank is not None:
            found.append(Matrix(role="mixer", width=query, depth=rank))
        up = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        found += [Matrix(role="mixer", width=up, depth=spec.kv_lora_rank), out]
    else:
        kept = spec.num_kv_heads * (spec.head_dim + spec.v_head_dim)
        found = [Matrix(role="mixer", width=query * (2 if spec.gated else 1) + kept, depth=hidden), out]
    if spec.extra_matrix_parameters:
        found.append(Matrix(role="other", width=spec.extra_matrix_parameters / hidden, depth=hidden))
    return found


def _mlp(role: str, model: ModelSpec, width: float) -> list[Matrix]:
    into, hidden = 2 if model.gated else 1, model.hidden_size
    return [Matrix(role=role, width=into * width, depth=hidden), Matrix(role=role, width=hidden, depth=width)]


def _in_and_out(role: str, parameters: int, hidden: int) -> list[Matrix]:
    """Return two products of half the weights each, into something and back."""
    inner = parameters / (2 * hidden)
    return [Matrix(role=role, width=inner, depth=hidden), Matrix(role=role, width=hidden, depth=inner)]
