"""What the cost of a forward pass's dense part depends on, in numbers that need no torch to count.

Modelled: bytes of weights, keys and values; operations of matrices and of attention. Ignored: norms and residuals
(they are in the constants that a fit finds per token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import FLOPS_PER_WEIGHT, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """The sizes of a forward pass."""

    tokens: int
    context_tokens: int
    """Context that attention reads, summed over requests."""
    requests: int
    """1 for a prompt, as many as tokens where each request decodes one."""
    guesses: int = 0
    """Of the tokens, guesses that are verified: their logits are wanted too, and each request's stand behind its certain token."""


def largest_shape(shapes: Sequence[PassShape]) -> PassShape:
    """Return the sizes that hold every one of `shapes`."""
    return PassShape(
        tokens=max(shape.tokens for shape in shapes),
        context_tokens=max(shape.context_tokens for shape in shapes),
        requests=max(shape.requests for shape in shapes),
        guesses=max(shape.guesses for shape in shapes),
    )


def pass_shapes(tokens: Sequence[int], contexts: Sequence[int]) -> list[PassShape]:
    """Return prompts of `tokens` and passes that decode as many requests, at each context a request."""
    found = []
    for context in contexts:
        for count in tokens:
            if count <= context:
                found.append(PassShape(tokens=count, context_tokens=context, requests=1))
            if count > 1:
                found.append(PassShape(tokens=count, context_tokens=count * context, requests=count))
    return found


def dense_arguments(model: ModelSpec, layers: Sequence[int], shape: PassShape, value_bytes: int) -> dict[str, float]:
    """Return what the time of `layers` without their routed experts depends on, for one pass.

    value_bytes: of one weight, key or value.
    """
    weights = kv_values = 0
    attention_flops = 0.0
    for layer in layers:
        weights += model.dense_matrix_parameters(layer) + model.dense_vector_parameters(layer)
        if model.is_recurrent(layer) and model.recurrent is not None:
            kv_values += 2 * model.recurrent.state_values * shape.requests
            continue
        attention = model.attention_of(layer)
        if attention is None:
            continue
        seen = max(model.attended_tokens(layer, shape.context_tokens, shape.requests), shape.tokens)
        kv_values += (seen + shape.tokens) * attention.kv_values_per_token
        kv_values += shape.context_tokens // attention.tokens_per_index * attention.index_values
        attention_flops += attention.flops(shape.tokens * seen / shape.requests, seen)
    return {
        "tokens": shape.tokens,
        "context": shape.context_tokens,
        "requests": shape.requests,
        "weight_bytes": weights * value_bytes,
        "flops": FLOPS_PER_WEIGHT * weights * shape.tokens,
        "kv_bytes": kv_values * value_bytes,
        "attention_flops": attention_flops,
        "value_bytes": value_bytes,
    }


def head_arguments(model: ModelSpec, tokens: int, value_bytes: int) -> dict[str, float]:
    """Return what the time of the output matrix depends on."""
    parameters = model.head_parameters
    flops = FLOPS_PER_WEIGHT * parameters * tokens
    return {"tokens": tokens, "weight_bytes": parameters * value_bytes, "flops": flops, "value_bytes": value_bytes}


def matmul_flops(rows: float, columns: float, inner: float) -> float:
    """Return the operations of one product of matrices."""
    return FLOPS_PER_WEIGHT * rows * columns * inner
