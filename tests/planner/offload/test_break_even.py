"""When drafting pays, on two machines: the fewer experts are there, the more guesses must be right."""

from __future__ import annotations

import itertools

import pytest

from moeplan.api.subject import open_subject
from moeplan.planner.offload.break_even import Surface, surface
from moeplan.sim.offload.drafting.draft import Drafting
from moeplan.specs.drafting import Acceptance

ASKED = Drafting(length=2, acceptance=Acceptance(chance=0.75))


def surface_of(hardware: str, memory: str | None = None) -> Surface:
    subject = open_subject(
        model="gpt-oss-20b", hardware=hardware, engine="llama.cpp", memory=memory, prompt_tokens=16, reply_tokens=48, drafting=ASKED
    )  # fmt: skip
    schedule = subject.simulation.resolve(subject.start(None))
    found = surface(
        subject.simulation, schedule, lengths=(1, 2, 4), chances=(0.0, 0.5, 0.75, 1.0), shares=(0.25, 0.5, 1.0)
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("hardware", "memory"), [("gb10", None), ("rtx-3060 + ryzen-5-3600 + ddr4-3200x2:32GiB", "9GiB")]
)
def test_fewer_experts_there_ask_for_more_right_guesses(hardware: str, memory: str | None) -> None:
    found = surface_of(hardware, memory)
    assert [level.hit_rate for level in found.levels] == pytest.approx([0.25, 0.5, 1.0], abs=0.02)
    least = [[2.0 if value is None else value for value in level.break_even] for level in found.levels]
    for poor, rich in itertools.pairwise(least):
        assert all(few > many for few, many in zip(poor, rich, strict=True))
    for level in found.levels:
        assert all(list(row) == sorted(row) for row in level.gains)  # each more right guess gains


def test_the_machine_decides() -> None:
    """All experts are on a GB10 and half of them on a card with 9 GiB: three of four guesses right pay more there than here."""
    there, here = surface_of("gb10"), surface_of("rtx-3060 + ryzen-5-3600 + ddr4-3200x2:32GiB", "9GiB")
    assert there.levels[-1].fits and not here.levels[-1].fits and here.levels[1].fits
    at = there.chances.index(0.75)
    assert all(row[at] > 1 for row in there.levels[-1].gains)
    assert all(mine[at] < best[at] for mine, best in zip(here.levels[1].gains, there.levels[-1].gains, strict=True))
