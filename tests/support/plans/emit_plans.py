"""Plan documents small enough to read, for the tests of emitted configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeplan.base.errors import InputError
from moeplan.planner.emit.targets import emit
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.parallel import ExpertParallelSchedule

# Three hidden layers, the first one dense.
SMALL = dataclasses.replace(
    load_model("deepseek-v2-lite"),
    name="small",
    family="deepseek_v3",
    num_layers=3,
    moe_layers=(1, 2),
    num_experts=4,
    top_k=2,
)
ROWS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]
SCHEDULE = ExpertParallelSchedule(name="search").with_options(placement__policy="search", placement__num_redundant=2)


def ep_plan(schedule: ExpertParallelSchedule = SCHEDULE, **placement: Any) -> dict[str, Any]:
    """Return an expert-parallel plan of SMALL on two ranks of one node; `placement` replaces keys, None removes them."""
    keys = {"physical_to_logical": ROWS, "num_ranks": 2, "num_nodes": 1, "layer_ids": [1, 2]} | placement
    return {
        "kind": "expert-parallel",
        "schema_version": 1,
        "placement": {key: value for key, value in keys.items() if value is not None},
        "schedule": schedule.to_dict(),
        "provenance": {"model": "small", "trace": {"layer_ids": [1, 2]}},
    }


def offload_plan(model: ModelSpec = SMALL, **options: Any) -> dict[str, Any]:
    """Return an offload plan of `model` whose schedule has `options`, on a budget of a million bytes."""
    memory_breakdown = {"runtime": 100_000, "dense weights": 200_000, "resident experts": 300_000, "kv cache": 50_000}
    items = [{"name": name, "place": "device", "bytes": size, "note": ""} for name, size in memory_breakdown.items()]
    items.append({"name": "expert store", "place": "host", "bytes": 900_000, "note": ""})
    return {
        "kind": "offload",
        "schema_version": 1,
        "provenance": {
            "model": model.name,
            "memory_bytes": 1_000_000,
            "trace": {"num_layers": model.num_moe_layers, "num_experts": model.num_experts},
        },
        "best": {
            "schedule": OffloadSchedule(name="best").with_options(**options).to_dict(),
            "memory_breakdown": {"items": items},
        },
    }


def emitted(folder: Path, plan: dict[str, Any], target: str, model: ModelSpec = SMALL) -> dict[str, str]:
    """Return the text of every emitted file by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in emit(plan, target, model, folder)}


def notes_of(text: str) -> list[str]:
    """Return the lines of a NOTES file after its last heading."""
    return [line.removeprefix("- ") for line in text.partition("cannot:\n")[2].splitlines()]


def complaint(call: Callable[[], object]) -> str:
    """Return the one line with which `call` refuses its input."""
    try:
        call()
    except InputError as refused:
        assert len(str(refused).splitlines()) == 1
        return str(refused)
    raise AssertionError("the input was taken")
