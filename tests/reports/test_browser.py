"""Reports in a real browser: every plot is drawn, nothing is fetched or complained about, nothing is cut off on a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from html import unescape
from itertools import combinations
from pathlib import Path

import pytest

from ep_page_case import HARDWARE, document, plan
from moeplan.planner.parallel.replay import replay_of
from moeplan.reports.offload.page import plan_report
from moeplan.reports.parallel.page import parallel_report
from moeplan.reports.parallel.rivals import schedules
from moeplan.reports.validation.page import predicted_measured_section
from report_documents import hit_curves, made_up_timeline, plan_document, profile, validation_document

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to open the page with")

LIMIT_S = 120
# Notes down, before anything else runs, whatever the page complains about; once plots had time, what it looks like.
PROBE = """<script>
const complaints = [];
addEventListener("error", (event) => complaints.push("error: " + event.message));
addEventListener("unhandledrejection", (event) => complaints.push("rejection: " + event.reason));
addEventListener("securitypolicyviolation", (event) => complaints.push("policy: " + event.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...parts) => complaints.push(kind + ": " + parts.join(" "));
const look = () => {
  const box = (node) => { const at = node.getBoundingClientRect(); return [at.left, at.top, at.right, at.bottom]; };
  const plots = [...document.querySelectorAll(".plot")];
  if (document.readyState !== "complete" || plots.some((plot) => plot.dataset.drawn !== "yes")) { setTimeout(look, 100); return; }
  document.documentElement.dataset.found = JSON.stringify({
    complaints,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    plots: Object.fromEntries(plots.map((plot) => [plot.id, {
      box: box(plot),
      maps: plot.querySelectorAll(".heatmaplayer image").length,
      shown: (plot.data ?? []).map((trace) => trace.x?.length ?? 0),
      marks: plot.querySelectorAll(".cartesianlayer .point, .cartesianlayer .js-line").length,
      texts: [...plot.querySelectorAll("svg text")].filter((text) => text.textContent.trim() && text.getBoundingClientRect().width > 0)
        .map((text) => [text.textContent, ...box(text)]),
      ticks: [...plot.querySelectorAll("svg .ytick text")].map((text) => [text.textContent, ...box(text)]),
    }])),
  });
};
setTimeout(look, 100);
</script>"""


@pytest.fixture(scope="module")
def page() -> str:
    lru, belady = hit_curves()
    rows = made_up_timeline()
    measured = predicted_measured_section(validation_document(), predicted=rows, measured=rows)
    return plan_report(
        plan_document(), timeline=rows, lru_curve=lru, belady_curve=belady, profile=profile(), more_sections=[measured]
    )


def opened(text: str, folder: Path, width: int) -> dict:
    """Return what the probe found on a page opened from disk in a window of its own, `width` pixels wide."""
    inner = folder / "page.html"
    inner.write_text(text.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    # Windows of this browser cannot be narrower than about 500 pixels; a frame in one can.
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><iframe id="f" src="page.html" style="width:{width}px;height:4000px;border:0"></iframe><script>'
        'const copy = () => { const inner = document.getElementById("f").contentDocument?.documentElement;'
        "if (inner?.dataset.found) document.documentElement.dataset.found = inner.dataset.found; else setTimeout(copy, 100); };"
        "copy();</script>",
        encoding="utf-8",
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
        "--no-first-run", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,4100",
        "--virtual-time-budget=30000", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as browser:
        try:
            raw, _ = browser.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(browser.pid, signal.SIGKILL)
            raise
    found = re.search(r'data-found="([^"]*)"', raw.decode("utf-8"))
    assert found is not None, "the page never finished drawing"
    return json.loads(unescape(found[1]))


def assert_nothing_is_cut_off(found: dict, width: int) -> None:
    """Every text of every plot stands inside it, and no two labels of an axis overlap."""
    for name, plot in found["plots"].items():
        left, _, right, bottom = plot["box"]
        for text, *box in plot["texts"]:
            inside = box[0] >= left - 1 and box[2] <= right + 1 and box[3] <= bottom + 1
            assert inside, f"{name}: {text!r} is cut off at {width} pixels"
        for (one, *first), (other, *second) in combinations(plot["ticks"], 2):
            beside = first[2] <= second[0] or second[2] <= first[0]
            apart = first[3] <= second[1] + 2 or second[3] <= first[1] + 2
            assert beside or apart, f"{name}: {one!r} and {other!r} overlap at {width} pixels"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_is_drawn_whole(page: str, tmp_path: Path, width: int) -> None:
    found = opened(page, tmp_path, width)
    assert found["complaints"] == []
    assert found["requests"] == []
    assert found["width"] == width and found["scroll"] <= width
    marks = {name: plot["marks"] for name, plot in found["plots"].items()}
    assert marks == {
        "plot-speed": 6,  # one bar a schedule
        "plot-share": 36,  # six parts each
        "plot-lanes": 30,  # ten rows in each of three steps
        "plot-hits": 2 + 16 + 2,  # two lines, eight points on each, two schedules
        "plot-front": 1 + 3 + 2 + 2 + 1,
        "plot-scatter": 1 + 3 + 1,
        "plot-errors": 4,
        "plot-budget": 3,
        "plot-both": 60,
    }
    assert_nothing_is_cut_off(found, width)


# Takes the other layer once the list is there, as a reader would.
CHOOSER = """<script>
const choose = () => {
  const list = document.querySelector("select");
  if (!list || document.querySelector("#plot-experts").dataset.drawn !== "yes") { setTimeout(choose, 20); return; }
  list.selectedIndex = 1 - list.selectedIndex;
  list.dispatchEvent(new Event("change"));
};
choose();
</script>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_an_expert_parallel_plan_is_drawn_whole(tmp_path: Path, width: int) -> None:
    replay = replay_of(plan())
    timelines = {"before": replay.before.outcome.timeline, "after": replay.after.outcome.timeline}
    text = parallel_report(document(), **timelines, profile=HARDWARE).replace("</body>", CHOOSER + "</body>")
    found = opened(text, tmp_path, width)
    assert found["complaints"] == [] and found["requests"] == []
    assert found["width"] == width and found["scroll"] <= width
    plots = found["plots"]
    assert {name: plot["maps"] for name, plot in plots.items() if plot["maps"]} == {
        "plot-load": 2, "plot-experts": 2 + bool((plan().placement.replica_counts() > 1).any()), "plot-traffic": 4,
    }  # fmt: skip
    assert set(plots["plot-experts"]["shown"]) == {16}
    assert plots["plot-balance"]["marks"] == 2 + 2 * 2
    assert plots["plot-steps"]["marks"] == 2 * len(schedules(document()))  # kernels, and what nothing hides
    assert plots["plot-ranks"]["marks"] > 30
    assert_nothing_is_cut_off(found, width)


def test_the_probe_notices_what_is_wrong(page: str, tmp_path: Path) -> None:
    broken = page.replace(
        "</body>", '<img src="picture.png"><script>console.error("oh"); nothing.here()</script></body>'
    )
    found = opened(broken, tmp_path, 1280)
    wanted = ["error: Uncaught ReferenceError: nothing is not defined", "error: oh", "policy: img-src"]
    assert sorted(found["complaints"]) == wanted
