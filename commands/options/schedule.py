"""The commands that look schedules up: which presets there are, who published them, and the options each sets.

Modelled: offload presets and parallel presets, told apart where both have a name; what is printed, as text and as JSON. Ignored: what
options do (they say it where they are declared).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ...base.errors import UnknownName
from ...base.terminal import print_json, print_table
from ...specs.catalog.schedules import OFFLOAD, PARALLEL
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, load_ep_preset
from ...specs.schedules.presets import FAMILIES, NEEDS, PRESETS, load_preset
from .declarations import JsonFlag

_KINDS = ("offload", "parallel")
KindOption = Annotated[
    str | None, typer.Option("--kind", help="offload (one device) or parallel (many); default: both.")
]


def schedule_list(kind: KindOption = None, as_json: JsonFlag = False) -> None:
    """List the presets: published schedules by the names that --schedule takes, and those a parallel plan is compared with."""
    rows = [_facts(name, one) for one in _kinds(kind) for name in (PRESETS if one == "offload" else EP_PRESETS)]
    if as_json:
        print_json({"schedules": rows})
        return
    cells = [(row["name"], row["kind"], row["family"], _sentence(row)) for row in rows]
    print_table(("name", "kind", "family", "what it does [published]"), cells)


def _sentence(row: Mapping[str, Any]) -> str:
    """Return what a preset does, what it needs, and where it is published."""
    needs = f"; needs {row['needs']}" if row["needs"] else ""
    return f"{row['what']}{needs}" + (f" [{row['citation']}]" if row["citation"] else "")


def schedule_show(
    name: Annotated[str, typer.Argument(help="Preset, from moeplan schedule list; n-cpu-moe=N is one too.")],
    kind: KindOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show a preset: what it does, who published it, and the options it sets (--set changes them)."""
    known = {"offload": name.partition("=")[0] in PRESETS, "parallel": name in EP_PRESETS}
    found = [one for one in _kinds(kind) if known[one]]
    if not found:
        names = {"offload": PRESETS, "parallel": EP_PRESETS}
        raise UnknownName("schedule", name, {each for one in _kinds(kind) for each in names[one]})
    documents = []
    for one in found:
        schedule = load_preset(name) if one == "offload" else load_ep_preset(name)
        facts = _facts(name.partition("=")[0], one) | {"name": name}
        documents.append(facts | {"sets": _sets(schedule), "options": schedule.to_dict()})
    if as_json:
        print_json({"schedules": documents})
        return
    for document in documents:
        typer.echo(f"{document['name']} ({document['kind']}): {document['what']}")
        for title, key in (("family", "family"), ("published", "citation"), ("needs", "needs")):
            if document[key]:
                typer.echo(f"  {title:10} {document[key]}")
        for option, value in document["sets"].items():
            typer.echo(
                f"  sets       {option}={str(value).lower() if value is None or value is True or value is False else value}"
            )
        if not document["sets"]:
            typer.echo("  sets       nothing: these are the defaults")


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return _KINDS
    if kind not in _KINDS:
        raise UnknownName("--kind", kind, _KINDS)
    return (kind,)


def _facts(name: str, kind: str) -> dict[str, Any]:
    about = (OFFLOAD if kind == "offload" else PARALLEL)[name]
    offload = kind == "offload"
    return {
        "name": name, "kind": kind, "family": FAMILIES[name] if offload else None, "what": about.what,
        "citation": about.citation or None, "needs": NEEDS.get(name) if offload else None,
    }  # fmt: skip


def _sets(schedule: OffloadSchedule | ExpertParallelSchedule) -> dict[str, Any]:
    """Return the options that differ from the defaults, by dotted key."""
    usual: Mapping[str, Any] = type(schedule)().to_dict()
    return {
        f"{section}.{key}": value
        for section, options in schedule.to_dict().items()
        if isinstance(options, dict)
        for key, value in options.items()
        if value != usual[section][key]
    }


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(no_args_is_help=True, help="Published schedules: list them, show what each sets.")
    group.command("list")(schedule_list)
    group.command("show")(schedule_show)
    app.add_typer(group, name="schedule")
