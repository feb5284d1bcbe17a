"""The course of one request, and what changes with its context."""

from __future__ import annotations

import pytest

from moeplan.api.plan import plan
from moeplan.planner.offload.plan import OffloadPlan, OffloadRequest
from moeplan.reports.offload.request import at_contexts, course_of, request_sections
from moeplan.reports.offload.speed import entries
from moeplan.reports.page import Plot


@pytest.fixture(scope="module")
def found() -> OffloadPlan:
    return plan("gpt-oss-20b", "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", target="llama.cpp", prompt_tokens=1200, reply_tokens=6,
                request=OffloadRequest(objective="request_s"))  # fmt: skip


def test_the_parts_of_a_request_are_the_whole(found: OffloadPlan) -> None:
    document = found.to_dict()
    for entry in entries(document)[:3]:
        course = course_of(found.simulation, entry)
        assert course is not None and course.reply_tokens == 6
        assert course.first_token_s == pytest.approx(entry.result["ttft_s"])
        assert course.first_token_s + course.decode_s == pytest.approx(entry.result["request_s"])
        chunk = entry.schedule.workload.prefill_chunk_tokens or 1200
        assert len(course.passes_s) == -(-1200 // chunk)


def test_more_context_is_slower_and_larger_until_it_no_longer_fits(found: OffloadPlan) -> None:
    at = at_contexts(found.simulation, found.best.schedule)
    fits = [one for one in at if one.speed is not None]
    assert [one.tokens for one in at] == [512 << power for power in range(len(at))]
    assert len(fits) >= 2 and all(one.speed is None for one in at[len(fits) :])
    speeds = [one.speed or 0 for one in fits]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1]
    kept = [one.kv_bytes or 0 for one in fits]
    assert kept == sorted(kept) and kept[-1] > kept[0]
    assert max(one.device_bytes or 0 for one in fits) <= found.simulation.budget_bytes


def test_a_report_shows_both(found: OffloadPlan) -> None:
    sections = request_sections(found.to_dict(), found.simulation)
    assert [one.id for one in sections] == ["request", "context"]
    plots = [part.id for one in sections for part in one.parts if isinstance(part, Plot)]
    assert plots == ["plot-request", "plot-context-speed", "plot-context-memory"]
