"""The way from a plan document to a folder: what is refused, and that files appear whole or not at all."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from emit_plans import SMALL, complaint, ep_plan, offload_plan
from moeplan.base.errors import InputError, Internal, UnknownName
from moeplan.planner.emit import choices, targets
from moeplan.planner.emit.targets import emit, list_targets, read_back, render, validate
from moeplan.specs.models.load import load_model
from moeplan.specs.plans.document import EXPERT_PARALLEL, OFFLOAD
from moeplan.specs.schedules.parallel import load_ep_preset

PLANS = {"expert-parallel": ep_plan(), "offload": offload_plan(cache__experts_per_layer=2)}


def test_targets_by_kind() -> None:
    assert list_targets("expert-parallel") == ["lmdeploy", "sglang", "trtllm", "vllm", "vllm-ascend", "vllm-hygon"]
    offload = ["accelerate", "kt-kernel", "llamacpp", "mixtral-offloading", "moe-infinity", "sglang", "vllm"]
    assert list_targets("offload") == offload
    assert list_targets() == sorted({*offload, "lmdeploy", "trtllm", "vllm-ascend", "vllm-hygon"})


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"--target = 'sglan': .*did you mean 'sglang'"):
        emit(ep_plan(), "sglan", SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for kind in (EXPERT_PARALLEL, OFFLOAD):
        assert "--target" in complaint(lambda kind=kind: validate("sglan", kind, {}, SMALL))  # type: ignore[misc]
    assert "--target" in complaint(lambda: read_back("sglan", {}, SMALL))


@pytest.mark.parametrize(("kind", "target"), [("expert-parallel", "llamacpp"), ("offload", "trtllm")])
def test_a_plan_of_the_wrong_kind(kind: str, target: str) -> None:
    assert f"takes no {kind} plans; use one of: " in complaint(lambda: render(PLANS[kind], target, SMALL))


def changed(plan: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `plan` with the value at a dotted path replaced, or removed where it is `...`."""
    plan = copy.deepcopy(plan)
    *parents, last = path.split(".")
    table = plan
    for key in parents:
        table = table[key]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    return plan


@pytest.mark.parametrize(
    ("kind", "path", "value", "rule"),
    [
        ("expert-parallel", "kind", "offloading", "did you mean 'offload'?"),
        ("expert-parallel", "kind", ..., "not one of: expert-parallel, offload"),
        ("expert-parallel", "schema_version", 2, "this version reads 1"),
        ("expert-parallel", "schema_version", True, "this version reads 1"),
        ("expert-parallel", "placement", ..., "a key is absent"),
        ("expert-parallel", "placement", [], "not a table"),
        ("expert-parallel", "placement.layers", [1], "placement key = 'layers': not one of"),
        ("expert-parallel", "placement.layer_ids", [0, 1], "the MoE layers of small are [1, 2]"),
        ("expert-parallel", "placement.layer_ids", [1], "the MoE layers of small are [1, 2]"),
        ("expert-parallel", "placement.num_logical", 8, "small has 4 experts a layer"),
        ("expert-parallel", "placement.num_ranks", ..., "not a whole number from 1"),
        ("expert-parallel", "placement.num_ranks", True, "not a whole number from 1"),
        ("expert-parallel", "placement.num_ranks", 4, "not divisible by 4 ranks"),
        ("expert-parallel", "placement.num_ranks", 6, "more ranks than the 4 experts"),
        ("expert-parallel", "placement.num_nodes", 3, "do not divide into equal nodes"),
        ("expert-parallel", "placement.physical_to_logical", None, "not a list of rows"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1, 2, 3]], "small has 2 MoE layers"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1, 2, 3], [0, 1, 2]], "the first row has 4 slots"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1, 2, 3], [0, 1, 2, "3"]], "not an expert id"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1, 2, 3], [0, 1, 2, 2]], "every expert needs a slot"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1, 2, 3], [0, 1, 2, 4]], "expert ids are 0 to 3"),
        ("expert-parallel", "placement.physical_to_logical", [[0, 1], [2, 3]], "fewer slots than the 4 experts"),
        ("expert-parallel", "schedule", ..., "plan: best = '(absent)'"),
        ("expert-parallel", "schedule.pipelines", {}, "did you mean 'pipeline'?"),
        ("expert-parallel", "schedule.pipeline.groups", 2, "schedule key"),
        ("offload", "provenance.trace.num_layers", 3, "small has 2"),
        ("offload", "provenance.trace.num_experts", 64, "small has 4"),
        ("offload", "provenance.memory_bytes", -1, "not a whole number from 1"),
        ("offload", "best.schedule", ..., "not a table"),
        ("offload", "best.schedule.cache.policy", "lruu", "did you mean 'lru'?"),
        ("offload", "best.schedule.cache.experts_per_layer", None, "a cache without a size"),
        ("offload", "best.schedule.cache.experts_per_layer", 5, "small has 8 experts"),
        ("offload", "best.memory_breakdown.items", {}, "not a list of items"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(kind: str, path: str, value: Any, rule: str) -> None:
    plan = changed(PLANS[kind], path, value)
    assert rule in complaint(lambda: render(plan, "sglang", SMALL))


@pytest.mark.parametrize("preset", ["tensor-parallel", "ppmoe", "parm"])
def test_other_parallelisms_of_experts_have_no_placement_over_ranks(preset: str) -> None:
    said = complaint(lambda: render(ep_plan(load_ep_preset(preset)), "vllm", SMALL))
    assert "no placement over all ranks can express it" in said


@pytest.mark.parametrize(
    ("kind", "target"), [(kind, target) for kind in (EXPERT_PARALLEL, OFFLOAD) for target in list_targets(kind)]
)
def test_equal_plans_give_equal_files_and_nothing_beside_them(kind: str, target: str, tmp_path: Path) -> None:
    model = SMALL if target != "mixtral-offloading" else load_model("tiny-moe")
    plan = PLANS[kind] if model is SMALL else offload_plan(model, cache__experts_per_layer=2)
    written = emit(plan, target, model, tmp_path / "a" / "b")
    again = emit(plan, target, model, tmp_path / "again")
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    assert sorted(written) == sorted((tmp_path / "a" / "b").iterdir())
    assert written[-1].name == "NOTES.txt" and written[-1].read_text(encoding="utf-8").endswith("\n")


def test_a_write_that_fails_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {path.name: path.read_bytes() for path in emit(ep_plan(), "sglang", SMALL, tmp_path)}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    rows = [[3, 2, 1, 0], [3, 2, 1, 0]]
    with pytest.raises(InputError, match="no space left on device"):
        emit(ep_plan(physical_to_logical=rows), "sglang", SMALL, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
        assert "output = " in complaint(lambda place=place: emit(ep_plan(), "sglang", SMALL, place))  # type: ignore[misc]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_files_that_break_an_engines_rules_are_our_fault_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = choices.Emission(engine="SGLang", files={"flags.txt": "--no-such-flag\n"}, usage=(), notes=())
    rules = targets.PARALLEL_TARGETS["sglang"].check
    broken = targets.ParallelTarget(render=lambda choice, model: wrong, check=rules)
    monkeypatch.setattr(targets, "PARALLEL_TARGETS", {**targets.PARALLEL_TARGETS, "sglang": broken})
    with pytest.raises(Internal, match="break the engine's rules"):
        emit(ep_plan(), "sglang", SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()
