"""The guard: what is broken, regressed, unlike, drifted or gained, on this product's scenarios and on other tools' tables."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.baselines.check import CheckResult, check, refresh
from moeplan.baselines.document import Header, Measured, Pinned, Scenario, open_baseline, read_baseline, to_text
from moeplan.baselines.judge import BROKEN, DRIFT, GAIN, KINDS, REGRESSED, RULES, UNLIKE, Finding, judge, scores
from moeplan.baselines.show import markdown_of, text_of
from moeplan.cli import main
from moeplan.papers import mixtral_offloading
from moeplan.specs.catalog import HARDWARE_FOLDER

STORED = Path(__file__).parent / "default.json"
SIMULATED = {
    "model": "tiny-moe", "hardware": "t4", "trace": "bundled", "memory": "435MiB", "window": 40, "schedule": "mixtral-offloading",
}  # fmt: skip


def pinned(
    *, measured: dict[str, Measured] | None = None, data: str | None = None, **figures: Any
) -> dict[str, Pinned]:
    scenario = Scenario(name="s", command="simulate", options={})
    return {"s": Pinned(scenario=scenario, figures=figures, measured=measured or {}, data=data)}


def one(old: dict[str, Pinned], new: dict[str, Pinned]) -> Finding:
    (found,) = judge(old, new)
    return found


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        (100.0, 100.0, None),
        (100.0, 101.9, DRIFT),  # less than 2 points
        (100.0, 102.1, REGRESSED),
        (130.0, 132.5, DRIFT),  # 2.5 points, but less than a tenth of 30 %
        (130.0, 133.5, REGRESSED),
        (130.0, 126.0, GAIN),
        (70.0, 130.0, DRIFT),  # off as much as before, on the other side
        (100.0, None, BROKEN),
        (100.0, "nan", BROKEN),
        (None, 100.0, GAIN),
    ],
)
def test_a_measured_figure_is_judged_by_its_error(was: Any, now: Any, kind: str | None) -> None:
    measured = {"x": Measured(value=100.0)}
    found = judge(pinned(measured=measured, x=was), pinned(measured=measured, x=now))
    assert [each.kind for each in found] == ([] if kind is None else [kind])
    # Without a measurement nothing but its end is judged.
    plain = [each.kind for each in judge(pinned(x=was), pinned(x=now))]
    assert plain == ([] if kind is None else [BROKEN if kind == BROKEN else DRIFT])


def test_intervals_count() -> None:
    # Within what repetitions of the measurement differ by, nothing is off.
    noisy = {"x": Measured(value=100.0, low=90.0, high=112.0)}
    assert one(pinned(measured=noisy, x=100.0), pinned(measured=noisy, x=112.0)).kind == DRIFT
    assert one(pinned(measured=noisy, x=100.0), pinned(measured=noisy, x=115.0)).error_now == pytest.approx(0.03)
    # A prediction whose interval lets the measurement go is worse, however little it moved.
    plain = {"predicted": Measured(value=100.0)}
    held = pinned(measured=plain, predicted=99.0, low=90.0, high=100.5)
    lost = pinned(measured=plain, predicted=98.9, low=90.0, high=99.9)
    assert one_of(held, lost, "predicted").kind == REGRESSED
    assert one_of(lost, held, "predicted").kind == DRIFT
    assert scores(held, lost)[0].held_was == 1.0 and scores(held, lost)[0].held_now == 0.0


def one_of(old: dict[str, Pinned], new: dict[str, Pinned], figure: str) -> Finding:
    return next(each for each in judge(old, new) if each.figure == figure)


def test_only_like_is_compared_with_like() -> None:
    here = {"x": Measured(value=100.0)}
    elsewhere = {"x": Measured(value=50.0)}
    for other in (pinned(measured=here, data="b", x=100.0), pinned(measured=elsewhere, data="a", x=100.0)):
        assert one(pinned(measured=here, data="a", x=100.0), other).kind == UNLIKE
    moved = pinned(measured=here, data="a", x=150.0)["s"]
    asked = dataclasses.replace(moved, scenario=dataclasses.replace(moved.scenario, options={"window": 3}))
    assert one(pinned(measured=here, data="a", x=100.0), {"s": asked}).kind == UNLIKE


def test_answers_that_end_and_begin() -> None:
    answered, refused = pinned(x=1.0), pinned(refused="DoesNotFit", exit_status=3)
    failed = pinned(failed="ZeroDivisionError: division by zero")
    assert [each.kind for each in judge(answered, refused)] == [BROKEN]
    assert "ZeroDivisionError" in one(answered, failed).why
    assert one(refused, answered).kind == GAIN and judge(refused, refused) == ()
    assert one(answered, {}).kind == BROKEN


@given(st.floats(1, 200), st.floats(1, 200))
def test_a_regression_turned_round_is_a_gain(was: float, now: float) -> None:
    measured = {"x": Measured(value=100.0)}
    there = judge(pinned(measured=measured, x=was), pinned(measured=measured, x=now))
    back = judge(pinned(measured=measured, x=now), pinned(measured=measured, x=was))
    turned = {REGRESSED: GAIN, GAIN: REGRESSED, DRIFT: DRIFT}
    assert [each.kind for each in back] == [turned[each.kind] for each in there]


# --- this product's own scenarios -----------------------------------------------------------------------------------


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """Return a baseline of one prediction, with and without a measurement, whose figures are of now."""
    asked = {
        "mine": Pinned(scenario=Scenario(name="mine", command="simulate", options=SIMULATED), figures={}),
        "measured": Pinned(
            scenario=Scenario(name="measured", command="simulate", options=SIMULATED),
            figures={},
            measured={"decode_tokens_per_s": Measured(value=300.0)},
        ),
    }
    path = tmp_path / "baseline.json"
    path.write_text(to_text(asked))
    assert refresh(path, jobs=1).counts == {BROKEN: 0, REGRESSED: 0, UNLIKE: 0, DRIFT: 0, GAIN: 2}
    old, _ = open_baseline(path)
    value = float(old["mine"].figures["decode_tokens_per_s"] or 0)
    own = dataclasses.replace(old["measured"], measured={"decode_tokens_per_s": Measured(value=value * 1.01)})
    path.write_text(to_text({**old, "measured": own}, Header(rules=RULES)))
    return path


@pytest.fixture
def slower_machines(baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make link and memory of every bundled machine a fifth slower, once the baseline is there: a copy of the catalogue, but for that."""
    folder = tmp_path / "hardware"
    shutil.copytree(HARDWARE_FOLDER, folder)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        for part, constant in (("host_to_device", "pinned_bytes_per_s"), ("device", "memory_bytes_per_s")):
            content[part][constant]["value"] *= 0.8
        path.write_text(json.dumps(content))
    monkeypatch.setattr("moeplan.specs.machines.profile_file.HARDWARE_FOLDER", folder)
    # A paper's constants are fitted once a process: neither those of before nor these may outlive the change.
    mixtral_offloading.fitted.cache_clear()
    yield
    mixtral_offloading.fitted.cache_clear()


