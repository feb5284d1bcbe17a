"""Stages of steps of many ranks into laws (`costs.rank_laws`): rates that are the same for all, never below zero.

Modelled: relative errors count alike for short and long stages; a law's uncertainty is what leaving out one shape of model (where there
is one only, one size of step) got wrong nine times in ten; that of whole steps likewise, as the
calibration found it. Ignored: overlap, which is one factor beside the laws (`together`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import least_squares, nnls

from ...base.errors import InputError
from ...specs.machines.profile import Constant, Curve, NodeConstants
from ..costs.rank_laws import (
    BUSY,
    COMBINE,
    CORES,
    DISPATCH,
    LINK,
    REDUCE,
    STEP,
    TERMS,
    TOGETHER,
    Array,
    finish_s,
    law_name,
    shares,
)
from ..costs.surface import nine_in_ten
from ..samples import Sample, SampleSet

_ROUNDS = 4
_EXCHANGES = (DISPATCH, COMBINE, REDUCE)


class RankFit:
    """The laws of one number of ranks in one number of nodes."""

    def __init__(self, ranks: int, nodes: int, curves: Mapping[str, Curve], errors: Mapping[str, Array]) -> None:
        self.ranks, self.nodes, self.curves, self.errors = ranks, nodes, curves, errors

    def node(self, citation: str) -> NodeConstants:
        """Return what a server is in words that other machines share: ports of a large exchange alone."""
        name = law_name(self.ranks, self.nodes, DISPATCH)
        start, inter, intra, shared = self.curves[name].seconds
        wrong = self.curves[name].relative_uncertainty

        def constant(value: float, what: str) -> Constant:
            return Constant(value=value, source="measured", citation=f"{citation}: {what}", relative_uncertainty=wrong)

        per_node = self.ranks // self.nodes
        inside = constant(1 / max(intra + self.ranks * shared, 1e-15), "large balanced exchanges inside a node")
        begin = constant(start, "an exchange of nothing")
        if self.nodes == 1:
            return NodeConstants(num_gpus=self.ranks, gpu_link_bytes_per_s=inside, gpu_link_latency_s=begin)
        between = constant(1 / max(per_node * inter, 1e-15), "a rank's part of its node's link")
        return NodeConstants(
            num_gpus=per_node,
            gpu_link_bytes_per_s=inside,
            gpu_link_latency_s=begin,
            nic_bytes_per_s=between,
            nic_latency_s=begin,
        )


def fit_ranks(samples: SampleSet, citation: str) -> list[RankFit]:
    """Return the laws of every set-up that was measured; raises InputError for samples that are not complete."""
    setups = sorted({(int(s.arguments["ranks"]), int(s.arguments["nodes"])) for s in samples.of("rank_stage")})
    return [_fit(samples, ranks, nodes, citation) for ranks, nodes in setups]


def _fit(samples: SampleSet, ranks: int, nodes: int, citation: str) -> RankFit:
    """Return the laws of one set-up."""
    mine = [s for s in samples.of("rank_stage") if (s.arguments["ranks"], s.arguments["nodes"]) == (ranks, nodes)]
    facts = [s for s in samples.of("rank_fact") if (s.arguments["ranks"], s.arguments["nodes"]) == (ranks, nodes)]
    told = {s.labels["what"]: s.median_s for s in facts}
    for what in (CORES, TOGETHER, *((LINK,) if nodes > 1 else ())):
        if what not in told:
            raise InputError("samples: rank_fact", what, "none measured", "calibrate again")
    curves, errors = {}, {}
    for what in dict.fromkeys(s.labels["what"] for s in mine):
        stages = [s for s in mine if s.labels["what"] == what]
        kind = what.partition(".")[0]
        if kind not in TERMS:
            raise InputError("samples: rank_stage.what", what, f"not one of {', '.join(TERMS)}", "calibrate again")
        features = np.array(
            [_numbers(s.labels["features"], ranks, len(TERMS[kind])) for s in stages]
        )  # [n, ranks, terms]
        seconds = np.array([s.midmean_s for s in stages])
        groups = _groups(stages)
        solved = _law(kind, features, seconds, told[CORES])
        wrong = np.concatenate([
            np.abs(_predicted(kind, features[out], _law(kind, features[~out], seconds[~out], told[CORES]), told[CORES]) / seconds[out] - 1)
            for out in groups
        ])  # fmt: skip
        name = law_name(ranks, nodes, what)
        errors[name] = wrong
        curves[name] = Curve(
            arguments={"term": tuple(float(at) for at in range(len(solved)))}, seconds=tuple(solved.tolist()),
            relative_uncertainty=nine_in_ten(wrong), citation=f"{citation}: {', '.join(TERMS[kind])}",
        )  # fmt: skip
    for fact in facts:
        what = fact.labels["what"]
        off = nine_in_ten(np.array(fact.seconds)) if what == STEP else 0.0
        curves[law_name(ranks, nodes, what)] = Curve(
            arguments={"term": (0.0,)}, seconds=(told[what],), relative_uncertainty=off, citation=citation
        )
    return RankFit(ranks, nodes, curves, errors)


def _groups(stages: Sequence[Sample]) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Return masks of what is left out in turns: the stages of one shape of model, or of one size of step."""
    for axis in ("shape", "tokens"):
        values = [s.labels["shape"] if axis == "shape" else s.arguments["tokens"] for s in stages]
        if len(set(values)) > 1:
            return [np.array([value == each for value in values]) for each in dict.fromkeys(values)]
    raise InputError("samples: rank_stage", len(stages), "of one shape and size only", "calibrate with several")


