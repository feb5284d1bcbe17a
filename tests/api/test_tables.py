"""Results as tables: one row for each thing compared, intervals as two columns, shown in a terminal and in a notebook."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import pytest
import rich.console

import moeplan
from moeplan.base.frames import MOST_ROWS, Tabular, flat


def shown(result: Any) -> str:
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(result)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def simulated() -> moeplan.SimulationResult:
    return moeplan.simulate("tiny-moe", "t4", trace="bundled", window=9)


def test_a_simulation_is_one_row_with_its_intervals(simulated: moeplan.SimulationResult) -> None:
    frame = simulated.to_frame()
    assert len(frame) == 1
    row = frame.iloc[0]
    low, high = simulated.metrics.decode_tokens_per_s_interval or (0.0, 0.0)
    assert (row["decode_tokens_per_s_low"], row["decode_tokens_per_s_high"]) == (low, high)
    assert row["schedule.cache.policy"] == simulated.schedule.cache.policy
    text = shown(simulated)
    assert f"{simulated.metrics.decode_tokens_per_s:.4g}" in text and "decode_tokens_per_s" in text
    assert "decode_tokens_per_s" in simulated._repr_html_()


def test_a_plan_has_a_row_for_the_best_and_for_each_rival() -> None:
    found = moeplan.plan("tiny-moe", "t4", trace="bundled", memory="436MiB", window=4)
    frame = found.to_frame()
    assert list(frame["role"]) == ["best"] + ["published"] * len(found.baselines) + ["reference"] * len(
        found.references
    )
    assert frame["decode_tokens_per_s"].iloc[0] == found.best.metrics.decode_tokens_per_s
    assert found.verdict.split()[0] in shown(found)


def test_a_plan_of_many_ranks_is_a_table_too() -> None:
    request = moeplan.ParallelRequest(ranks_per_node=4, prefill=True, search_moves=20)
    found = moeplan.plan("tiny-moe", "a100-80gb-sxm", trace="bundled", request=request)
    frame = found.to_frame()
    assert list(frame["role"]) == ["best"] + ["published"] * len(found.baselines) + ["reference"] * len(
        found.references
    )
    assert frame["step_s"].iloc[0] == found.best.step_s
    assert "step_s" in shown(found)


def test_a_diagnosis_has_a_row_for_each_speed() -> None:
    found = moeplan.diagnose(
        "gpt-oss-120b", "rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB",
        command="llama-server -ngl 99 --n-cpu-moe 28 -c 16384", measured_decode=14.6,
    )  # fmt: skip
    row = found.to_frame().iloc[0]
    assert (row["measured"], row["verdict"]) == (14.6, found.speeds[0].verdict)
    assert found.verdict in shown(found)


def test_a_paper_has_a_row_for_each_cell() -> None:
    found = moeplan.reproduce("deepep")
    assert isinstance(found, moeplan.Reproduction)
    frame = found.to_frame()
    assert list(frame["simulated"]) == [cell.simulated for cell in found.cells]
    assert "published" in shown(found)


def test_options_of_another_reproduction_are_refused() -> None:
    with pytest.raises(moeplan.InputError, match="own figures"):
        moeplan.reproduce("deepep", parallel=True)
    with pytest.raises(moeplan.InputError, match="own machines and formats"):
        moeplan.reproduce("field", bits="4")
    with pytest.raises(moeplan.InputError, match="deepep"):
        moeplan.reproduce("deepeq")


def test_a_nested_document_as_one_row() -> None:
    document = {
        "a": {"b": 1, "speed": 2.0, "speed_interval": [1.0, 3.0]},
        "none_interval": None,
        "names": ["x"],
        "flag": True,
    }
    assert flat(document) == {
        "a.b": 1, "a.speed": 2.0, "a.speed_low": 1.0, "a.speed_high": 3.0, "none_low": None, "none_high": None, "flag": True,
    }  # fmt: skip


def test_markup_in_a_cell_is_shown_as_it_is() -> None:
    class Named(Tabular):
        SHOWN: ClassVar[tuple[str, ...]] = ("name", "missing")

        def table_rows(self) -> list[dict[str, Any]]:
            return [{"name": "[bold]x[/bold]", "other": None}]

    text = shown(Named())
    assert "[bold]x[/bold]" in text and "missing" not in text and "other" not in text


def test_a_study_is_a_row_for_each_run_under_what_its_command_prints(tmp_path: Path) -> None:
    base = {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 4}
    found = moeplan.sweep({"base": base, "grid": {"memory": ["450MiB", "500MiB"]}}, store=tmp_path / "s.sqlite", jobs=1)
    assert [row["run"] for row in found.table_rows()] == list(found.to_frame()["run"]) == [0, 1]
    text = shown(found)
    assert found.lines()[0].split(",")[0] in text and "500MiB" in text
    assert "500MiB" in found._repr_html_()


def test_a_terminal_and_a_notebook_show_the_first_rows_of_a_long_table() -> None:
    class Long(Tabular):
        def table_rows(self) -> list[dict[str, Any]]:
            return [{"number": 1000 + at} for at in range(MOST_ROWS + 40)]

    text = shown(Long())
    assert str(999 + MOST_ROWS) in text and str(1000 + MOST_ROWS) not in text and "40 more rows" in text
    assert len(Long().to_frame()) == MOST_ROWS + 40 and Long()._repr_html_().count("<tr") < MOST_ROWS + 5


def test_a_result_without_rows_is_its_headline() -> None:
    class Nothing(Tabular):
        def table_rows(self) -> list[dict[str, Any]]:
            return []

        def table_title(self) -> str:
            return "nothing moved"

    assert shown(Nothing()).strip() == "nothing moved"
