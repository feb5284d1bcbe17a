"""The page's sections on serving: memory, waits, drafts, and rebalancing over time, each figure the document's."""

from __future__ import annotations

import dataclasses

import pytest

from ep_page_case import HARDWARE, counts, document, plan_of_counts
from moeplan.planner.parallel.case import ParallelRequest
from moeplan.planner.parallel.period.study import Asked
from moeplan.planner.parallel.plan import make_ep_plan
from moeplan.reports import numbers
from moeplan.reports.parallel.factors import gain_words
from moeplan.reports.parallel.page import parallel_report
from moeplan.reports.parallel.rivals import schedules
from moeplan.specs.models.load import load_model
from report_pages import Page

# With a draft layer: enough of a model for all that a page can say of serving.
MODEL = dataclasses.replace(load_model("deepseek-v3"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)


@pytest.fixture(scope="module")
def served() -> dict:
    request = ParallelRequest(
        num_nodes=2, ranks_per_node=2, num_redundant=4, tokens_per_rank=16, context_tokens=64, draft_tokens=1, acceptance="0.8",
        prefill_share=0.5, prompt_tokens=64, ttft_s=5.0, tpot_s=0.5,
    )  # fmt: skip
    busy = dataclasses.replace(counts(), counts=counts().counts * 40)
    period = Asked(recordings=(busy, busy, busy), every_steps=200, window_steps=100, way="at-once")
    return document(make_ep_plan(MODEL, HARDWARE, counts(), request, period=period))


def rows_of(page: Page, section: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.rows[section]}


def test_memory_is_itemised_and_adds_up(served) -> None:
    rows, memory = rows_of(Page(parallel_report(served)), "serving"), served["memory"]
    shown = [item for item in memory["items"] if item["bytes"]]
    assert sum(item["bytes"] for item in shown) == memory["device_bytes"]
    for item in shown:
        assert rows[item["name"]][0] == numbers.size(item["bytes"])
    budget = served["memory_budget_bytes"]
    assert rows["together"][0] == numbers.size(memory["device_bytes"])
    assert f"{numbers.size(budget - memory['device_bytes'])} are left" in rows["together"][2]


def test_waits_limits_and_drafts_are_the_documents(served) -> None:
    page, waits = Page(parallel_report(served)), served["latency"]
    text, rows = page.sections["serving"], rows_of(page, "serving")
    assert f"Drafts1 checked, {served['tokens_a_step']:.3g} tokens a step" in text
    assert f"A further token{numbers.seconds(waits['tpot_s'])}" in text
    assert f"Tokens a second of a GPU{numbers.significant(waits['tokens_per_s'] / 4)}" in text
    assert "Prompts50 % of all tokens" in text
    assert rows["First token"] == [numbers.seconds(5.0), numbers.seconds(waits["ttft_s"]), "kept"]
    assert rows["Further token"] == [numbers.seconds(0.5), numbers.seconds(waits["tpot_s"]), "kept"]
    assert f"At most {waits['largest_within']:,} sequences on each GPU keep" in text


def test_rebalancing_over_time_is_shown_policy_by_policy(served) -> None:
    page, period = Page(parallel_report(served)), served["period"]
    rows = rows_of(page, "period")
    assert period["words"][1:] in page.sections["period"]
    for one in period["policies"]:
        shown = rows[one["words"]]
        assert shown[0] == numbers.seconds(one["whole_s"])
        assert shown[1] == ("" if one["policy"] == "never" else gain_words(one))
        assert one["whole_s"] == pytest.approx(one["steps_s"] + one["counting_s"] + one["stalled_s"])
    assert "plot-period" in page.plots


def test_without_a_period_and_in_older_plans_there_is_no_such_section() -> None:
    data = document(plan_of_counts())
    assert "period" not in Page(parallel_report(data)).sections
    for key in ("memory", "latency", "period"):
        data.pop(key)
    data["headline"].pop("rival")
    page = Page(parallel_report(data))
    assert "serving" not in page.sections and "the rival" not in [title for _, title, _ in schedules(data)]


def test_the_headlines_rival_stands_in_the_comparison(served) -> None:
    rival = next(one for _, title, one in schedules(served) if title == "the rival")
    assert rival["step_s"] == served["headline"]["step_s"]
    assert served["headline"]["why"] in rival["description"]
