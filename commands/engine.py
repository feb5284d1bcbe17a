"""The commands that look serving engines up: which are known, and every constant of one with its source.

Modelled: what is printed, as text and as JSON. Ignored: what predictions make of it (`calibrate.costs.engine_costs`).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..base.terminal import print_json, print_table
from ..reports import numbers
from .options.declarations import JsonFlag


def engine_list(as_json: JsonFlag = False) -> None:
    """List the serving engines that --engine takes."""
    from ..specs.machines.engines import engines

    rows = [engine.to_dict() for engine in engines().values()]
    if as_json:
        print_json({"engines": rows})
        return
    print_table(("name", "backends", "checked", "what it is"),
                [(row["name"], ", ".join(row["backends"]), row["checked"], row["summary"]) for row in rows])  # fmt: skip


def engine_show(
    engine: Annotated[str, typer.Argument(help="Engine by name (moeplan engine list).")], as_json: JsonFlag = False
) -> None:
    """Show what an engine can and cannot do, and its constants on each backend."""
    from ..specs.machines.engines import load_engine, parameter_names, rates
    from ..specs.memory import LAYOUT_WORDS

    found = load_engine(engine)
    constants: list[dict[str, Any]] = [
        {"backend": backend, "name": name, "value": one.value, "relative_uncertainty": one.relative_uncertainty, "source": one.source,
         "citation": one.citation}
        for backend in found.backends
        for name, one in ((name, rates(found.name, backend)[name]) for name in parameter_names())
    ]  # fmt: skip
    if as_json:
        print_json(found.to_dict() | {"constants": constants})
        return
    typer.echo(f"{found.name}: {found.summary} ({found.checked}; {found.source})")
    starts = found.upload_tokens_per_share if found.upload_tokens is None else found.upload_tokens
    per = " × experts / chosen" if found.upload_tokens is None and found.upload_tokens_per_share is not None else ""
    typer.echo(f"experts in host memory are copied to the card from {starts}{per} tokens of a pass on" if starts else
               "experts in host memory are never copied for a pass")  # fmt: skip
    filled = f"; {found.memory_share:.0%} of a card is filled where nobody says" if found.memory_share < 1 else ""
    typer.echo(f"memory: {LAYOUT_WORDS[found.memory_layout]}{filled}")
    if found.gguf:
        off = (
            "; what a card has no room for stays off it in whole layers, as the engine chooses"
            if found.whole_layers
            else ""
        )
        typer.echo(f"models: GGUF files{off}")
    if found.offload:
        typer.echo(f"can be told: {', '.join(found.offload)}")
    for line in found.cannot:
        typer.echo(f"cannot: {line}")
    print_table(
        ("backend", "constant", "value", "±", "taken from"),
        [(one["backend"], one["name"], f"{one['value']:.4g}", numbers.percent(one["relative_uncertainty"], 0), one["citation"])
         for one in constants],
        right=(2, 3),
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(no_args_is_help=True, help="Serving engines that are known: list them, show one.")
    group.command("list")(engine_list)
    group.command("show")(engine_show)
    app.add_typer(group, name="engine")
