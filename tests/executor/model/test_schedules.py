"""A real model under every kind of schedule: what it computes does not depend on the schedule, and its counts are the simulator's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from moeplan.base.errors import InputError
from moeplan.calibrate.costs.load import load_costs
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.fitting.fitter import HOST_PARTS
from moeplan.executor.model.calibrate import extent_for, model_samples
from moeplan.executor.model.figures import differences, replayed
from moeplan.executor.model.outcome import ModelRun
from moeplan.executor.model.prices import prices_for
from moeplan.executor.model.session import Loaded, open_model, run_model, silent
from moeplan.executor.validation import validate_model
from moeplan.executor.validation.validate import compare
from moeplan.executor.validation.validate_model import runnable_cases, with_truths
from moeplan.sim.offload.simulators import first_difference, run_simpy
from moeplan.sim.timeline import H2D, ROW_LANE
from moeplan.specs.machines.load import load_machine
from moeplan.specs.machines.profile import Constant, DiskConstants, Profile
from moeplan.specs.schedules.offload import OffloadSchedule

pytest.importorskip("transformers")
from calibration_samples import lawful_samples
from tiny_models import build, save

PROMPTS = [list(b"def main():"), list(b"It was the best of times")]
NEW = 5
PLAIN: dict[str, Any] = {
    "experts__bits": "32",
    "kernel__grouping": "per-expert",
    "predictor__kind": "none",
    "predictor__staging": 0,
}
NEXT: dict[str, Any] = {"predictor__kind": "next-gate", "predictor__depth": 2, "predictor__width": 3}
SCHEDULES: dict[str, dict[str, Any]] = {
    "LRU on one stream": {"cache__policy": "lru", "cache__experts_per_layer": 3, "copy__overlap": False, "copy__write_back": True},
    "static": {"cache__policy": "static", "cache__experts_per_layer": 3},
    "static pool": {"cache__policy": "static", "cache__pooled_experts": 9, "kernel__grouping": "grouped"},
    "static by place": {"cache__policy": "static", "cache__placement": "back", "cache__pooled_experts": 8},
    "static with staged guesses": {"cache__policy": "static", "cache__experts_per_layer": 3, **NEXT, "predictor__staging": 4},
    "static on one stream": {"cache__policy": "static", "cache__pooled_experts": 9, "copy__overlap": False},
    "static in pieces": {"cache__policy": "static", "cache__experts_per_layer": 2, **NEXT, "predictor__staging": 4,
                         "copy__chunk_bytes": 8192},
    "misses on the cores": {"cache__policy": "static", "cache__pooled_experts": 8, "kernel__miss": "cpu", "kernel__grouping": "grouped"},
    "more of the first layer": {"cache__policy": "lfu", "cache__experts_per_layer": 2, "cache__first_layer_extra": 3, **NEXT},
    "nothing kept": {"cache__policy": "none", **NEXT},
    "guesses that pay": {"cache__policy": "lru", "cache__pooled_experts": 8, **NEXT, "predictor__benefit": True},
    "from disk": {"cache__policy": "lru", "cache__experts_per_layer": 3, **NEXT, "copy__host_experts": 10},
    "static from disk": {"cache__policy": "static", "cache__experts_per_layer": 3, "copy__host_experts": 10},
    "merit": {"cache__policy": "lfuda", "cache__pooled_experts": 8, **NEXT, "predictor__staging": 2},
}  # fmt: skip


def schedule(name: str) -> OffloadSchedule:
    return OffloadSchedule(name="test").with_options(**PLAIN | SCHEDULES[name])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with open_model(save(build("mixtral"), tmp_path_factory.mktemp("mixtral"))) as found:
        yield found


@pytest.fixture(scope="module")
def popularity(loaded: Loaded) -> np.ndarray:
    shape = (loaded.spec.num_moe_layers, loaded.spec.num_experts)
    return np.random.default_rng(3).integers(1, 99, shape)


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> list[torch.Tensor]:
    """Logits of the same prompts with every expert on the device."""
    everything = OffloadSchedule(name="all").with_options(
        **PLAIN, cache__policy="lru", cache__experts_per_layer=loaded.spec.num_experts
    )
    return list(run_model(loaded, everything, PROMPTS, max_new_tokens=NEW, keep_logits=True).logits)


def machine() -> Profile:
    """A machine with a disk."""
    rate, start = (
        Constant(value=value, source="assumed", citation="a test", relative_uncertainty=0.1) for value in (2e9, 1e-4)
    )
    return dataclasses.replace(load_machine("t4"), disk=DiskConstants(read_bytes_per_s=rate, latency_s=start))


def slow_link() -> Profile:
    """A machine whose link takes far longer for an expert than a layer takes to compute."""
    fast = machine()
    link = fast.host_to_device
    slow = dataclasses.replace(link.pinned_bytes_per_s, value=1e6)
    return dataclasses.replace(fast, host_to_device=dataclasses.replace(link, pinned_bytes_per_s=slow))


def ran(loaded: Loaded, mine: OffloadSchedule, popularity: np.ndarray, on: Profile | None = None) -> ModelRun:
    costs = load_costs(on or machine(), loaded.spec)
    prices = prices_for(mine, loaded.spec, costs, context_tokens=20)
    return run_model(loaded, mine, PROMPTS, max_new_tokens=NEW, popularity=popularity, prices=prices, keep_logits=True,
                     poison=True)  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_changes_no_logit_and_counts_as_the_simulator_does(
    name: str, loaded: Loaded, popularity: np.ndarray, expected: list[torch.Tensor]
) -> None:
    mine = schedule(name)
    run = ran(loaded, mine, popularity)
    assert max(float((one - other).abs().max()) for one, other in zip(run.logits, expected, strict=True)) < 1e-4
    assert differences(run, mine) == []
    assert run.counts.misses > 0
    given, costs = replayed(run, mine), load_costs(machine(), loaded.spec)
    case = next(iter(runnable_cases(_plan(mine), loaded.spec, 0, True)))
    found = compare(case, given, loaded.spec, costs, [with_truths(run, given)])
    assert found.compared.count_differences == ()
    tables = found.forecast.tables
    reference = run_simpy(
        given.config, given.workload, tables, given.capacities, serial=not mine.copy.overlap, weighed=given.weighed
    )
    assert first_difference(found.forecast.outcome, reference) is None


def test_a_saturated_link_turns_speculation_off(loaded: Loaded, popularity: np.ndarray) -> None:
    mine = schedule("guesses that pay")
    assert ran(loaded, mine, popularity).counts.prefetches > 0
    run = ran(loaded, mine, popularity, slow_link())
    sure = ran(loaded, mine.with_options(predictor__benefit=False), popularity)
    assert run.counts.prefetches < sure.counts.prefetches / 4


def test_guesses_are_weighed_only_where_a_machine_is_known(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="no machine is known"):
        run_model(loaded, schedule("guesses that pay"), PROMPTS, max_new_tokens=1)


def test_rivals_that_a_model_cannot_run_by_are_left_out(loaded: Loaded) -> None:
    mine = schedule("static")
    document = _plan(mine)
    future = mine.with_options(cache__policy="belady")
    document["baselines"] = [{"name": one.cache.policy, "schedule": one.to_dict(), "window_s": at}
                             for at, one in enumerate((future, schedule("nothing kept")))]  # fmt: skip
    assert [case.name for case in runnable_cases(document, loaded.spec, 2, True)] == ["best", "none"]
    with pytest.raises(InputError, match="popularity"):
        runnable_cases(document, loaded.spec, 2, False)


@pytest.mark.parametrize(("name", "cores"), [("static", False), ("misses on the cores", True)])
def test_cores_are_measured_where_a_schedule_computes_on_them(
    name: str, cores: bool, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(validate_model, "calibrate_model", lambda *_, cores, **__: asked.append(cores))
    cases = runnable_cases(_plan(schedule(name)), loaded.spec, 0, True)
    validate_model._calibrated(loaded, cases, PROMPTS, NEW, 1.0, silent)
    assert asked == [cores]
    assert extent_for(8, 8, quick=True, cores=cores).host_cores == cores


def test_whatever_a_model_measures_of_the_host_is_fitted_and_what_a_guess_costs_is_among_it(loaded: Loaded) -> None:
    own = model_samples(loaded, PROMPTS * 2, ["32"], longest_prompt=6, progress=silent)
    measured = {sample.labels["what"]: sample for sample in own if sample.kind == "host"}
    assert len(measured["guess"].seconds) > 1
    alone = lawful_samples()
    apart = tuple(one for one in alone.samples if one.labels.get("what") not in measured)
    fitted = fit_profile(dataclasses.replace(alone, samples=apart + tuple(measured.values()))).profile
    handed = {name for name in fitted.curves if name.startswith("host.")}
    assert handed >= {f"host.{what}" for what in measured if what not in HOST_PARTS}
    costs = load_costs(fitted, loaded.spec)
    guess = costs.host_per_guess()
    assert guess is not None
    assert guess.seconds == pytest.approx(measured["guess"].midmean_s)


def test_bytes_on_the_link_are_those_of_the_rows(loaded: Loaded, popularity: np.ndarray) -> None:
    run = ran(loaded, schedule("static"), popularity)
    rows = run.timeline.rows
    assert np.count_nonzero(rows[:, ROW_LANE] == H2D) == run.counts.misses


def _plan(mine: OffloadSchedule) -> dict[str, Any]:
    return {"kind": "offload", "best": {"name": "best", "schedule": mine.to_dict()}, "baselines": []}


def test_perfect_guesses_are_an_earlier_runs_choices(loaded: Loaded, popularity: np.ndarray) -> None:
    mine = schedule("LRU on one stream").with_options(
        copy__overlap=True, copy__write_back=False, predictor__kind="next-gate", predictor__depth=2,
        predictor__width=loaded.spec.top_k, predictor__staging=4,
    )  # fmt: skip
    first = run_model(loaded, mine, PROMPTS, max_new_tokens=NEW, popularity=popularity)
    again = run_model(loaded, mine, PROMPTS, max_new_tokens=NEW, popularity=popularity, hindsight=first.recording)
    assert again.tokens == first.tokens and not differences(again, mine)
    walked = again.recording
    assert walked.predicted is not None
    for distance in (1, 2):
        for column in range(distance, loaded.spec.num_moe_layers):
            assert np.array_equal(walked.predicted[:, column, distance - 1], walked.experts[:, column])
    assert again.counts.hits > first.counts.hits
    with pytest.raises(InputError, match=r"predictor\.width"):
        run_model(loaded, mine.with_options(predictor__width=loaded.spec.top_k + 1), PROMPTS, max_new_tokens=NEW,
                  popularity=popularity, hindsight=first.recording)  # fmt: skip