@pytest.mark.usefixtures("slower_machines")
def test_a_constant_changed_by_a_fifth_fails(baseline: Path) -> None:
    old, header = open_baseline(baseline)
    paper = "papers/mixtral-offloading"
    baseline.write_text(to_text(old | {paper: read_baseline(STORED)[paper]}, header))
    found = check(baseline, jobs=1)
    assert not found.passed and found.counts[BROKEN] == found.counts[UNLIKE] == 0
    kinds = {(each.scenario, each.figure): each.kind for each in found.findings}
    assert kinds["measured", "decode_tokens_per_s"] == REGRESSED
    assert kinds["mine", "decode_tokens_per_s"] == DRIFT
    # Decisions know no costs.
    assert ("mine", "hits") not in kinds
    cells = [each for each in found.findings if each.scenario == paper and each.measured is not None]
    # A paper's few constants are fitted anew and take up most of it: its cells move, hardly further from what was measured.
    assert cells and {each.kind for each in cells} <= {DRIFT, REGRESSED}
    assert {each.kind for each in found.findings if each.measured is None} == {DRIFT}
    # Where nothing was measured, so large a change fails too, and says that it is beyond the tolerance.
    speed = next(each for each in found.failing if each.scenario == "mine")
    assert speed.kind == DRIFT and (speed.moved or 0) > 0.05
    assert "moved by more than 5%" in text_of(found)
    wide = check(baseline, tolerance=0.9, jobs=1)
    assert wide.findings == found.findings and not any(each.moved is not None and 0.05 < each.moved < 0.9 for each in wide.failing
                                                       if each.kind == DRIFT)  # fmt: skip
    text = text_of(found)
    assert "FAILED" in text and "3 of 3 scenarios answered (3 before)" in text
    assert "measured  decode_tokens_per_s: measured" in text and "% off)" in text
    assert "mine: " in text and " figures, most " in text
    assert markdown_of(found).startswith("### moeplan check: failed") and f"| {paper} |" in markdown_of(found)
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.to_frame()) == len(found.findings)


