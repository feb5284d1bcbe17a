"""The shell of a report: one HTML file that opens offline, with the plotting library inside it once.

Modelled: a title, an answer, sections of text, tables and plots, in a column that suits a desk and a phone. A plot is a plain
dictionary, drawn when the page opens: `data` and `layout`; `narrow`, layout values by dotted path for screens below 640
pixels; `narrow_extra_px`, height added there; `zoom`, whether buttons are shown. `cells` in a trace stands for the matrix `z`
of a map that is mostly empty. `choices` puts a list above the plot from which the reader takes what is shown. A
content-security policy in the page itself forbids every request, so nothing is ever fetched or sent. Everything that comes
from a file is escaped. Ignored: what is shown (the other modules of this room).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.offline

Figure = dict[str, Any]

INK, MUTED, HAIRLINE = "#1b1f24", "#59636e", "#d1d9e0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure with what is said below it."""

    id: str
    figure: Figure
    height_px: int
    title: str
    """What the plot shows, for those who cannot see it."""
    caption: str = ""
    """Plain text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One heading and what stands under it."""

    id: str
    title: str
    parts: tuple[str | Plot, ...]
    """HTML (already escaped) and plots, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    is_number: bool = False
    is_name: bool = False
    """Its texts are never broken into lines."""


def paragraph(text: str, css: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def code_block(text: str) -> str:
    """Return text as it is typed, with lines that do not fit scrolling sideways."""
    return f"<pre><code>{escape(text)}</code></pre>"


def bullet_list(items: Iterable[str]) -> str:
    """Return plain texts as a list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, marked: frozenset[int] = frozenset(),
          sums: frozenset[int] = frozenset(), headings: Sequence[str] = ()) -> str:  # fmt: skip
    """Return a table of plain texts; rows are counted from 0, those in `marked` carry a mark, those in `sums` a line above.

    headings: where given, one a row: rows of one heading, which follow each other, stand under it.
    """
    head = "".join(f'<th scope="col"{_css(column)}>{escape(column.title)}</th>' for column in columns)
    lines = []
    for at, row in enumerate(rows):
        if headings and (at == 0 or headings[at] != headings[at - 1]):
            lines.append(
                f'<tr class="group"><th scope="colgroup" colspan="{len(columns)}">{escape(headings[at])}</th></tr>'
            )
        css = "sum" if at in sums else "marked" if at in marked else ""
        cells = "".join(f"<td{_css(column)}>{escape(cell)}</td>" for column, cell in zip(columns, row, strict=True))
        lines.append(f'<tr class="{css}">{cells}</tr>' if css else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figures_row(items: Iterable[tuple[str, str]]) -> str:
    """Return key figures side by side: (what, value)."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="key">{cells}</dl>'


def fold(summary: str, inner: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def render(*, title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """Return the whole page. lead: HTML below the title; footer: plain text."""
    links = "".join(f'<a href="#{section.id}">{escape(section.title)}</a>' for section in sections)
    contents = f"<nav>{links}</nav>" if len(sections) > 1 else ""
    body = "".join(_section(section) for section in sections)
    plots = [part for section in sections for part in section.parts if isinstance(part, Plot)]
    data = "".join(_data(plot) for plot in plots)
    # The library is needed once, and only where something is drawn.
    library = f"<script>{plotly.offline.get_plotlyjs()}</script><script>{_DRAW}</script>" if plots else ""
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}</head>\n'
        f"<body>\n<header><h1>{escape(title)}</h1>{''.join(lead)}{contents}</header>\n<main>\n{body}</main>\n"
        f"<footer>{escape(footer)}</footer>\n{data}{library}</body>\n</html>\n"
    )


def cells(rows: int, columns: int, values: Iterable[tuple[int, int, float]]) -> dict[str, Any]:
    """Return the `cells` of a map: (row, column, value) of what is not empty."""
    return {"rows": rows, "columns": columns, "at": [part for cell in values for part in cell]}


def choices(label: str, options: Sequence[tuple[str, dict[str, Any]]], start: int) -> dict[str, Any]:
    """Return the `choices` of a figure: (name, change) of each option; `start` is drawn at first.

    A change holds `data`, a table of new values for each trace (None leaves it alone), and `layout`, values by dotted path.
    """
    return {"label": label, "options": [{"name": name, **change} for name, change in options], "start": start}


def embedded_json(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _css(column: Column) -> str:
    return ' class="n"' if column.is_number else ' class="name"' if column.is_name else ""


def _section(section: Section) -> str:
    parts = "".join(part if isinstance(part, str) else _element(part) for part in section.parts)
    return f'<section id="{section.id}"><h2>{escape(section.title)}</h2>{parts}</section>\n'


def _element(plot: Plot) -> str:
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return (
        f'<figure><div class="plot" id="{plot.id}" role="img" aria-label="{escape(plot.title)}" '
        f'style="height:{plot.height_px}px"></div>{caption}</figure>'
    )


def _data(plot: Plot) -> str:
    return f'<script type="application/json" id="{plot.id}-data">{embedded_json(plot.figure)}</script>\n'


_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: {INK}; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }}
header, main, footer {{ max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }}
header {{ padding-top: 2rem; }}
h1 {{ font-size: 1.1rem; font-weight: 600; color: {MUTED}; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.3rem; line-height: 1.25; margin: 2.75rem 0 .75rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .5rem; }}
p, ul {{ margin: .5rem 0; max-width: 46rem; }}
li {{ margin: .15rem 0; }}
.answer {{ font-size: 1.65rem; line-height: 1.25; font-weight: 650; margin: 0 0 .5rem; letter-spacing: -.01em; }}
.verdict {{ font-size: 1.05rem; }}
.note {{ color: {MUTED}; font-size: .9rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.25rem 0 0; padding: .6rem 0; border-top: 1px solid {HAIRLINE};
  border-bottom: 1px solid {HAIRLINE}; font-size: .9rem; }}
a {{ color: #0550ae; text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
.key {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: .9rem 1.5rem; margin: 1.25rem 0; }}
.key dt {{ color: {MUTED}; font-size: .82rem; }}
.key dd {{ margin: 0; font-size: 1.15rem; font-weight: 600; }}
figure {{ margin: .75rem 0 1rem; }}
figcaption {{ color: {MUTED}; font-size: .9rem; max-width: 46rem; }}
.plot {{ width: 100%; }}
.scroll {{ overflow-x: auto; margin: .75rem 0; background:
  linear-gradient(to right, #fff 1rem, #fff0) left / 2rem 100% no-repeat local,
  linear-gradient(to left, #fff 1rem, #fff0) right / 2rem 100% no-repeat local,
  linear-gradient(to right, #0002, #0000) left / .6rem 100% no-repeat,
  linear-gradient(to left, #0002, #0000) right / .6rem 100% no-repeat; }}
table {{ border-collapse: collapse; font-size: .9rem; min-width: 100%; }}
th {{ text-align: left; font-weight: 600; color: {MUTED}; border-bottom: 1px solid {INK}; vertical-align: bottom; }}
th, td {{ padding: .32rem .9rem .32rem 0; }}
td {{ border-bottom: 1px solid {HAIRLINE}; vertical-align: top; }}
th:last-child, td:last-child {{ padding-right: 0; }}
td:last-child:not(.n) {{ min-width: 11rem; }}
.n {{ text-align: right; }}
td.n, td.name {{ white-space: nowrap; }}
.marked td, .sum td {{ font-weight: 650; }}
.group th {{ border-bottom: 1px solid {HAIRLINE}; padding-top: .9rem; font-size: .82rem; }}
.sum td {{ border-top: 1px solid {MUTED}; }}
.marked td:first-child::before {{ content: "▸ "; color: #0b6bcb; }}
pre {{ background: #f6f8fa; border: 1px solid {HAIRLINE}; border-radius: 6px; padding: .75rem 1rem;
  overflow-x: auto; font-size: .85rem; }}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; }}
.choice {{ display: inline-flex; align-items: center; gap: .5rem; margin: .25rem 0 .5rem; }}
.choice select {{ font: inherit; color: inherit; background: #fff; border: 1px solid {MUTED}; border-radius: 4px;
  padding: .15rem .4rem; }}
details {{ margin: .75rem 0; }}
summary {{ cursor: pointer; color: #0550ae; }}
footer {{ color: {MUTED}; font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }}
@media (max-width: 640px) {{ body {{ font-size: 15px; }} header, main, footer {{ padding-left: 1rem; padding-right: 1rem; }}
  header {{ padding-top: 1.25rem; }} .answer {{ font-size: 1.3rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.25rem; }}
  .key {{ grid-template-columns: repeat(2, 1fr); }} }}
@media print {{ nav {{ display: none; }} section {{ break-inside: avoid; }} }}
"""

# Each plot says when it is drawn, so that a test of the page need not guess; one that fails says so in its place.
_DRAW = """
"use strict";
(() => {
  const narrow = window.matchMedia("(max-width: 640px)").matches;
  const config = {responsive: true, displaylogo: false, showTips: false, plotlyServerURL: "",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]};
  const assign = (target, path, value) => {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) { target = target[key] ??= {}; }
    target[last] = value;
  };
  const dense = (trace) => {
    if (!trace?.cells) return trace;
    const {cells: {rows, columns, at}, ...rest} = trace;
    const z = Array.from({length: rows}, () => Array(columns).fill(null));
    for (let i = 0; i < at.length; i += 3) z[at[i]][at[i + 1]] = at[i + 2];
    return {...rest, z};
  };
  const offer = (holder, figure) => {
    const {label, options, start} = figure.choices;
    const change = (option) => {
      option.data.forEach((values, at) => Object.assign(figure.data[at], dense(values) ?? {}));
      for (const [path, value] of Object.entries(option.layout ?? {})) assign(figure.layout, path, value);
    };
    const list = Object.assign(document.createElement("select"), {id: holder.id + "-choice"});
    options.forEach((option) => list.add(new Option(option.name)));
    list.selectedIndex = start;
    list.addEventListener("change", () => {
      change(options[list.selectedIndex]);
      Plotly.react(holder, [...figure.data], {...figure.layout}, {...config, displayModeBar: false});
    });
    const line = Object.assign(document.createElement("label"), {className: "choice", textContent: label});
    line.htmlFor = list.id;
    line.append(list);
    holder.before(line);
    change(options[start]);
  };
  for (const holder of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(document.getElementById(holder.id + "-data").textContent);
    if (narrow) {
      for (const [path, value] of Object.entries(figure.narrow ?? {})) assign(figure.layout, path, value);
      holder.style.height = holder.offsetHeight + (figure.narrow_extra_px ?? 0) + "px";
    }
    figure.data = figure.data.map(dense);
    if (figure.choices) offer(holder, figure);
    const own = figure.zoom ? config : {...config, displayModeBar: false};
    Plotly.newPlot(holder, figure.data, figure.layout, own)
      .then(() => { holder.dataset.drawn = "yes"; })
      .catch((reason) => { holder.textContent = "This plot could not be drawn: " + reason; });
  }
})();
"""
