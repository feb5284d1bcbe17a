"""Plan documents: one way in, names of the version before understood, damage named by its key."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moeplan.base.errors import InputError, UnknownName
from moeplan.specs.plans.document import EXPERT_PARALLEL, OFFLOAD, brought_up_to_date, check_plan, plan_kind, read_plan
from report_documents import plan_document


def older(document: dict[str, Any]) -> dict[str, Any]:
    """Return a plan document as the version before wrote it."""
    made = copy.deepcopy(document)
    made["num_outrun"] = made.pop("num_raced_out", 3)
    for one in (made["best"], *made["baselines"], *made["references"].values()):
        one["ledger"] = one.pop("memory_breakdown")
    return made


def test_names_of_the_version_before_are_understood_and_said_once(tmp_path: Path, caplog: Any) -> None:
    now = plan_document(num_raced_out=3)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(older(now)))
    with caplog.at_level(logging.WARNING):
        found = read_plan(path)
    assert found == json.loads(json.dumps(now))
    check_plan(found, OFFLOAD)
    assert sorted(one.getMessage() for one in caplog.records) == [
        "plan: 'ledger' is now called 'memory_breakdown'; plans written anew have it so",
        "plan: 'num_outrun' is now called 'num_raced_out'; plans written anew have it so",
    ]


def test_names_of_today_are_left_alone(caplog: Any) -> None:
    now = plan_document()
    assert brought_up_to_date(copy.deepcopy(now)) == now and not caplog.records


@pytest.mark.parametrize("part", ["best", "baselines", "references", None])
@pytest.mark.parametrize("value", [None, 3, "x", [], [None], {}])
def test_damaged_parts_are_complaints_not_crashes(part: str | None, value: Any) -> None:
    damaged = plan_document() | ({} if part is None else {part: value})
    if part is None:
        damaged.pop("best")
    document = brought_up_to_date(damaged)
    if (part in ("baselines",) and value == []) or (part == "references" and value == {}):
        check_plan(document, OFFLOAD)
    else:
        with pytest.raises(InputError, match=r"plan: (best|baselines|references)"):
            check_plan(document, OFFLOAD)


def test_kinds_and_versions() -> None:
    assert plan_kind({"kind": OFFLOAD}) == OFFLOAD and plan_kind({"kind": EXPERT_PARALLEL, "schema_version": 1})
    with pytest.raises(UnknownName, match="kind"):
        plan_kind({"kind": "ep"})
    for version in (2, True, "1"):
        with pytest.raises(InputError, match="this version reads 1"):
            plan_kind({"kind": OFFLOAD, "schema_version": version})
