"""What the GPU stages run: models of real expert shapes, recordings made for them, and tiny ones for a dry run.

Modelled: sizes of experts, number of experts and choices are those of the published models, and so is the vocabulary; attention's
matrices have Mixtral-8x7B's sizes, with twice its heads of half their width. Routing is synthetic (dials of published localities).
Ignored: real weights; real text. Switch-Large is an encoder–decoder; here its experts stand in a decoder-only model with as many MoE
blocks in every second layer.
"""

from __future__ import annotations

import dataclasses

from moeplan.base.units import GIB
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.specs.models import ModelSpec
from moeplan.traces.recording import RoutingTrace
from moeplan.traces.synthesis.dial import Dials, change_dials
from moeplan.traces.synthesis.presets import MIXTRAL_8X7B
from moeplan.traces.synthesis.synthesise import synth_trace

# Of the host's available memory, this share may hold experts: page-locked memory cannot be swapped.
_STORE_FRACTION = 0.6


def mixtral(num_layers: int, *, dry: bool) -> ModelSpec:
    """Return a model of Mixtral-8x7B's sizes (its configuration on Hugging Face) with `num_layers` layers."""
    hidden, intermediate, vocab = (256, 256, 512) if dry else (4096, 14_336, 32_000)
    return made_up_model(
        f"{num_layers} layers of Mixtral-8x7B's shapes",
        hidden=hidden,
        intermediate=intermediate,
        num_layers=num_layers,
        num_experts=8,
        top_k=2,
        vocab=vocab,
    )


def switch_large(num_blocks: int, *, dry: bool) -> ModelSpec:
    """Return a decoder with Switch-Large-128's experts (two plain matrices, ReLU; top-1) in every second layer."""
    hidden, intermediate, vocab, experts = (256, 256, 512, 8) if dry else (1024, 4096, 32_128, 128)
    plain = made_up_model(
        f"{num_blocks} MoE blocks of Switch-Large-128's shapes",
        hidden=hidden,
        intermediate=intermediate,
        num_layers=2 * num_blocks,
        num_experts=experts,
        top_k=1,
        vocab=vocab,
    )
    return dataclasses.replace(
        plain, moe_layers=tuple(range(1, 2 * num_blocks, 2)), gated=False, dense_intermediate_size=intermediate
    )


def mixtral_trace(num_layers: int, *, prompt: int, decode: int, seed: int) -> RoutingTrace:
    """Return one request with Mixtral's published locality, whose next gate's guesses are recorded."""
    return _trace(MIXTRAL_8X7B, num_layers, 8, 2, prompt, decode, seed)


def switch_trace(num_blocks: int, num_experts: int, *, prompt: int, decode: int, seed: int) -> RoutingTrace:
    """Return one request that chooses one of `num_experts` experts, without locality beyond the dials' defaults."""
    plain = Dials(num_layers=num_blocks, num_experts=num_experts, top_k=1)
    return _trace(plain, num_blocks, num_experts, 1, prompt, decode, seed)


def layers_that_fit(wanted: int, num_experts: int, slot_bytes: int, host_bytes: int, least: int = 2) -> int:
    """Return how many of `wanted` layers' experts the host can hold, page-locked; at least `least`, whatever then happens."""
    room = int(host_bytes * _STORE_FRACTION) - GIB
    return max(least, min(wanted, room // (num_experts * slot_bytes)))


def _trace(
    dials: Dials, num_layers: int, num_experts: int, top_k: int, prompt: int, decode: int, seed: int
) -> RoutingTrace:
    changed = change_dials(
        dials,
        {
            "num_layers": num_layers,
            "num_experts": num_experts,
            "top_k": top_k,
            "prompt_tokens": (prompt,),
            "decode_tokens": (decode,),
        },
    )
    return synth_trace(changed, num_requests=1, seed=seed)
