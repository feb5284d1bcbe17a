"""Readers of text tables of routing: JSON Lines and CSV, one row for each token and layer.

Modelled: named columns for request, token, layer, experts and, where there are, weights and phase. Experts are a list
(in CSV: `3;5`, `3 5` or `[3, 5]`), numbered columns (`expert_0`, `expert_1`), or a row each; a JSON row without a layer
may hold the lists of all layers. Files are read line by line. Ignored: further columns.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....base.errors import InputError
from ...recording import RoutingTrace
from ...validate import MAX_TOP_K
from .text_rows import Row, csv_rows, integer, json_rows
from .token_table import NAMES, Table, column_names, phase_number, trace_of_table

_NUMBERED = re.compile(r"(.*?)[_.]?([0-9]{1,3})\Z")


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    request_column: str = "",
    token_column: str = "",
    layer_column: str = "",
    experts_column: str = "",
    weights_column: str = "",
    phase_column: str = "",
    prompt_tokens: int | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing in a file of JSON objects, one a line. Raises InputError."""
    told = _told(request_column, token_column, layer_column, experts_column, weights_column, phase_column)
    table = _table(json_rows(path), told, path)
    return trace_of_table(
        table, source=source or f"JSON Lines: {Path(path).name}", prompt_tokens=prompt_tokens, num_experts=num_experts,
        layer_ids=layer_ids, model=model, licence=licence,
    )  # fmt: skip


