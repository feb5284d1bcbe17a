"""Everything of a forward pass but the routed experts, with random weights of a model's shapes, really computed by
torch.

    tokens x [T, H] ── group of layers ──► x', what experts read [T, H], router logits [T, E] ── … ── head ──► logits [T, V]

Modelled: norms, attention over a KV cache (multi-head, grouped, latent; sliding windows), layers that keep a state,
dense MLPs, shared experts, router, residuals, the output matrix. Work and bytes are those of the model; the numbers
are random. Ignored: rotary positions, real key–value contents, sampling, encoder–decoders (refused). A layer without
experts belongs to the next one that has some, and to the head after the last, as in the simulator's tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..base.errors import InputError
from ..specs.models import ModelSpec
from ..specs.models.pass_shape import PassShape
from .device import Device

_STATE_DECAY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixer:
    """Weights and caches of one layer's attention or state."""

    query: tuple[torch.Tensor, ...]
    key_value: torch.Tensor
    output: torch.Tensor
    expand_key: torch.Tensor | None
    expand_value: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Weights of one decoder layer."""

    mixer: _Mixer | None
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    mlp: tuple[torch.Tensor, torch.Tensor] | None
    router: torch.Tensor | None
    norms: torch.Tensor


class DensePart:
    """The dense part of `model` in device memory, for passes up to a largest context, number of tokens and of requests."""

    def __init__(
        self, model: ModelSpec, device: Device, *, dtype: torch.dtype, largest: PassShape, seed: int = 0
    ) -> None:
        if model.cross_attention:
            raise InputError(
                "model", model.name, "encoder–decoders are simulated but not executed", "choose a decoder-only model"
            )
        if model.layer_variants or model.expert_hidden != model.hidden_size:
            rule = "its layers differ in kind, or its experts work on a narrower vector: simulated but not executed"
            raise InputError("model", model.name, rule, "choose a model whose layers are alike")
        self.model, self.device, self.dtype, self.largest = model, device, dtype, largest
        self._seed = seed
        self._layers = [self._make_layer(layer) for layer in range(model.num_layers)]
        self._final_norm = self._ones(model.hidden_size)
        self._head = self._matrix(model.vocab_size, model.hidden_size, "the output matrix")
        rows = min(model.vocab_size, max(4 * largest.tokens, 64))
        self._embedding = device.normal(
            (rows, model.hidden_size), dtype, "embeddings", scale=1.0, seed=self._next_seed()
        )
        self.groups: list[range] = []
        begin = 0
        for layer in model.moe_layers:
            self.groups.append(range(begin, layer + 1))
            begin = layer + 1
        self._tail = range(begin, model.num_layers)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a hidden state [T, H] for each of `rows` [T]; equal rows give equal states."""
        return self._embedding[rows % self._embedding.shape[0]]

    def group(
        self, moe_layer: int, x: torch.Tensor, shape: PassShape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (x, what the experts of MoE layer `moe_layer` read, its router's logits) after the dense part before them."""
        for layer in self.groups[moe_layer]:
            x = self._mix(layer, x, shape)
            weights = self._layers[layer]
            normed = self._norm(x, weights.norms)
            if weights.mlp is not None:
                x = x + self._mlp(normed, weights.mlp)
        router = self._layers[self.groups[moe_layer][-1]].router
        if router is None:
            raise InputError("model", self.model.name, "a MoE layer without a router", "check the model")
        return x, normed, functional.linear(normed, router)

    def head(self, x: torch.Tensor, shape: PassShape) -> torch.Tensor:
        """Return logits [requests + guesses, V] of each request's last token, or of all that it verifies, after the layers that follow
        the last MoE layer.
        """
        for layer in self._tail:
            x = self._mix(layer, x, shape)
            weights = self._layers[layer]
            if weights.mlp is not None:
                x = x + self._mlp(self._norm(x, weights.norms), weights.mlp)
        return self.logits(x[-(shape.requests + shape.guesses) :])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [T, V]: the final norm and the output matrix alone."""
        return functional.linear(self._norm(x, self._final_norm), self._head)

    # --- a layer ----------------------------------------------------------------------------------------------------

    def _mix(self, layer: int, x: torch.Tensor, shape: PassShape) -> torch.Tensor:
        """Return x plus its attention (or state) in decoder layer `layer`."""
        weights = self._layers[layer]
        normed = self._norm(x, weights.norms)
        if weights.state is not None:
            into, out, state = weights.state
            mixed = functional.linear(normed, into)
            held = state[: shape.requests]
            held.mul_(_STATE_DECAY).add_(mixed.mean())
            return x + functional.linear(mixed, out)
        if weights.mixer is None:
            return x
        seen = self.model.attended_tokens(layer, shape.context_tokens, shape.requests)
        return x + self._attention(normed, weights.mixer, shape, seen // shape.requests)

    def _attention(self, h: torch.Tensor, mixer: _Mixer, shape: PassShape, each: int) -> torch.Tensor:
        """Return attention [T, H] of `requests` requests with `each` tokens of context."""
        spec, requests = self.model.attention, shape.requests
        own = shape.tokens // requests
        each = max(each, own)
        query = h
        for matrix in mixer.query:
            query = functional.linear(query, matrix)
        query = query[:, : spec.num_heads * spec.head_dim].view(requests, own, spec.num_heads, spec.head_dim)
        new = functional.linear(h, mixer.key_value)
        keys = mixer.keys[: requests * each].view(requests, each, *mixer.keys.shape[1:])
        values = mixer.values[: requests * each].view(requests, each, *mixer.values.shape[1:])
        if mixer.expand_key is not None and mixer.expand_value is not None:
            # Latent attention: scores and sums are made on the latents themselves.
            plain, turned = query.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
            query = torch.cat([torch.einsum("rthn,hnl->rthl", plain, mixer.expand_key), turned], dim=-1)
            keys[:, each - own :, 0] = new.view(requests, own, -1)
            values = keys[..., : spec.kv_lora_rank]
        else:
            split = spec.num_kv_heads * spec.head_dim
            keys[:, each - own :] = new[:, :split].view(requests, own, spec.num_kv_heads, spec.head_dim)
            values[:, each - own :] = new[:, split:].view(requests, own, spec.num_kv_heads, spec.v_head_dim)
        whole = own == each  # a prompt from its beginning: attention has kernels for that, which need no mask
        mask = self._mask(own, each) if own > 1 and not whole else None
        found = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=own > 1 and whole,
            enable_gqa=keys.shape[2] != query.shape[2],
        ).transpose(1, 2)
        if mixer.expand_value is not None:
            found = torch.einsum("rthl,hlv->rthv", found, mixer.expand_value)
        return functional.linear(found.reshape(shape.tokens, -1), mixer.output)

    def _mask(self, own: int, each: int) -> torch.Tensor:
        """Return bool [own, each]: the last token sees everything, each one before it one token less."""
        if (own, each) not in self._masks:
            self._masks[own, each] = torch.ones(own, each, dtype=torch.bool, device=self.device.place).tril(each - own)
        return self._masks[own, each]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.model.hidden_size,), weight)

    def _mlp(self, h: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        wide = functional.linear(h, matrices[0])
        if self.model.gated:
            gate, up = wide.chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * up, matrices[1])
        return functional.linear(functional.gelu(wide), matrices[1])

    # --- making -----------------------------------------------------------------------------------------------------

    def _make_layer(self, layer: int) -> _Layer:
        model = self.model
        is_moe = layer in model.moe_layers
        width = model.num_shared_experts * model.shared_intermediate_size if is_moe else model.dense_intermediate_size
        halves = 2 if model.gated else 1
        mlp = None
        if width:
            mlp = (
                self._matrix(halves * width, model.hidden_size, "an MLP"),
                self._matrix(model.hidden_size, width, "an MLP"),
            )
        return _Layer(
            mixer=None if model.is_recurrent(layer) else self._make_mixer(layer),
            state=self._make_state() if model.is_recurrent(layer) else None,
            mlp=mlp,
            router=self._matrix(model.num_experts, model.hidden_size, "a router") if is_moe else None,
            norms=self._ones(model.hidden_size),
        )

    def _make_mixer(self, layer: int) -> _Mixer:
        spec, hidden = self.model.attention, self.model.hidden_size
        room = (
            self.model.attended_tokens(layer, self.largest.context_tokens, self.largest.requests) + self.largest.tokens
        )
        wide = spec.num_heads * spec.head_dim * (2 if spec.gated else 1)
        if spec.q_lora_rank is None:
            query: tuple[torch.Tensor, ...] = (self._matrix(wide, hidden, "a query projection"),)
        else:
            query = (
                self._matrix(spec.q_lora_rank, hidden, "a query projection"),
                self._matrix(wide, spec.q_lora_rank, "a query projection"),
            )
        output = self._matrix(hidden, spec.num_heads * spec.v_head_dim, "an output projection")
        if spec.kind == "mla":
            held = spec.kv_lora_rank + spec.qk_rope_head_dim
            keys = self._cache(room, 1, held)
            return _Mixer(
                query=query,
                key_value=self._matrix(held, hidden, "a key–value projection"),
                output=output,
                keys=keys,
                values=keys,
                expand_key=self._heads(spec.num_heads, spec.qk_nope_head_dim, spec.kv_lora_rank),
                expand_value=self._heads(spec.num_heads, spec.kv_lora_rank, spec.v_head_dim),
            )
        return _Mixer(
            query=query,
            key_value=self._matrix(
                spec.num_kv_heads * (spec.head_dim + spec.v_head_dim), hidden, "a key–value projection"
            ),
            output=output,
            expand_key=None,
            expand_value=None,
            keys=self._cache(room, spec.num_kv_heads, spec.head_dim),
            values=self._cache(room, spec.num_kv_heads, spec.v_head_dim),
        )

    def _make_state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        recurrent, hidden = self.model.recurrent, self.model.hidden_size
        if recurrent is None:
            raise InputError(
                "model", self.model.name, "layers with a state and no description of it", "check the model"
            )
        width = max(1, recurrent.matrix_parameters // (2 * hidden))
        state = self.device.normal(
            (self.largest.requests, recurrent.state_values), self.dtype, "a state", scale=1.0, seed=self._next_seed()
        )
        return (
            self._matrix(width, hidden, "a state's projection"),
            self._matrix(hidden, width, "a state's projection"),
            state,
        )

    def _matrix(self, num_rows: int, num_columns: int, what: str) -> torch.Tensor:
        """Return a random matrix that keeps the size of what it multiplies."""
        return self.device.normal(
            (num_rows, num_columns), self.dtype, what, scale=num_columns**-0.5, seed=self._next_seed()
        )

    def _heads(self, num_heads: int, num_rows: int, num_columns: int) -> torch.Tensor:
        shape = (num_heads, num_rows, num_columns)
        return self.device.normal(shape, self.dtype, "a latent expansion", scale=num_rows**-0.5, seed=self._next_seed())

    def _cache(self, num_tokens: int, num_heads: int, width: int) -> torch.Tensor:
        shape = (num_tokens, num_heads, width)
        return self.device.normal(shape, self.dtype, "a KV cache", scale=1.0, seed=self._next_seed())

    def _ones(self, size: int) -> torch.Tensor:
        return self.device.empty((size,), self.dtype, "a norm").fill_(1.0)

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed
