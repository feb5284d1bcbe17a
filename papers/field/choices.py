"""Does a prediction choose the setting that people found best? Reports of one machine and one file with several settings of the engine.

Modelled: reports that differ in nothing but placement, micro-batch and type of keys and values are a group; of each, the setting that was
measured best beside the one that is predicted best. Settings count as equal where the best measured one's prediction lies in the
interval of the best predicted one: then the prediction promises no difference. Ignored: reports without
a prediction, groups of one setting.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .predict import Predicted
from .rows import Report

LLAMA_CPP = ("llama.cpp", "ik_llama.cpp")
_SET = ("ubatch", "kv_type")
"""Keys of a workload that are settings of the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Settings of one machine, one file and one workload."""

    engine: str
    rows: tuple[Predicted, ...]
    """In the order of the file; all predicted."""

    @property
    def measured_best(self) -> Predicted:
        """The setting that was measured best."""
        return max(self.rows, key=lambda row: _speed(row, row.report.measured))

    @property
    def predicted_best(self) -> Predicted:
        """The setting that is predicted best."""
        return max(self.rows, key=lambda row: _speed(row, row.value or 0.0))

    @property
    def chosen(self) -> bool:
        """Whether these are one."""
        return self.measured_best is self.predicted_best

    @property
    def within(self) -> bool:
        """Whether they are one, or no difference between them is promised."""
        best, value = self.predicted_best, self.measured_best.value
        if value is None or best.low is None or best.high is None:
            return self.chosen
        return self.chosen or best.low <= value <= best.high


def groups_of(rows: Iterable[Predicted]) -> list[Group]:
    """Return the groups of at least two settings, in the order of the file."""
    found: dict[str, list[Predicted]] = defaultdict(list)
    for row in rows:
        if row.value is not None:
            found[same_but_for_settings(row.report)].append(row)
    return [
        Group(engine=str(mine[0].report.part("engine").get("name")), rows=tuple(mine))
        for mine in found.values()
        if len({_setting(row) for row in mine}) > 1
    ]


def scores_of(rows: Iterable[Predicted]) -> dict[str, Any]:
    """Return, for llama.cpp with its fork and for all other engines, in how many groups the best setting is chosen, or not ruled out."""
    groups = groups_of(rows)
    split = {
        "llama.cpp and ik_llama.cpp": [one for one in groups if one.engine in LLAMA_CPP],
        "other engines": [one for one in groups if one.engine not in LLAMA_CPP],
    }
    return {name: _score(mine) for name, mine in split.items() if mine}


def _score(groups: Sequence[Group]) -> dict[str, Any]:
    chosen, within = sum(one.chosen for one in groups), sum(one.within for one in groups)
    return {
        "groups": len(groups), "chosen": chosen, "chosen_or_within": within, "share": within / len(groups),
        "missed": [
            {"best_measured": one.measured_best.report.id, "best_predicted": one.predicted_best.report.id}
            for one in groups
            if not one.within
        ],
    }  # fmt: skip


def _speed(row: Predicted, value: float) -> float:
    return 1 / value if row.report.metric == "ttft_s" and value else value


def same_but_for_settings(report: Report) -> str:
    """Return all that reports of one group have in common."""
    quant = report.part("quant")
    workload = {key: value for key, value in report.part("workload").items() if key not in _SET}
    same: Mapping[str, Any] = {
        "rig": report.rig, "model": report.row.get("model"), "quant": [quant.get("experts"), quant.get("dense")],
        "gpus": report.row.get("gpus"), "engine": report.part("engine").get("name"), "backend": report.part("engine").get("backend"),
        "workload": workload, "metric": report.metric,
    }  # fmt: skip
    return json.dumps(same, sort_keys=True)


def _setting(row: Predicted) -> str:
    workload = row.report.part("workload")
    return json.dumps([dict(row.report.part("placement")), *(workload.get(key) for key in _SET)], sort_keys=True)