def test_nothing_moves_of_itself_however_many_processes(baseline: Path) -> None:
    assert check(baseline, jobs=2, strict=True).findings == ()


def test_what_nobody_measured_may_move_by_the_tolerance() -> None:
    for was, now, fails in (
        (100.0, 104.9, False),
        (100.0, 105.1, True),
        (100.0, 94.0, True),
        (0, 3, True),
        ("cpu", "gpu", False),
    ):
        assert one(pinned(x=was), pinned(x=now)).fails(0.05) is fails, (was, now)
    measured = {"x": Measured(value=100.0)}
    assert not one(pinned(measured=measured, x=70.0), pinned(measured=measured, x=130.0)).fails(0.05)
    # Ends of a measured figure's interval and scores over measured figures are judged with those.
    plain = {"predicted": Measured(value=100.0)}
    wide = {"predicted": 100.0, "low": 50.0, "high": 150.0, "scores.median": 0.2}
    found = judge(pinned(measured=plain, **wide), pinned(measured=plain, **wide | {"low": 80.0, "scores.median": 0.1}))
    assert [each.figure for each in found] == ["low", "scores.median"] and not any(each.fails(0.05) for each in found)
    # Of a figure that nobody measured they count.
    assert one(pinned(low=50.0), pinned(low=80.0)).fails(0.05)


@pytest.mark.usefixtures("slower_machines")
def test_a_worse_baseline_is_written_with_a_reason_only(baseline: Path) -> None:
    before = baseline.read_bytes()
    with pytest.raises(InputError, match="--why"):
        refresh(baseline, jobs=1)
    assert baseline.read_bytes() == before
    refresh(baseline, why="the links were measured again", jobs=1)
    pins, header = open_baseline(baseline)
    assert header.review is not None and header.review["why"] == "the links were measured again"
    assert any(line.startswith("measured  decode_tokens_per_s: measured") for line in header.review["moved"])
    assert check(baseline, jobs=1, strict=True).passed
    # What the user measured stays his.
    assert set(pins["measured"].measured) == {"decode_tokens_per_s"}


