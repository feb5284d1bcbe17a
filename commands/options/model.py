"""The commands that look models up: which are bundled, and what a configuration says once it is read.

Modelled: what is printed, as text and as JSON. Ignored: reading configurations (`specs.models`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ...base.terminal import print_json, print_table
from ...base.units import GIGA, MEGA
from ...reports import numbers
from ...specs.models import BITS_PER_BYTE, ModelSpec, weight_format
from .bounds import CONTEXT_TOKENS, between
from .declarations import JsonFlag

_CONTEXT = 4096


def model_list(as_json: JsonFlag = False) -> None:
    """List the bundled models; --model takes one of these names, a config.json, a checkpoint's folder, or a .gguf file."""
    from ...specs.models.load import list_models, load_model

    rows = [_summary(load_model(name)) for name in list_models()]
    if as_json:
        print_json({"models": rows})
        return
    print_table(
        ("name", "parameters", "active", "MoE layers", "experts", "top-k", "an expert", "stored as", "family"),
        [
            (row["name"], _billions(row["total_parameters"]), _billions(row["active_parameters"]), row["num_moe_layers"],
             row["num_routed_experts"], row["top_k"], numbers.size(row["expert_bytes"]), row["native_bits"], row["family"])
            for row in rows
        ],
        right=(1, 2, 3, 4, 5, 6),
    )  # fmt: skip


def model_show(
    model: Annotated[
        str,
        typer.Argument(
            help="Bundled model name (moeplan model list), a config.json, a checkpoint's folder, or a .gguf."
        ),
    ],
    context: Annotated[
        int,
        typer.Option(
            "--context",
            help="Tokens of context to state the KV cache for.",
            callback=between(1, CONTEXT_TOKENS, "tokens"),
        ),
    ] = _CONTEXT,
    as_json: JsonFlag = False,
) -> None:
    """Show what a model consists of: parameters, experts and their bytes, what a context takes."""
    from ...specs.models.load import load_model
    from ...specs.provenance import content_sha256

    spec = load_model(model)
    document = _summary(spec) | _details(spec, context) | {"sha256": content_sha256(dataclasses.asdict(spec))}
    if as_json:
        print_json(document)
        return
    how, bits = weight_format(spec.native_bits).description, document["expert_bits_per_weight"]
    cache, a_token = numbers.size(document["kv_bytes"]), document["kv_bytes_per_token"]
    shared = f", {spec.num_shared_experts} shared" if spec.num_shared_experts else ""
    nothing = f", {spec.zero_experts} that do nothing" if spec.zero_experts else ""
    typer.echo(f"{spec.name} ({spec.family})")
    rows: list[tuple[str, object]] = [
        ("parameters", f"{_billions(spec.total_parameters)}, of which a token meets {_billions(spec.active_parameters)}"),
        ("layers", _layers(spec)),
        ("experts", f"{spec.num_experts} in each of {spec.num_moe_layers} layers, {spec.top_k} for a token{shared}{nothing}"),
        ("an expert", f"{numbers.size(document['expert_bytes'])}: {spec.expert_parameters:,} parameters, {bits:.3f} bits each ({how})"),
        ("all experts", numbers.size(document["routed_experts_bytes"])),
        ("the rest", _the_rest(spec, document)),
        ("KV cache", f"{cache} for {context:,} tokens at 16 bits: {a_token:,} bytes a token{_bounded(document)}"),
    ]  # fmt: skip
    rows += [("note", remark) for remark in spec.remarks]
    print_table(("", ""), rows)


def _the_rest(spec: ModelSpec, document: dict[str, Any]) -> str:
    """Return what everything but experts takes: as its file stores it, and at 16 bits."""
    native = weight_format(spec.native_dense_bits)
    sixteen = f"{numbers.size(document['dense_bytes'])} at 16 bits"
    if spec.native_dense_bits == "16":
        return sixteen
    return f"{numbers.size(spec.dense_bytes(native))} as stored ({native.description}); {sixteen}"


