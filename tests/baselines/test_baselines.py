"""Every pinned figure is predicted again, and a change is told by scenario, figure, old and new value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError, UnknownName
from moeplan.baselines.compare import ASKED, CHANGED, GONE, NEW, Difference, compare
from moeplan.baselines.document import Pinned, Scenario, open_baseline, read_baseline, rounded, to_text
from moeplan.baselines.figures import predict
from moeplan.baselines.judge import RULES
from moeplan.baselines.scenarios import default_scenarios
from moeplan.papers.registry import PAPERS
from moeplan.specs.machines.load import load_machine
from moeplan.specs.schedules.presets import PRESETS

STORED = Path(__file__).parent / "default.json"
REFRESH = "where that is meant: python -m benchmarks.baseline --write, and say in the commit what moved and why"
SCENARIOS = default_scenarios()


def group_of(name: str) -> str:
    """Return what a test runs together: the machine of many schedules, else the scenario itself."""
    return name.rpartition("/")[0] if name.startswith("schedules/") else name


def stored() -> dict[str, Pinned]:
    return read_baseline(STORED)


@pytest.mark.skipif(os.environ.get("MOEPLAN_GUARDED") == "1", reason="make guard has just compared all of them")
@pytest.mark.parametrize("group", dict.fromkeys(group_of(name) for name in SCENARIOS))
def test_pinned_figures_are_as_they_were(group: str) -> None:
    before = {name: pinned for name, pinned in stored().items() if group_of(name) == group}
    after = {name: predict(scenario, STORED.parent) for name, scenario in SCENARIOS.items() if group_of(name) == group}
    differences = [each.words() for each in compare(before, after)]
    assert not differences, "\n".join([f"{len(differences)} differences", *differences, REFRESH])


def test_the_file_holds_these_scenarios_and_is_written_as_it_is_read() -> None:
    found, header = open_baseline(STORED)
    assert header.rules == RULES
    assert {name: pinned.scenario for name, pinned in found.items()} == SCENARIOS
    assert to_text(found, header) == STORED.read_text("utf-8")
    assert {f"papers/{name}" for name in PAPERS} < set(SCENARIOS)


def test_every_schedule_means_something_somewhere() -> None:
    found = [pinned for name, pinned in stored().items() if name.startswith("schedules/")]
    assert len(found) == 6 * len(PRESETS)
    refused = {pinned.scenario.options["schedule"] for pinned in found if "refused" in pinned.figures}
    assert refused == {"resident"}
    cached = [pinned for pinned in found if pinned.scenario.options["schedule"] == "mixtral-offloading"]
    assert all(0.5 < float(pinned.figures["hit_rate"] or 0) < 0.95 for pinned in cached)
    # No two schedules of a machine are the same by accident of a budget.
    assert len({json.dumps(dict(pinned.figures), sort_keys=True) for pinned in found}) > 0.9 * len(found)


ONE = "schedules/rtx-4090/mixtral-offloading"


def test_a_changed_constant_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine("rtx-4090")
    link = machine.host_to_device
    slower = dataclasses.replace(link.pinned_bytes_per_s, value=link.pinned_bytes_per_s.value / 1.2)
    changed = dataclasses.replace(machine, host_to_device=dataclasses.replace(link, pinned_bytes_per_s=slower))
    monkeypatch.setattr("moeplan.specs.machines.load.load_machine", lambda name, engine: changed)
    found = {each.figure: each for each in compare({ONE: stored()[ONE]}, {ONE: predict(SCENARIOS[ONE])})}
    assert {each.kind for each in found.values()} == {CHANGED}
    assert found["busy_fraction.h2d"].relative_change == pytest.approx(0.2, abs=0.05)
    assert found["decode_tokens_per_s"].relative_change < 0 < found["window_s"].relative_change
    # Decisions know no costs: hits and bytes stay.
    assert not {"hits", "misses", "bytes_copied", "memory.device_bytes"} & set(found)
    words = found["window_s"].words()
    assert words.startswith(f"{ONE}  window_s: ") and "→" in words and words.endswith("%)")


def test_a_scenario_asked_otherwise_is_reported() -> None:
    options = {**SCENARIOS[ONE].options, "set": ["cache.experts_per_layer=5"]}
    found = compare({ONE: stored()[ONE]}, {ONE: predict(dataclasses.replace(SCENARIOS[ONE], options=options))})
    assert found[0].kind == ASKED and found[0].figure is None
    assert {"hits", "schedule.cache.experts_per_layer"} < {each.figure for each in found[1:]}


def pinned(figures: dict[str, object], **options: object) -> dict[str, Pinned]:
    scenario = Scenario(name="s", command="simulate", options=options)
    return {"s": Pinned(scenario=scenario, figures={name: rounded(value) for name, value in figures.items()})}


def test_differences_are_named_with_their_size() -> None:
    old, new = pinned({"a": 4, "b": 1.5, "c": None, "d": "cpu"}), pinned({"a": 5, "c": 2, "d": "gpu", "e": 1})
    assert [each.words() for each in compare(old, new)] == [
        "s  a: 4 → 5 (+25.00%)", "s  b: gone, was 1.5", "s  c: null → 2", 's  d: "cpu" → "gpu"', "s  e: new, 1",
    ]  # fmt: skip
    assert compare(old, {}) == (Difference(scenario="s", figure=None, kind=GONE),)
    assert compare({}, old) == (Difference(scenario="s", figure=None, kind=NEW),)
    assert [each.kind for each in compare(pinned({}, bits=4), pinned({}, bits=3))] == [ASKED]
    assert compare(pinned({"a": 10**12}), pinned({"a": 10**12 + 1}))[0].relative_change == pytest.approx(1e-12)
    assert compare(pinned({"a": True}), pinned({"a": 1}))[0].kind == CHANGED


@given(st.floats(1e-9, 1e12), st.integers(-40, 40))
def test_twelve_digits_count_and_no_more(value: float, places: int) -> None:
    value = float(f"{value:.11g}")
    assert not compare(pinned({"a": value}), pinned({"a": value * (1 + places * 1e-15)}))
    assert compare(pinned({"a": value}), pinned({"a": value * (1 + 2e-11)}))


FIGURES = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    max_size=6,
)


@given(figures=FIGURES)
def test_a_written_file_reads_back(figures: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    one = pinned(figures, model="tiny-moe")
    digest = hashlib.sha256(repr(figures).encode("utf-8", "backslashreplace")).hexdigest()[:16]
    path = tmp_path_factory.getbasetemp() / f"{digest}.json"
    path.write_text(to_text(one), "utf-8", errors="surrogatepass")
    assert compare(read_baseline(path), one) == ()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format_version": 1, "scenarios": {}}', '{"format_version": 2}', '{"format_version": 2, "scenarios": {"a": 1}}',
     '{"format_version": 2, "scenarios": {"a": {"command": 1, "options": {}, "figures": {}}}}',
     '{"format_version": 2, "scenarios": {"a": {"command": "x", "options": {}, "figures": {"b": [1]}}}}',
     '{"format_version": 2, "scenarios": {"a": {"command": "x", "options": {}, "figures": {"b": NaN}}}}'],
)  # fmt: skip
def test_another_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_baseline(path)
    assert "\n" not in str(refused.value)


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(UnknownName, match="reproduce"):
        predict(Scenario(name="x", command="emit", options={}))
