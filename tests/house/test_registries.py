"""What people add is a line in a table: each table's names lead to something, and a name outside it is answered with the list."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from moeplan.api.simulate import SIMULATORS, simulate
from moeplan.base.errors import InputError
from moeplan.papers.registry import PAPERS, reproduce
from moeplan.planner.emit.names import ENGINES
from moeplan.planner.emit.targets import TARGETS, render
from moeplan.specs.catalog.schedules import OFFLOAD, PARALLEL
from moeplan.specs.machines.engines import engines, load_engine
from moeplan.specs.machines.load import load_machine
from moeplan.specs.models.load import list_models, load_model
from moeplan.specs.schedules.offload import CACHE_POLICIES, PREDICTORS, OffloadSchedule
from moeplan.specs.schedules.parallel import EP_PRESETS, load_ep_preset
from moeplan.specs.schedules.presets import FAMILIES, PRESETS, load_preset
from moeplan.traces.kinds import READERS
from moeplan.traces.readers import import_trace, reader_options

TABLES: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "readers": (READERS, lambda name: import_trace(name, "absent")),
    "papers": (PAPERS, lambda name: reproduce(name)),
    "engine targets": (ENGINES, lambda name: render({}, name, load_model("tiny-moe"))),
    "serving engines": (engines(), load_engine),
    "presets": (PRESETS, load_preset),
    "parallel presets": (EP_PRESETS, load_ep_preset),
    "models": (list_models(), load_model),
    "cache policies": (CACHE_POLICIES, lambda name: OffloadSchedule().with_options(cache__policy=name)),
    "predictors": (PREDICTORS, lambda name: OffloadSchedule().with_options(predictor__kind=name)),
    "simulators": (SIMULATORS, lambda name: simulate("tiny-moe", "t4", trace="bundled", simulator=name)),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_name_outside_a_table_is_answered_with_the_names_in_it(table: str) -> None:
    names, ask = TABLES[table]
    with pytest.raises(InputError) as refused:
        ask("no-such-name")
    said = str(refused.value)
    if len(names) <= 40:
        assert all(name in said for name in names)
    else:  # of long tables those that are near, and how many there are
        assert f"({len(names)} names)" in said and any(name in said for name in names)


def test_a_machine_outside_the_catalogue_is_answered_with_near_ones() -> None:
    with pytest.raises(InputError, match="rtx-4090"):
        load_machine("rtx-4099")


def test_every_line_leads_somewhere() -> None:
    for kind in READERS:
        assert "hidden_layers" in reader_options(kind)
    for name in PAPERS:
        assert importlib.import_module(f"moeplan.papers.{name.replace('-', '_')}")
    assert set(TARGETS) == set(ENGINES)
    assert set(PRESETS) == set(FAMILIES) == set(OFFLOAD) and set(EP_PRESETS) == set(PARALLEL)