def test_a_mistake_in_one_scenario_is_a_finding(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of a sort")

    monkeypatch.setattr("moeplan.sim.offload.simulate.Simulation.predict", fails)
    found = check(baseline, jobs=1).findings
    assert [(each.kind, each.scenario, each.why) for each in found] == [
        (BROKEN, name, "ZeroDivisionError: of a sort") for name in ("measured", "mine")
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**SIMULATED, "windo": 3}, "window"),
        ({"hardware": "t4"}, "model"),
        ({**SIMULATED, "model": "tiny-mo"}, None),
    ],
)
def test_a_wrong_scenario_is_named(options: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    asked = Pinned(scenario=Scenario(name="wrong", command="simulate", options=options), figures={"hits": 1})
    path.write_text(to_text({"wrong": asked}, Header(rules=RULES)))
    if said is None:  # a model may vanish from the catalogue: that is a finding
        assert [each.kind for each in check(path, jobs=1).findings] == [BROKEN]
        return
    with pytest.raises(InputError, match=said):
        check(path, jobs=1)


def test_other_rules_are_not_compared(baseline: Path) -> None:
    pins, _ = open_baseline(baseline)
    baseline.write_text(to_text(pins, Header(rules="others")))
    with pytest.raises(InputError, match="other rules"):
        check(baseline, jobs=1)


# --- other tools' tables ----------------------------------------------------------------------------------------------


def table(path: Path, *rows: str, columns: str = "scenario,predicted,measured") -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def test_another_tool_is_guarded_by_its_table(tmp_path: Path) -> None:
    old = table(tmp_path / "old.csv", "a,95,100", "b,80,100", "c,50,40", "d,,7", "e,10,10")
    new = table(tmp_path / "new.csv", "a,92,100", "b,90,100", "c,nan,40", "d,7,7", "e,10,10")
    found = check(old, predictions=new)
    assert [(each.kind, each.scenario) for each in found.findings] == [
        (BROKEN, "c"), (REGRESSED, "a"), (GAIN, "b"), (GAIN, "d"),
    ]  # fmt: skip
    assert not found.passed and (found.num_answered_was, found.num_answered) == (4, 4)
    (score,) = found.scores
    assert (score.num_measured, score.num_was, score.num_now) == (5, 4, 4)
    assert score.median_error_now == pytest.approx(0.04)
    kept = tmp_path / "kept.json"
    refresh(kept, predictions=old)
    assert check(kept, predictions=new).findings == found.findings
    rows = [{"scenario": "a", "predicted": 95, "measured": 100, "low": 90, "high": 101}]
    (tmp_path / "rows.json").write_text(json.dumps({"pairs": rows}))
    assert check(tmp_path / "rows.json", predictions=tmp_path / "rows.json").scores[0].held_now == 1.0


def test_a_table_that_lacks_scenarios_is_broken_and_one_that_has_others_refused(tmp_path: Path) -> None:
    old, less = table(tmp_path / "old.csv", "a,1,1", "b,1,1"), table(tmp_path / "less.csv", "a,1,1")
    assert [(each.kind, each.scenario) for each in check(old, predictions=less).findings] == [(BROKEN, "b")]
    with pytest.raises(InputError, match="--refresh"):
        check(less, predictions=old)
    refresh(less, predictions=old, output=tmp_path / "more.json")
    assert set(open_baseline(tmp_path / "more.json")[0]) == {"a", "b"}
    other = table(tmp_path / "other.csv", "a,1,2", "b,1,1")
    assert [each.kind for each in check(old, predictions=other).findings] == [UNLIKE]
    with pytest.raises(InputError, match="--predictions"):
        check(old)


@pytest.mark.parametrize(
    "text",
    ["", "scenario,predicted\na,1\n", "scenario,predicted,measured\n", "scenario,predicted,measured\na,1,0\n",
     "scenario,predicted,measured\na,x,1\n", "scenario,predicted,measured\na,1,1\na,1,1\n", "scenario,predicted,measured\na,1\n",
     "scenario,predicted,measured\n,1,1\n", "scenario,predicted,measured,low\na,1,1,0.5\n",
     "scenario,predicted,measured,low,high\na,1,1,2,1\n", "[]", "[1]", '{"pairs": 1}', '{"pairs": [{"scenario": "a"}]}', "{",
     '[{"scenario": "a", "predicted": true, "measured": 1}]'],
)  # fmt: skip
def test_another_table_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        check(path, predictions=path)
    assert "\n" not in str(refused.value)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def moeplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", "check", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def test_the_command_exits_with_what_it_found(moeplan: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    old, new = table(tmp_path / "old.csv", "a,95,100"), table(tmp_path / "new.csv", "a,80,100")
    assert moeplan("--baseline", "old.csv", "--predictions", "old.csv")[0] == 0
    status, out, _ = moeplan("--baseline", "old.csv", "--predictions", "new.csv", "--markdown", "m.md", "--json")
    said = json.loads(out)
    assert status == 1 and said["counts"][REGRESSED] == 1 and not said["passed"] and said["written"] is None
    assert "**regressed**" in (tmp_path / "m.md").read_text()
    status, out, err = moeplan("--baseline", "old.csv", "--predictions", "new.csv", "--refresh", "-o", "b.json")
    assert (status, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "b.json").exists()
    refreshing = ("--baseline", "old.csv", "--predictions", "new.csv", "--refresh", "-o", "b.json", "--why", "meant")
    status, out, _ = moeplan(*refreshing)
    assert status == 0 and "regressed: 1" in out and "written to b.json" in out
    assert moeplan("--baseline", "b.json", "--predictions", str(new))[0] == 0
    status, _, err = moeplan("--baseline", str(old), "--predictions", str(new), "--strict", "--refresh")
    assert status == 2 and "--strict" in err


def test_findings_are_sorted_and_shown_in_full_as_json(tmp_path: Path) -> None:
    rows = [f"s{number:03},{100 + number % 3},100" for number in range(100)]
    worse = [f"s{number:03},{150 + number % 3},100" for number in range(100)]
    found = check(table(tmp_path / "o.csv", *rows), predictions=table(tmp_path / "n.csv", *worse))
    assert isinstance(found, CheckResult) and len(found.to_dict()["findings"]) == 100
    assert "and 60 more (--json has all)" in text_of(found)
    assert [KINDS.index(each.kind) for each in found.findings] == sorted(
        KINDS.index(each.kind) for each in found.findings
    )
