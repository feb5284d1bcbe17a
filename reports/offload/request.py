"""One request from its first step to its last, and what changes as its context grows.

Modelled: the passes of a prompt, the first token, the steps of the reply, of the chosen schedule above those of its rivals; decoding
speed and memory at other contexts, over the same routing with its tokens moved there. Ignored: what else a plan holds (`page`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ...base.errors import DoesNotFit
from ...base.units import GIB, NS_PER_S
from ...sim.offload.simulate import Simulation
from ...sim.offload.workload import Workload
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import DECODE, RoutingTrace
from .. import numbers
from ..bars import lying_figure, rows_under
from ..page import MUTED, Plot, Section, paragraph
from ..style import BLUE, GREEN, ORANGE, SKY, VERMILION, axis, layout, lying_bars, note, points, upright_line
from .speed import Document, Entry, entries

_RIVALS = 4
_MOST_PASSES = 24
"""Passes of a prompt drawn apart; of a longer one they are drawn together."""
_STEPS = 64
"""Decoding steps predicted at each context."""
_CONTEXTS = tuple(1 << power for power in range(9, 21))


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One request under one schedule, in seconds from its first step."""

    label: str
    heading: str
    passes_s: tuple[float, ...]
    """Of the prompt, in order."""
    decode_s: float
    reply_tokens: int

    @property
    def first_token_s(self) -> float:
        """When the prompt is computed."""
        return sum(self.passes_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtContext:
    """Decoding at one context."""

    tokens: int
    speed: float | None
    """Generated tokens per second; None where the schedule does not fit."""
    interval: tuple[float, float] | None
    device_bytes: int | None
    kv_bytes: int | None


def request_sections(document: Document, simulation: Simulation) -> list[Section]:
    """Return the section of one request and that of its context; none for a window in which no request comes to its end."""
    every = entries(document)
    best, rivals = every[0], sorted(every[1:], key=lambda one: float(one.result["window_s"]))
    shown = [best, *[one for one in rivals if one.kind == "published" and not one.needs][:_RIVALS]]
    courses = [course for one in shown if (course := course_of(simulation, one)) is not None]
    found = []
    if courses:
        text = f"{_told(courses[0])} All schedules are shown over the same request."
        found.append(Section(id="request", title="One request", parts=(paragraph(text), course_plot(courses))))
    at = at_contexts(simulation, best.schedule)
    if len([one for one in at if one.speed is not None]) > 1:
        parts = (paragraph(_context_words(at)), speed_plot(at), memory_plot(at, simulation.budget_bytes))
        found.append(Section(id="context", title="As the context grows", parts=parts))
    return found


def course_of(simulation: Simulation, entry: Entry) -> Course | None:
    """Return the course of the request whose time is nearest the mean; None where none comes to its end."""
    resolved = simulation.resolve(entry.schedule)
    workload = simulation.workload(resolved)
    if not len(workload.requests):
        return None
    ends = np.concatenate(([0], simulation.run(resolved).step_end))
    took = ends[workload.requests[:, 1] + 1] - ends[workload.requests[:, 0]]
    first, last = workload.requests[int(np.abs(took - took.mean()).argmin())].tolist()
    steps = np.diff(ends)[first : last + 1] / NS_PER_S
    is_prompt = workload.step_phase[first : last + 1] == 0
    passes = tuple(steps[is_prompt].tolist())
    return Course(
        label=entry.label, heading=entry.heading, passes_s=passes, decode_s=float(steps[~is_prompt].sum()),
        reply_tokens=round(float(_each_request(workload)[first : last + 1][~is_prompt].sum())),
    )  # fmt: skip


def _each_request(workload: Workload) -> np.ndarray[Any, Any]:
    """Return float [num_steps]: tokens that a pass yields for each of its requests; of a prompt all of its tokens."""
    if workload.step_drafted is None:
        return np.where(workload.step_phase == 1, 1.0, workload.step_tokens)
    return workload.yields / np.where(workload.step_phase == 1, workload.step_tokens - workload.step_drafted, 1)


def course_plot(courses: Sequence[Course]) -> Plot:
    """Return a bar a schedule, from left to right what happens to the request."""
    rows = rows_under([one.heading for one in courses])
    data = []
    most = max(len(one.passes_s) for one in courses)
    drawn = most if most <= _MOST_PASSES else 1
    for number in range(drawn):
        lengths, hover = [], []
        for one in courses:
            parts = one.passes_s if drawn > 1 or most == 1 else (one.first_token_s,)
            length = parts[number] if number < len(parts) else 0.0
            what = f"pass {number + 1} of {len(parts)}" if drawn > 1 else f"{len(one.passes_s)} passes"
            lengths.append(length)
            hover.append(f"<b>{escape(one.label)}</b><br>prompt, {what}: {numbers.seconds(length)}")
        data.append(lying_bars(lengths, rows.bars, hover, name="prompt, pass by pass", marker={"color": (BLUE, SKY)[number % 2]},
                               showlegend=number == 0))  # fmt: skip
    hover = [
        f"<b>{escape(one.label)}</b><br>{one.reply_tokens:,} generated tokens: {numbers.seconds(one.decode_s)}"
        for one in courses
    ]
    data.append(lying_bars([one.decode_s for one in courses], rows.bars, hover, name="reply", marker={"color": ORANGE}))
    firsts = [one.first_token_s for one in courses]
    told = [f"<b>{escape(one.label)}</b><br>first token after {numbers.seconds(one.first_token_s)}" for one in courses]
    data.append(points("first token", firsts, rows.bars, told, VERMILION, marker={"size": 11, "symbol": "line-ns-open", "color": VERMILION,
                                                                                 "line": {"width": 3, "color": VERMILION}}))  # fmt: skip
    texts = [numbers.seconds(one.first_token_s + one.decode_s) for one in courses]
    figure = lying_figure([one.label for one in courses], rows, texts, "the request", axis("seconds"), data)
    figure["layout"] |= {"barmode": "stack", "showlegend": True}
    return Plot(
        id="plot-request", figure=figure, height_px=rows.height_px(130), title="One request under the chosen schedule and its rivals",
        caption="From left to right: the passes of the prompt in two shades, the first token, the reply. Where several requests "
        "are decoded together, steps are shared with them. Waiting for a free place is not counted.",
    )  # fmt: skip


def _told(one: Course) -> str:
    whole = one.first_token_s + one.decode_s
    prompt = (
        f"its prompt in {len(one.passes_s)} {'pass' if len(one.passes_s) == 1 else 'passes'}, " if one.passes_s else ""
    )
    return (
        f"{numbers.seconds(whole)} from the first step to the last under the chosen schedule: {prompt}the first token after "
        f"{numbers.seconds(one.first_token_s)}, {one.reply_tokens:,} tokens in {numbers.seconds(one.decode_s)}."
    )


# --- context ---------------------------------------------------------------------------------------------------------


def at_contexts(simulation: Simulation, schedule: OffloadSchedule) -> list[AtContext]:
    """Return decoding with `schedule` at contexts that double, up to the longest of the model, until it does not fit."""
    decoded = _decoded(simulation.trace)
    found: list[AtContext] = []
    if decoded is None:
        return found
    longest = simulation.model.longest_context or _CONTEXTS[-1]
    contexts = [tokens for tokens in _CONTEXTS if tokens <= longest]
    for tokens in contexts:
        trace = dataclasses.replace(decoded, position=decoded.position + np.int32(max(0, tokens - decoded.num_tokens)))
        there = simulation.over(trace, context_tokens=max(tokens, int(trace.position[-1]) + 1), window_steps=None)
        try:
            predicted = there.predict(schedule)
        except DoesNotFit:
            found.append(AtContext(tokens=tokens, speed=None, interval=None, device_bytes=None, kv_bytes=None))
            break
        memory = predicted.memory_breakdown
        kept = sum(item.num_bytes for item in memory.items if item.place == "device" and item.name == "kv cache")
        found.append(AtContext(
            tokens=tokens, speed=predicted.metrics.decode_tokens_per_s, interval=predicted.metrics.decode_tokens_per_s_interval,
            device_bytes=memory.device_bytes, kv_bytes=kept,
        ))  # fmt: skip
    return found


def _decoded(trace: RoutingTrace) -> RoutingTrace | None:
    """Return the first generated tokens of the first request that has any, as a recording of their own."""
    rows = np.flatnonzero(trace.phase == DECODE)
    if not len(rows):
        return None
    rows = rows[trace.request[rows] == trace.request[rows[0]]][:_STEPS]
    return dataclasses.replace(
        trace, experts=trace.experts[rows], request=np.zeros(len(rows), np.int32), position=np.arange(len(rows), dtype=np.int32),
        phase=trace.phase[rows], weights=None if trace.weights is None else trace.weights[rows],
        predicted=None if trace.predicted is None else trace.predicted[rows],
        predicted_prob=None if trace.predicted_prob is None else trace.predicted_prob[rows],
    )  # fmt: skip


def speed_plot(at: Sequence[AtContext]) -> Plot:
    """Return decoding speed against context, with its interval."""
    fits = [one for one in at if one.speed is not None and one.interval is not None]
    tokens, speeds = [one.tokens for one in fits], [float(one.speed or 0) for one in fits]
    lows, highs = ([(one.interval or (0.0, 0.0))[end] for one in fits] for end in (0, 1))
    hover = [
        f"{one.tokens:,} tokens: {numbers.significant(one.speed or 0)} generated tokens/s, "
        f"{numbers.significant(low)} to {numbers.significant(high)} likely"
        for one, low, high in zip(fits, lows, highs, strict=True)
    ]
    band = {
        "type": "scatter", "mode": "lines", "x": [*tokens, *reversed(tokens)], "y": [*highs, *reversed(lows)], "fill": "toself",
        "fillcolor": "rgba(0,114,178,0.15)", "line": {"width": 0}, "hoverinfo": "skip", "name": "interval",
    }  # fmt: skip
    line = points(
        "generated tokens/s", tokens, speeds, hover, BLUE, mode="lines+markers", line={"color": BLUE, "width": 2}
    )
    plan = layout(xaxis=_context_axis(at), yaxis=axis("generated tokens/s", rangemode="tozero"), **_beyond(at))
    return Plot(
        id="plot-context-speed", figure={"data": [band, line], "layout": plan}, height_px=320, title="Decoding speed against context",
        caption="One request alone, the chosen schedule as it is.",
    )  # fmt: skip


def memory_plot(at: Sequence[AtContext], budget: int) -> Plot:
    """Return device memory against context: keys and values, everything else, and the budget."""
    fits = [one for one in at if one.device_bytes is not None and one.kv_bytes is not None]
    tokens = [one.tokens for one in fits]
    kept = [(one.kv_bytes or 0) / GIB for one in fits]
    rest = [(one.device_bytes or 0) / GIB - mine for one, mine in zip(fits, kept, strict=True)]
    areas = [
        {"type": "scatter", "mode": "lines", "x": tokens, "y": values, "stackgroup": "memory", "name": name,
         "line": {"color": colour, "width": 1},
         "hovertemplate": "%{x:,} tokens: %{y:.2f} GiB " + name + "<extra></extra>"}
        for name, values, colour in (("everything else", rest, GREEN), ("keys and values", kept, ORANGE))
    ]  # fmt: skip
    limit = {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": budget / GIB, "y1": budget / GIB, "line": {"color": MUTED, "dash": "dot"},
    }  # fmt: skip
    more = _beyond(at)
    more["shapes"].append(limit)
    plan = layout(xaxis=_context_axis(at), yaxis=axis("device memory, GiB", rangemode="tozero"), **more)
    return Plot(
        id="plot-context-memory", figure={"data": areas, "layout": plan}, height_px=300, title="Device memory against context",
        caption="Dotted: the budget. Experts on the device stay as many as the plan chose.",
    )  # fmt: skip


def _context_axis(at: Sequence[AtContext]) -> dict[str, object]:
    ticks = [one.tokens for one in at][:: 2 if len(at) > 6 else 1]
    words = [f"{tokens // 1024}k" if tokens >= 1024 else str(tokens) for tokens in ticks]
    return axis("tokens of context", type="log", tickmode="array", tickvals=ticks, ticktext=words)


def _beyond(at: Sequence[AtContext]) -> dict[str, list[dict[str, Any]]]:
    """Return the line where the schedule stops to fit."""
    missing = next((one.tokens for one in at if one.speed is None), None)
    if missing is None:
        return {"shapes": [], "annotations": []}
    x = float(np.log10(missing))
    line = upright_line(missing)
    return {
        "shapes": [line],
        "annotations": [note("does not fit", x=x, y=1, yref="paper", yanchor="bottom", xanchor="right")],
    }


def _context_words(at: Sequence[AtContext]) -> str:
    fits = [one for one in at if one.speed is not None]
    first, last = fits[0], fits[-1]
    said = (
        f"{numbers.significant(first.speed or 0)} generated tokens/s at {first.tokens:,} tokens of context, "
        f"{numbers.significant(last.speed or 0)} at {last.tokens:,}."
    )
    missing = next((one for one in at if one.speed is None), None)
    if missing is not None:
        said += f" At {missing.tokens:,} tokens the schedule no longer fits its memory: plan again with --context {missing.tokens}."
    return said