def _summary(spec: ModelSpec) -> dict[str, Any]:
    """Return what tells models apart."""
    expert_bytes = spec.expert_bytes(weight_format(spec.native_bits))
    return {
        "name": spec.name,
        "family": spec.family,
        "total_parameters": spec.total_parameters,
        "active_parameters": spec.active_parameters,
        "num_layers": spec.num_layers,
        "num_moe_layers": spec.num_moe_layers,
        "num_routed_experts": spec.num_experts,
        "top_k": spec.top_k,
        "num_shared_experts": spec.num_shared_experts,
        "expert_bytes": expert_bytes,
        "expert_bits_per_weight": expert_bytes * BITS_PER_BYTE / spec.expert_parameters,
        "kv_bytes_per_token": spec.kv_bytes_per_token(),
        "native_bits": spec.native_bits,
    }


def _details(spec: ModelSpec, context: int) -> dict[str, Any]:
    """Return what else is known of a model."""
    sixteen = weight_format("16")
    return {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "moe_layers": list(spec.moe_layers),
        "expert_parameters": spec.expert_parameters,
        "expert_intermediate_size": spec.expert_intermediate_size,
        "expert_hidden_size": spec.expert_hidden,
        "shared_intermediate_size": spec.shared_intermediate_size,
        "dense_intermediate_size": spec.dense_intermediate_size,
        "zero_experts": spec.zero_experts,
        "native_dense_bits": spec.native_dense_bits,
        "routed_experts_bytes": spec.num_routed_experts * spec.expert_bytes(weight_format(spec.native_bits)),
        "dense_bytes": spec.dense_bytes(sixteen),
        "attention": spec.attention.kind,
        "num_full_attention_layers": _count(spec, "full"),
        "num_sliding_layers": _count(spec, "sliding"),
        "sliding_window": spec.sliding_window,
        "num_state_layers": len(spec.recurrent_layers),
        "state": None if spec.recurrent is None else spec.recurrent.kind,
        "context_tokens": context,
        "kv_bytes": spec.kv_bytes(context),
        "kv_window_bytes": spec.window_bytes(),
        "kv_state_bytes": 2 * spec.state_values,
        "remarks": list(spec.remarks),
    }


def _count(spec: ModelSpec, kind: str) -> int:
    """Return how many layers have attention with a window (sliding) or without one (full)."""
    attending = [layer for layer in range(spec.num_layers) if spec.attention_of(layer) is not None]
    return sum((spec.window_of(layer) is not None) == (kind == "sliding") for layer in attending)


def _layers(spec: ModelSpec) -> str:
    """Return the layers in words."""
    full, sliding, states = _count(spec, "full"), _count(spec, "sliding"), len(spec.recurrent_layers)
    kinds = [f"{full} with full attention ({spec.attention.kind})"] if full else []
    kinds += [f"{sliding} with a window of {spec.sliding_window} tokens"] if sliding else []
    kinds += [f"{states} with a state ({spec.recurrent.kind.replace('_', ' ')})"] if spec.recurrent and states else []
    rest = spec.num_layers - full - sliding - states
    kinds += [f"{rest} without attention"] if rest else []
    encoder = f"; an encoder of {spec.num_encoder_layers}" if spec.num_encoder_layers else ""
    return f"{spec.num_layers}: {', '.join(kinds)}{encoder}"


def _bounded(document: dict[str, Any]) -> str:
    """Return what of a cache does not grow with the context, in words."""
    parts = [(document["kv_window_bytes"], "windows"), (document["kv_state_bytes"], "states")]
    words = [f"{numbers.size(count)} of {what}" for count, what in parts if count]
    return "".join(f", {word}" for word in words)


def _billions(count: int) -> str:
    return f"{count / GIGA:.2f} B" if count >= GIGA / 10 else f"{count / MEGA:.1f} M"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(no_args_is_help=True, help="Models that are known: list them, show what one consists of.")
    group.command("list")(model_list)
    group.command("show")(model_show)
    app.add_typer(group, name="model")
