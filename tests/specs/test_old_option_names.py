"""Options by the names of the version before: read, and today's name said."""

from __future__ import annotations

import pytest

from moeplan.specs.schedules.offload import OffloadSchedule, apply_settings, schedule_from_dict
from moeplan.specs.schedules.parallel import (
    ExpertParallelSchedule,
    apply_ep_settings,
    ep_schedule_from_dict,
    load_ep_preset,
    parse_ep_setting,
)


@pytest.mark.parametrize("option", ["kind", "tiers", "dispatch_bytes_per_value", "combine_bytes_per_value"])
def test_options_of_the_all_to_all_by_their_old_section(option: str, caplog: pytest.LogCaptureFixture) -> None:
    value = getattr(load_ep_preset("tutel").all_to_all, option)

    key, read = parse_ep_setting(f"exchange.{option}={value}")
    assert (key, read) == (f"all_to_all.{option}", value)
    assert f"'exchange.{option}' is now called 'all_to_all.{option}'" in caplog.text

    # The kind comes first: an order of stages is refused where there are none.
    whole = apply_ep_settings(
        ExpertParallelSchedule(), {"exchange.kind": "hierarchical"} | {f"exchange.{option}": value}
    )
    assert getattr(whole.all_to_all, option) == value


def test_a_stored_parallel_schedule_with_old_names() -> None:
    written = load_ep_preset("tutel").to_dict()
    written["exchange"] = written.pop("all_to_all")
    written["pipeline"]["exchange_sm_fraction"] = 0.125
    del written["pipeline"]["all_to_all_sm_fraction"]

    read = ep_schedule_from_dict(written)

    assert read == load_ep_preset("tutel").with_options(pipeline__all_to_all_sm_fraction=0.125)


def test_a_synthetic_predictor_by_its_old_name(caplog: pytest.LogCaptureFixture) -> None:
    schedule = apply_settings(OffloadSchedule(), {"predictor.kind": "dial"})

    assert schedule.predictor.kind == "synthetic"
    assert "predictor.kind=dial is now called predictor.kind=synthetic" in caplog.text
    assert schedule_from_dict({"predictor": {"kind": "dial"}}) == OffloadSchedule().with_options(
        predictor__kind="synthetic"
    )
