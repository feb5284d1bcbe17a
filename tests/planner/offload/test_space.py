"""How slots are divided among layers where the first layer's cache may differ."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.planner.offload.space import shares_of
from moeplan.specs.schedules.offload import OffloadSchedule, schedule_from_dict


def test_shares_by_hand() -> None:
    assert shares_of(24, 6, 16) == [(4, 0), (3, 6)]
    assert shares_of(26, 6, 16) == [(4, 0), (4, 2), (3, 8)]
    assert shares_of(128, 32, 8) == [(4, 0)]  # the first layer could use 5 of the 32 that others would lose
    assert shares_of(130, 32, 8) == [(4, 0), (4, 2)]
    assert shares_of(5, 6, 16) == []


@settings(max_examples=examples(200))
@given(slots=st.integers(0, 500), num_layers=st.integers(1, 40), num_experts=st.integers(1, 64))
def test_shares_stay_within_what_there_is(slots: int, num_layers: int, num_experts: int) -> None:
    for each, extra in shares_of(slots, num_layers, num_experts):
        assert each >= 1 and extra >= 0 and each + extra <= num_experts
        assert each * num_layers + extra <= slots


def test_a_larger_first_layer_is_a_size_by_layer() -> None:
    schedule = OffloadSchedule().with_options(cache__experts_per_layer=3, cache__first_layer_extra=2)
    assert schedule.cache.slots_by_cache(4) == (5, 3, 3, 3) and schedule.cache.slots(4) == 14
    assert schedule_from_dict(schedule.to_dict()) == schedule
    assert schedule.with_options(cache__pooled_experts=9).cache.slots_by_cache(4) == (9,)
    assert schedule.with_options(cache__experts_per_layer=4).cache.first_layer_extra == 2


@pytest.mark.parametrize("changes", [
    {"cache__pooled_experts": 9, "cache__first_layer_extra": 1}, {"cache__policy": "none", "cache__first_layer_extra": 1},
    {"cache__experts_per_layer": 2, "cache__first_layer_extra": -1}, {"cache__experts_per_layer": 2, "cache__first_layer_extra": 1.5},
])  # fmt: skip
def test_extra_slots_need_caches_by_layer(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"cache\.first_layer_extra"):
        OffloadSchedule().with_options(**changes)
