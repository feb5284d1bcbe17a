"""What costs remember belongs to them alone: costs made from others answer as if nobody had been asked before."""

from __future__ import annotations

import dataclasses

import pytest

from calibration_samples import lawful_samples
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.calibrate.costs.fitted.model import FittedCostModel
from moeplan.calibrate.costs.gpu.costs import KernelCosts
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.sim.parallel.costs import EpCosting
from moeplan.sim.parallel.tiers import constants_of
from moeplan.specs.machines.bundled_kernels import with_kernels
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import ModelSpec, weight_format
from moeplan.specs.models.load import load_model


def _costs(kind: str, model: ModelSpec) -> CostModel:
    if kind == "kernels":
        return load_costs(with_kernels(load_hardware("h200-sxm")), model)
    if kind == "engine":
        return load_costs(compose_text("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"), model)
    return load_costs(load_hardware("h800-sxm"), model)


def _without_shared(model: ModelSpec) -> ModelSpec:
    return dataclasses.replace(model, num_shared_experts=0, shared_intermediate_size=0, shared_gate=False)


def _kinds(kind: type[CostModel]) -> list[type[CostModel]]:
    return [kind, *(each for below in kind.__subclasses__() for each in _kinds(below))]


@pytest.mark.parametrize("kind", ["kernels", "engine", "roofline"])
def test_costs_made_from_others_remember_nothing_of_them(kind: str) -> None:
    model = load_model("deepseek-v2-lite")
    costs, bare = _costs(kind, model), _without_shared(model)
    whole = costs.dense_layer(3, 4096, 4096, 1)
    items = costs.expert_times(8, weight_format("16"), grouped=True)
    made = dataclasses.replace(costs, model=bare)
    assert made.dense_layer(3, 4096, 4096, 1) == _costs(kind, bare).dense_layer(3, 4096, 4096, 1)
    assert made.dense_layer(3, 4096, 4096, 1).seconds < whole.seconds
    narrow = dataclasses.replace(model, expert_intermediate_size=model.expert_intermediate_size // 2)
    other = dataclasses.replace(costs, model=narrow).expert_times(8, weight_format("16"), grouped=True)
    assert (other.seconds < items.seconds).all()


def test_costs_read_from_tables_remember_nothing_of_others() -> None:
    costs = load_costs(fit_profile(lawful_samples()).profile, made_up_model("seen", hidden=768, intermediate=1024))
    assert isinstance(costs, FittedCostModel)
    fmt = weight_format("16")
    before = costs.expert_kernel(1, fmt).seconds
    curve = costs.profile.curves["expert.16"]
    slower = dataclasses.replace(curve, seconds=tuple(2 * each for each in curve.seconds))
    profile = dataclasses.replace(costs.profile, curves={**costs.profile.curves, "expert.16": slower})
    assert dataclasses.replace(costs, profile=profile).expert_kernel(1, fmt).seconds == pytest.approx(
        2 * before, rel=0.05
    )


def test_whatever_a_cost_model_keeps_is_no_argument_of_it() -> None:
    for kind in _kinds(CostModel):
        kept = [each for each in dataclasses.fields(kind) if each.name.startswith("_")]
        assert kept
        assert not any(each.init for each in kept), kind
    assert {CostModel, EngineCosts, KernelCosts, FittedCostModel} <= set(_kinds(CostModel))


@pytest.mark.parametrize("kind", ["kernels", "roofline"])
def test_shared_experts_take_time_beside_the_rest_of_a_layer(kind: str) -> None:
    costs = _costs(kind, load_model("deepseek-v3"))
    costing = EpCosting(costs, constants_of(costs.profile, 1, 8), prefill=False, context_tokens=2048)
    _, shared = costing.dense_s(10, 128, 1)
    # Three matrices of 7168 x 2048 in 16 bits, read at no more than the data sheet's bandwidth.
    assert shared > 3 * 7168 * 2048 * 2 / costs.profile.device.memory_bytes_per_s.value