def read_csv(
    path: str | os.PathLike[str],
    *,
    request_column: str = "",
    token_column: str = "",
    layer_column: str = "",
    experts_column: str = "",
    weights_column: str = "",
    phase_column: str = "",
    prompt_tokens: int | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing in a CSV file (commas, semicolons or tabs) with a line of column names. Raises InputError."""
    told = _told(request_column, token_column, layer_column, experts_column, weights_column, phase_column)
    table = _table(csv_rows(path), told, path)
    return trace_of_table(
        table, source=source or f"CSV: {Path(path).name}", prompt_tokens=prompt_tokens, num_experts=num_experts,
        layer_ids=layer_ids, model=model, licence=licence,
    )  # fmt: skip


@dataclass(slots=True)
class _Collected:
    """Rows read so far, as flat arrays of machine numbers."""

    path: str
    request: array[int] = field(default_factory=lambda: array("q"))
    token: array[int] = field(default_factory=lambda: array("q"))
    layer: array[int] = field(default_factory=lambda: array("q"))
    phase: array[int] = field(default_factory=lambda: array("q"))
    experts: array[int] = field(default_factory=lambda: array("q"))
    weights: array[float] = field(default_factory=lambda: array("f"))
    top_k: int = 0
    requests: dict[object, int] = field(default_factory=dict)

    def add(self, where: str, row: Row, layer: int, experts: list[int], weights: list[float] | None) -> None:
        """Add one token's choices in one layer; `row` holds request, token and phase. Raises InputError."""
        self.top_k = self.top_k or len(experts)
        if len(experts) != self.top_k or not (1 <= len(experts) <= MAX_TOP_K):
            rule = f"must be {self.top_k or 'some'} experts like the rows before"
            raise InputError(f"{where}: experts", experts[:20], rule, "check the columns")
        if bool(self.token) and (weights is not None) != bool(self.weights):
            raise InputError(f"{where}: weights", weights, "every row must have them, or none", "check the columns")
        if weights is not None and len(weights) != len(experts):
            raise InputError(
                f"{where}: weights", weights[:20], f"must be {len(experts)}, one an expert", "check the columns"
            )
        self.request.append(self._request(row.get("request"), where))
        self.token.append(integer(row["token"], f"{where}: token"))
        self.layer.append(layer)
        if "phase" in row:
            self.phase.append(phase_number(row["phase"], where))
        self.experts.extend(experts)
        if weights is not None:
            self.weights.extend(weights)

    def table(self) -> Table:
        """Return the rows as a table; rows with one expert each that repeat a token and layer become its choices."""
        experts = np.frombuffer(self.experts, np.int64).reshape(-1, max(1, self.top_k))
        weights = np.frombuffer(self.weights, np.float32).reshape(experts.shape) if self.weights else None
        phase = np.frombuffer(self.phase, np.int64) if self.phase else None
        columns = [np.frombuffer(column, np.int64) for column in (self.request, self.token, self.layer)]
        if phase is not None and len(phase) != len(columns[0]):
            raise InputError("phase", len(phase), "every row must have one, or none", "check the columns")
        whole = Table(
            request=columns[0], token=columns[1], layer=columns[2], experts=experts, weights=weights, phase=phase
        )
        return _gathered(whole) if self.top_k == 1 else whole

    def _request(self, value: object, where: str) -> int:
        """Return the number of a request: its own where it is one, else in order of first appearance."""
        if isinstance(value, (list, dict)):
            raise InputError(f"{where}: request", value, "must be a number or a text", "check the columns")
        return self.requests.setdefault(value, len(self.requests))


def _table(rows: Iterator[tuple[str, Row]], told: dict[str, str], path: str | os.PathLike[str]) -> Table:
    """Return the table of a file's rows. Raises InputError."""
    collected = _Collected(path=str(path))
    names: dict[str, str] = {}
    numbered: dict[str, list[str]] = {}
    all_layers = False
    for where, row in rows:
        if not names:
            columns, numbered = _numbered_columns(list(row), told)
            all_layers = not told.get("layer") and not set(NAMES["layer"]) & set(columns)
            names = column_names([*columns, "layer"] if all_layers else columns, told)
        part: Row = {}
        for key in ("request", "token", "phase", "layer"):
            if key in names and not (key == "layer" and all_layers):
                if row.get(names[key]) is None:
                    raise InputError(f"{where}: {names[key]}", None, "is missing", "give every column in every row")
                part[key] = row[names[key]]
        experts = _cell(row, names["experts"], numbered, where)
        weights = _cell(row, names["weights"], numbered, where) if "weights" in names else None
        if all_layers:
            if not isinstance(experts, list) or not experts or not all(isinstance(inner, list) for inner in experts):
                rule = "no column for the layer, so it must be one list of experts a layer"
                raise InputError(
                    f"{where}: {names['experts']}", type(experts).__name__, rule, "name it: --option layer_column=…"
                )
            for layer, inner in enumerate(experts):
                of_layer = weights[layer] if isinstance(weights, list) and layer < len(weights) else None
                collected.add(where, part, layer, _integers(inner, where), _floats(of_layer, where))
        else:
            layer = integer(part["layer"], f"{where}: layer")
            collected.add(where, part, layer, _integers(experts, where), _floats(weights, where))
    if not names:
        raise InputError("path", str(path), "has no rows", "record at least one token")
    return collected.table()


def _gathered(table: Table) -> Table:
    """Return a table of one row a choice as one row a token and layer; unchanged when no token and layer repeats."""
    order = np.lexsort((np.arange(len(table.token)), table.layer, table.token, table.request))
    keys = [column[order] for column in (table.request, table.token, table.layer)]
    starts = np.flatnonzero(np.r_[True, np.logical_or.reduce([np.diff(key) != 0 for key in keys])])
    counts = np.diff(np.r_[starts, len(order)])
    if not len(counts) or int(counts.max()) == 1:
        return table
    if int(counts.min()) != int(counts.max()):
        at = int(np.argmax(counts != counts[0]))
        shown = f"{int(counts[at])} experts in layer {int(keys[2][starts[at]])} of token {int(keys[1][starts[at]])}"
        raise InputError("experts", shown, f"others have {int(counts[0])}", "give every choice of every token, or -1")
    first = order[starts]
    return Table(
        request=table.request[first],
        token=table.token[first],
        layer=table.layer[first],
        experts=table.experts[order].reshape(len(starts), -1),
        weights=None if table.weights is None else table.weights[order].reshape(len(starts), -1),
        phase=None if table.phase is None else table.phase[first],
    )


def _told(request: str, token: str, layer: str, experts: str, weights: str, phase: str) -> dict[str, str]:
    """Return part → column, where an option names one."""
    named = {"request": request, "token": token, "layer": layer, "experts": experts, "weights": weights, "phase": phase}
    return {part: name for part, name in named.items() if name}


def _numbered_columns(columns: list[str], told: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return (columns, with `expert_0`, `expert_1`, … as one `expert`; what each such name stands for)."""
    groups: dict[str, list[tuple[int, str]]] = {}
    usual = {*NAMES["experts"], *NAMES["weights"], told.get("experts", ""), told.get("weights", "")}
    for column in columns:
        match = _NUMBERED.match(column)
        if match and match[1] in usual and match[1] not in columns:
            groups.setdefault(match[1], []).append((int(match[2]), column))
    ordered = {name: [column for _, column in sorted(found)] for name, found in groups.items()}
    return [*columns, *ordered], ordered


def _cell(row: Row, name: str, numbered: dict[str, list[str]], where: str) -> Any:
    """Return what a row has for experts or weights; CSV texts become lists. Raises InputError when it is missing."""
    value = [row.get(column) for column in numbered[name]] if name in numbered else row.get(name)
    if value is None or (isinstance(value, list) and None in value):
        raise InputError(f"{where}: {name}", None, "is missing", "give every column in every row")
    if isinstance(value, str):
        return value.strip().strip("[]()").replace(",", " ").replace(";", " ").replace("|", " ").split()
    return value


def _integers(value: object, where: str) -> list[int]:
    """Return a list of expert ids. Raises InputError."""
    values = value if isinstance(value, list) else [value]
    return [integer(one, f"{where}: experts") for one in values[: MAX_TOP_K + 1]]


def _floats(value: object, where: str) -> list[float] | None:
    """Return a list of weights, None where there is none. Raises InputError."""
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    found: list[float] = []
    for one in values[: MAX_TOP_K + 1]:
        try:
            number = float(one) if isinstance(one, (str, int, float)) and not isinstance(one, bool) else np.nan
        except (ValueError, OverflowError):
            number = np.nan
        if not abs(number) < 1e30:
            raise InputError(f"{where}: weights", one, "must be numbers", "check the columns")
        found.append(number)
    return found
