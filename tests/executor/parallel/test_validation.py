"""An expert-parallel plan really runs: as many processes as it has ranks, held against one process and against what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeplan.api.validate import validate
from moeplan.base.errors import DoesNotFit, InputError, MissingCalibration
from moeplan.executor.validation.rank_results import RanksValidation, step_times
from moeplan.executor.validation.ranks import validate_ranks
from moeplan.reports.validation.page import write_predicted_measured
from moeplan.sim.parallel.runnable import as_run_on_cores, check_runnable
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ep_schedule_from_dict, load_ep_preset
from rank_plans import rank_plan, rank_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return rank_profile()


@pytest.fixture(scope="module")
def found() -> RanksValidation:
    document, _ = rank_plan()
    answer = validate(document, steps=2, repeats=2, baselines=1)
    assert isinstance(answer, RanksValidation)
    return answer


def test_a_plan_of_ranks_runs_as_planned_and_as_predicted(found: RanksValidation) -> None:
    document = found.to_dict()
    assert document["configurations"][0]["name"] == "best" and document["num_configurations"] == 2
    assert document["bytes_equal"] and document["states_equal"] and document["counts_equal"] and not document["wrong"]
    assert document["num_ranks"] == 2 and document["noise_floor"] is not None and document["reduced"] is None
    for one, ran in zip(document["configurations"], found.validated, strict=True):
        assert 0 < one["states_error"] <= one["states_bound"]
        assert one["intra_node_bytes"] > 0 == one["inter_node_bytes"]
        assert np.shape(one["measured_steps_s"]) == (2, 2)
        assert one["measured_step_s"] == pytest.approx(float(np.median(step_times(ran.runs)[1:], axis=0).mean()) / 1e9)
        assert one["relative_error"] == pytest.approx(one["predicted_step_s"] / one["measured_step_s"] - 1)
        # With every duration as measured, most of what is left is waiting for each other.
        assert abs(one["error_budget"]["scheduling"]) < 1 and one["error_budget"]["none"] == pytest.approx(
            one["relative_error"]
        )
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_both_timelines_are_of_the_same_operations(found: RanksValidation) -> None:
    predicted, measured = (rows.frame() for rows in found.timelines())
    kinds = [
        set(zip(rows["device"], rows["lane"], rows["op"], rows["layer"], strict=True)) for rows in (predicted, measured)
    ]
    assert kinds[0] == kinds[1]
    assert measured["start_ns"].min() >= 0
    with_bytes = [
        rows.groupby(["device", "lane"], observed=True)["bytes"].sum().to_dict() for rows in (predicted, measured)
    ]
    assert with_bytes[0] == with_bytes[1]


def test_the_page_shows_every_rank_predicted_above_measured(found: RanksValidation, tmp_path: Path) -> None:
    document = found.to_dict()
    predicted, measured = found.timelines()
    text = Path(
        write_predicted_measured(tmp_path / "page.html", document, predicted=predicted, measured=measured)
    ).read_text()
    data = text[text.index("plot-ranks") :]
    for rank in range(2):
        assert data.count(f"rank {rank}") >= 2
    assert "their clocks were compared by messages" in text and "Perfetto" not in data
    clocks = document["clocks"]
    assert (
        0 < clocks["known_to_s"] < 1 and clocks["largest_offset_s"] <= clocks["known_to_s"]
    )  # one machine has one clock


def test_what_does_not_belong_together_is_refused_before_anything_runs(profile: Profile) -> None:
    document, recording = rank_plan()
    model = load_model("tiny-moe")
    with pytest.raises(InputError, match="measured on another device"):
        validate_ranks(document, model, recording, profile=rank_profile(name="another machine"))
    with pytest.raises(MissingCalibration, match="2 ranks"):
        validate_ranks(document, model, recording, profile=rank_profile(4))
    with pytest.raises(DoesNotFit, match="2 ranks of tiny-moe need"):
        validate_ranks(document, model, recording, profile=profile, memory_bytes=2**20)
    other = document | {
        "provenance": document["provenance"] | {"trace": document["provenance"]["trace"] | {"sha256": "0"}}
    }
    with pytest.raises(InputError, match="another recording"):
        validate(other)


def test_plans_for_cores_are_of_what_runs_there() -> None:
    document, _ = rank_plan()
    model, best = load_model("tiny-moe"), ep_schedule_from_dict(document["best"]["schedule"])
    check_runnable(best, model)
    assert best.pipeline.all_to_all_sm_fraction == 0 and best.kernel.choice == "grouped"
    told = as_run_on_cores(load_ep_preset("eps-moe"), model)
    assert told is not None and told.pipeline.all_to_all_sm_fraction == 0
    assert as_run_on_cores(load_ep_preset("tensor-parallel"), model) is None
