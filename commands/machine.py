"""The command that puts a machine together from parts, or sees which ones this computer has.

Modelled: its options and what it prints. Ignored: how parts become constants (`specs/machines/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import InputError
from ..base.terminal import print_json, print_table
from ..base.text_files import check_outputs, write_atomic
from ..base.units import TERA
from ..reports import numbers
from ..specs.machines.profile import profile_to_json
from .options.declarations import EngineOption, JsonFlag


def machine(
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Card: a name (--list gpus), or name:memory=24GiB,bandwidth=936GB/s,fp16=71TFLOPS."),
    ] = None,
    cpu: Annotated[
        str | None, typer.Option("--cpu", help="Processor: a name (--list cpus); '2 x NAME' for two sockets.")
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram", help="Memory over all sockets: ddr5-6000x2:64GiB (MT/s x channels:size), or 2x32GB DDR5-6000."
        ),
    ] = None,
    pcie: Annotated[
        str | None, typer.Option("--pcie", help="The card's slot, e.g. 4.0x16; default: what the card is made for.")
    ] = None,
    disk: Annotated[str | None, typer.Option("--disk", help="Rate of the disk, e.g. 7GB/s.")] = None,
    detect: Annotated[bool, typer.Option("--detect", help="See which parts this computer has.")] = False,
    engine: EngineOption = None,
    parts: Annotated[str | None, typer.Option("--list", help="List the bundled parts instead: gpus or cpus.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Profile to write (.json), for --hardware.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Put a machine together from parts, or detect this one; print it, or write it as a profile."""
    from ..specs.machines.compose import DEFAULT_ENGINE, compose
    from ..specs.machines.engines import load_engine
    from ..specs.machines.notation import describe_parts, parse_parts

    check_outputs({"--output": output}, {})
    named = [gpu, cpu, ram, None if pcie is None else f"pcie-{pcie}", None if disk is None else f"disk:{disk}"]
    if parts is not None:
        _list(parts, as_json)
        return
    unseen: list[str] = []
    if detect:
        if any(one is not None for one in named):
            raise InputError("--detect", "with parts", "parts are either seen or named", "give one of the two")
        from ..specs.machines.detect import detect as see

        seen = see()
        found, unseen = seen.parts, seen.unseen
    else:
        text = " + ".join(one for one in named if one is not None)
        if not text:
            raise InputError("--gpu", None, "no part is named", "name a card, a processor, or --detect")
        found = parse_parts(text)
    profile = compose(found, load_engine(engine or DEFAULT_ENGINE))
    if output is not None:
        write_atomic(output, profile_to_json(profile))
    document: dict[str, Any] = {
        "name": profile.name, "parts": describe_parts(found), "description": profile.description, "unseen": unseen,
        "engine": None if profile.engine is None else profile.engine.name,
        "cards": [{"name": card.name, "memory_bytes": card.device.memory_bytes.value,
                   "memory_bytes_per_s": card.device.memory_bytes_per_s.value,
                   "link_reached_bytes_per_s": card.host_to_device.pinned_bytes_per_s.value} for card in profile.cards],
        "memory_bytes": profile.memory_bytes, "memory_bytes_per_s": profile.device.memory_bytes_per_s.value,
        "float16_flops_per_s": profile.device.peak_flops_per_s["float16"].value,
        "host_memory_bytes": profile.host.memory_bytes.value,
        "host_memory_reached_bytes_per_s": None if profile.host.cpu is None else profile.host.cpu.memory_bytes_per_s.value,
        "link_reached_bytes_per_s": profile.host_to_device.pinned_bytes_per_s.value,
        "output": None if output is None else str(output),
    }  # fmt: skip
    if as_json:
        print_json(document)
        return
    typer.echo(f'--hardware "{document["parts"]}"')
    typer.echo(profile.description)
    for number, card in enumerate(document["cards"]):
        typer.echo(f"card {number}: {card['name']}, {numbers.size(card['memory_bytes'])} at {numbers.rate(card['memory_bytes_per_s'])}, "
                   f"{numbers.rate(card['link_reached_bytes_per_s'])} over its link")  # fmt: skip
    if profile.links is not None and profile.links.card_bytes_per_s is not None:
        typer.echo(f"between cards ({profile.links.kind}): {numbers.rate(profile.links.card_bytes_per_s.value)}")
    typer.echo(
        f"device memory {numbers.size(document['memory_bytes'])} at {numbers.rate(document['memory_bytes_per_s'])}; "
        f"host memory {numbers.size(document['host_memory_bytes'])}, of which this engine reads "
        f"{numbers.rate(document['host_memory_reached_bytes_per_s'] or 0)}, "
        f"and {numbers.rate(document['link_reached_bytes_per_s'])} over the link"
    )
    for line in unseen:
        typer.echo(f"not seen: {line}")
    if output is not None:
        typer.echo(f"written: {output}")


def _list(kind: str, as_json: bool) -> None:
    """Print the bundled parts of a kind."""
    from ..base.errors import UnknownName
    from ..specs.machines.catalogue import cpu_parts, gpu_parts

    if kind == "gpus":
        gpus = {part.name: part for part in gpu_parts().values()}
        rows: list[dict[str, Any]] = [{"name": one.name, "memory_bytes": one.memory_bytes, "memory_bytes_per_s": one.bandwidth_bytes_per_s,
                 "float16_flops_per_s": one.float16_flops_per_s, "pcie": one.pcie, "unified_memory": one.unified_memory,
                 "architecture": one.architecture, "units": one.units, "boost_ghz": one.boost_ghz,
                 "memory_bus_bits": one.memory_bus_bits, "memory_gbit_per_s": one.memory_gbit_per_s,
                 "relative_uncertainty": one.uncertainty, "source": one.source} for one in gpus.values()]  # fmt: skip
        if as_json:
            print_json({"gpus": rows})
            return
        print_table(
            ("name", "memory", "bandwidth", "16-bit", "link", "source"),
            [(row["name"], numbers.size(row["memory_bytes"]), numbers.rate(row["memory_bytes_per_s"]),
              f"{row['float16_flops_per_s'] / TERA:g} TFLOP/s", row["pcie"] or "unified", row["source"]) for row in rows],
            right=(1, 2, 3),
        )  # fmt: skip
    elif kind == "cpus":
        cpus = {part.name: part for part in cpu_parts().values()}
        listed = [{"name": one.name, "cores": one.cores, "all_core_ghz": one.all_core_ghz, "vector": one.vector, "memory": one.memory,
                   "channels": one.channels, "max_mt_per_s": one.max_mt_per_s, "source": one.source} for one in cpus.values()]  # fmt: skip
        if as_json:
            print_json({"cpus": listed})
            return
        keys = ("name", "cores", "all_core_ghz", "vector", "memory", "channels", "max_mt_per_s")
        print_table(
            ("name", "cores", "GHz", "vector", "memory", "channels", "MT/s"),
            [tuple(row[key] for key in keys) for row in listed],
            right=(1, 2, 5, 6),
        )  # fmt: skip
    else:
        raise UnknownName("--list", kind, ("gpus", "cpus"))


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(machine)