def _law(kind: str, features: Array, seconds: Array, cores: float) -> Array:
    """Return seconds of one of each term of a kind of stage."""
    if kind in _EXCHANGES:
        return _exchange_law(features, seconds)
    return _sum_law(features, seconds) if kind == BUSY else _op_law(features, seconds, cores)


def _sum_law(features: Array, seconds: Array) -> Array:
    """Return seconds of one of each term where those of all ranks [stages, ranks, terms] add up."""
    design = features.sum(axis=1)
    typical = np.maximum(design.max(axis=0), 1e-30)
    return np.asarray(nnls(design / typical / seconds[:, None], np.ones(len(seconds)))[0] / typical)


def _op_law(features: Array, seconds: Array, cores: float) -> Array:
    """Return seconds of one of each term, of features [stages, ranks, terms] of ranks that share `cores`."""
    guess = np.ones(features.shape[-1])
    typical = np.maximum(features.max(axis=(0, 1)), 1e-30)
    solved: Array = np.asarray(guess * np.median(seconds) / typical / len(guess), np.float64)
    for _ in range(_ROUNDS):
        order, weights = shares(features @ solved, cores)
        ordered = np.take_along_axis(features, order[..., None], axis=1)
        design = (ordered * weights[None, :, None]).sum(axis=1)
        scaled = design / seconds[:, None] / typical
        solved = np.asarray(nnls(scaled, np.ones(len(seconds)))[0] / typical)
    return solved


def _exchange_law(features: Array, seconds: Array) -> Array:
    """Return (start, per byte between nodes, inside, of all) of features [stages, ranks, 4]: the slowest port of either tier."""
    inter, intra, total = (features[:, :, at].max(axis=1) for at in (1, 2, 3))
    scale = np.array(
        [np.median(seconds), *(np.median(seconds) / max(float(each.max()), 1.0) for each in (inter, intra, total))]
    )

    def off(x: Array) -> Array:
        law = np.exp(x) * scale
        made = law[0] + np.maximum(inter * law[1], intra * law[2]) + total * law[3]
        return np.asarray(np.log(made / seconds))

    found = least_squares(off, np.log([0.3, 1.0, 0.3, 0.1]), loss="soft_l1", f_scale=0.1, bounds=(-25.0, 8.0))
    moved = np.array([True, *(bool(each.max() > 0) for each in (inter, intra, total))])
    return np.asarray(np.where(moved, np.exp(found.x) * scale, 0.0))  # of what never moved, nothing is known


def _predicted(kind: str, features: Array, law: Array, cores: float) -> Array:
    """Return what a law says of stages [stages, ranks, terms]."""
    if kind == BUSY:
        return np.asarray((features @ law).sum(axis=1))
    if kind not in _EXCHANGES:
        return np.asarray(finish_s(features @ law, cores).max(axis=1))
    inter, intra, total = (features[:, :, at].max(axis=1) for at in (1, 2, 3))
    return np.asarray(law[0] + np.maximum(inter * law[1], intra * law[2]) + total * law[3])


def _numbers(text: str, ranks: int, terms: int) -> list[list[float]]:
    """Return the features [ranks, terms] that a sample's label holds; raises InputError for another form."""
    try:
        found = [[float(part) for part in row.split(",")] for row in text.split(";")]
    except ValueError:
        found = []
    if len(found) != ranks or any(len(row) != terms or not all(0 <= value < np.inf for value in row) for row in found):
        raise InputError(
            "samples: rank_stage.features", text[:60], f"not {terms} numbers for each of {ranks} ranks", "measure again"
        )
    return found
