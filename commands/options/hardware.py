"""The commands that look machines up: which are bundled, and every constant of one with its source and uncertainty.

Modelled: what is printed, as text and as JSON. Ignored: reading profiles (`specs.machines`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ...base.terminal import print_json, print_table
from ...reports import numbers
from ...specs.machines.profile import Profile
from .declarations import JsonFlag


def hardware_list(as_json: JsonFlag = False) -> None:
    """List the bundled machines; --hardware takes one of these names, or a profile.json."""
    from ...specs.machines.profile_file import list_hardware, load_hardware

    rows = [_summary(load_hardware(name)) for name in list_hardware()]
    if as_json:
        print_json({"hardware": rows})
        return
    print_table(
        ("name", "memory", "bandwidth", "from host", "host memory", "in a server", "description"),
        [
            (row["name"], numbers.size(row["memory_bytes"]), numbers.rate(row["memory_bytes_per_s"]),
             numbers.rate(row["host_to_device_bytes_per_s"]), numbers.size(row["host_memory_bytes"]), row["num_gpus"],
             row["description"])
            for row in rows
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip


def hardware_show(
    hardware: Annotated[str, typer.Argument(help="Bundled machine name (moeplan hardware list), or a profile.json.")],
    as_json: JsonFlag = False,
) -> None:
    """Show every constant of a machine, with its uncertainty, its source and where it was taken from."""
    from ...base.units import unit_of
    from ...specs.machines.bundled_kernels import kernel_machines
    from ...specs.machines.load import load_machine
    from ...specs.provenance import machine_sha256

    profile = load_machine(hardware)
    known = kernel_machines().get(profile.name, ()) if profile.kernels is None else ()
    kernels = _kernels(profile)
    constants: list[dict[str, Any]] = [
        {"name": name, "value": one.value, "unit": unit_of(name), "relative_uncertainty": one.relative_uncertainty,
         "source": one.source, "citation": one.citation}
        for name, one in profile.constants()
    ]  # fmt: skip
    tables: list[dict[str, Any]] = [
        {"name": name, "num_points": len(one.seconds), "arguments": list(one.arguments),
         "relative_uncertainty": one.relative_uncertainty, "source": one.source, "citation": one.citation}
        for name, one in profile.curves.items()
    ]  # fmt: skip
    if as_json:
        more = {"kind": profile.device.kind, "host_shares_compute": profile.device.host_shares_compute, "samples": profile.samples,
                "sha256": machine_sha256(profile)}  # fmt: skip
        print_json(_summary(profile) | more | {"constants": constants, "tables": tables, "kernels": kernels})
        return
    typer.echo(f"{profile.name}: {profile.description}")
    rows: list[tuple[str, ...]] = [
        (one["name"], numbers.constant(one["name"], one["value"]), numbers.percent(one["relative_uncertainty"], 0),
         one["source"], one["citation"])
        for one in constants
    ]  # fmt: skip
    rows += [
        (f"curves.{one['name']}", f"{one['num_points']} points", numbers.percent(one["relative_uncertainty"], 0),
         one["source"], one["citation"])
        for one in tables
    ]  # fmt: skip
    rows += [
        (f"kernels.{one['name']}", numbers.constant("start_s", one["constants"]["start_s"]),
         numbers.percent(one["relative_uncertainty"], 0), one["source"],
         f"{one['kernel']}, what it takes at least (--json has all of its constants)")
        for one in kernels
    ]  # fmt: skip
    print_table(("constant", "value", "±", "source", "taken from"), rows, right=(1, 2))
    if known:
        typer.echo(
            f"kernels of {', '.join(known)} were measured on this card: expert-parallel plans go by them (--engine)"
        )


def _kernels(profile: Profile) -> list[dict[str, Any]]:
    """Return the measured kernels of a profile, each with its constants."""
    found = profile.kernels
    if found is None:
        return []
    return [
        {"name": name, "kernel": kernel.name, "relative_uncertainty": kernel.relative_uncertainty, "source": found.source,
         "citation": found.citation, "constants": {key: value for key, value in dataclasses.asdict(kernel).items()
                                                   if isinstance(value, (int, float)) and key != "relative_uncertainty"}}
        for name, kernel in found.kernels()
    ]  # fmt: skip


def _summary(profile: Profile) -> dict[str, Any]:
    """Return what tells machines apart."""
    node = profile.node
    return {
        "name": profile.name,
        "description": profile.description,
        "memory_bytes": profile.device.memory_bytes.value,
        "memory_bytes_per_s": profile.device.memory_bytes_per_s.value,
        "host_to_device_bytes_per_s": profile.host_to_device.pinned_bytes_per_s.value,
        "host_memory_bytes": profile.host.memory_bytes.value,
        "num_gpus": 1 if node is None else node.num_gpus,
    }


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(
        no_args_is_help=True, help="Machines that are known: list them, show every constant with its source."
    )
    group.command("list")(hardware_list)
    group.command("show")(hardware_show)
    app.add_typer(group, name="hardware")
