"""Lookahead gates (Ou et al., Computer Standards & Interfaces 94, 103996, 2025): gain over Mixtral-offloading, by expert bits.

    +57.72, +60.00 and +62.26 % with 4-, 3- and 2-bit experts; the text is not public, the abstract names neither the machine nor which
    of Mixtral-offloading's two forms is the baseline

Modelled: Mixtral-8x7B on a card on PCIe 4 with four cached experts a layer, as in `mixtral_offloading`, against both forms: the
public code (LRU only, copies on the kernels' stream) and the paper's (LRU, the next layer's gate guesses). Lookahead fetches into the
cache or buffers aside, overlapped: every guess or what pays (`predictor.benefit`), one or two layers ahead, or nothing, whichever is
fastest. Guesses are as good as
those of this package's own small model: the baseline's as its own gates run early, counted in the bundled recording, lookahead's as its
trained gates on held-out text (`measured/gates.json`). Everything is simulated twice: with the host time and the expansion of quantised
weights that were fitted to Mixtral-offloading's table, and with the machine's bare constants, as an engine with good kernels has them;
within each, baseline and lookahead have the same software. Nothing is fitted to the three published figures. Beside them stands what
running the small model gave (`measured/lookahead.json`, written by benchmarks.lookahead): the same comparison on another machine, whose
own limit each cell names. Ignored: kernels of the paper's own framework, which the abstract mentions and does not describe.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import traces
from ..base.errors import Internal
from ..base.units import MS_PER_S
from ..sim.offload.simulate import Simulation
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import load_hardware
from ..specs.models import weight_format
from ..specs.models.load import load_model
from ..specs.schedules.offload import OffloadSchedule
from ..specs.schedules.presets import load_preset
from ..traces.format import load_trace
from ..traces.recording import DECODE
from . import mixtral_offloading
from .cells import CHECKED, PREDICTED, Cell, Reproduction

CITATION = "Ou et al., Computer Standards & Interfaces 94, 103996, 2025 (abstract): throughput over Mixtral-offloading; batch 1"
MEASURED = "run by this package, on the machine that the note names"
_BASE, _NEXT = "LRU, one stream", "LRU + next gate"
"""What benchmarks.lookahead calls the two."""
TABLE, RIGHT = "gain over Mixtral-offloading", "the same with guesses that are always right"
PUBLISHED: Mapping[str, float] = {"4": 57.72, "3": 60.00, "2": 62.26}
"""Percent, by bits of the experts."""
BASELINES = {"LRU only, one stream": mixtral_offloading.LRU, "LRU + next gate": mixtral_offloading.FULL}
FITTED_SOFTWARE, BARE = "Mixtral-offloading's software", "bare machine"
_MACHINE, _MODEL = "a100-80gb-sxm", "mixtral-8x7b"
_DENSE_BITS = "4"
_TOP = 2
_REACHES = tuple((depth, staging, benefit) for depth, staging in ((1, 0), (1, 4), (2, 4)) for benefit in (True, False))
"""Layers ahead, buffers aside, whether only what pays is fetched; two experts wide."""
_LAUNCHES_PER_LAYER = 3
_WHOLE = 100.0


@functools.cache
def own_recall() -> tuple[float, float]:
    """Return (recall of two guesses one layer early, what every further layer multiplies it by) in the bundled recording's decode tokens.

    The guesses are those of the small model's own gates run early, without any training.
    """
    found = load_trace(Path(next(iter(traces.__path__))) / "bundled" / "tiny-moe.safetensors")
    if found.predicted is None:
        raise Internal("the bundled recording holds no guesses")
    mine = np.asarray(found.phase) == DECODE
    experts, guesses = (
        np.asarray(found.experts)[mine].astype(int),
        np.asarray(found.predicted)[mine][..., :_TOP].astype(int),
    )
    recalls = []
    for distance in range(1, guesses.shape[2] + 1):
        named = (guesses[:, distance:, distance - 1, None, :] == experts[:, distance:, :, None]).any(-1)
        recalls.append(float(named.mean()))
    further = [later / earlier for earlier, later in itertools.pairwise(recalls)]
    return recalls[0], float(np.mean(further))


@functools.cache
def trained_recall() -> tuple[float, float]:
    """Return the same for the small model's trained gates on held-out text."""
    means = _stored("gates.json")["means"]
    recalls = [
        line["recall"]
        for line in sorted(means, key=lambda line: line["distance"])
        if line["gates"] == "trained" and line["width"] == _TOP
    ]
    further = [later / earlier for earlier, later in itertools.pairwise(recalls)]
    return recalls[0], float(np.mean(further))


def _stored(name: str) -> Any:
    """Return a document that a benchmark of this package left beside the papers."""
    return json.loads(_path(name).read_text(encoding="utf-8"))


def _path(name: str) -> Path:
    return Path(__file__).with_name("measured") / name


def schedules(bits: str, cached_experts: int, software: str) -> dict[str, list[OffloadSchedule]]:
    """Return the baselines by name, and the schedules of lookahead under "lookahead", all with the same software."""
    constants = mixtral_offloading.fitted()
    recall, decay = trained_recall()
    plain = {"experts__bits": bits, "cache__experts_per_layer": cached_experts}
    found: dict[str, list[OffloadSchedule]] = {}
    for name, algorithm in BASELINES.items():
        one = mixtral_offloading.schedule_of(algorithm, bits, cached_experts, constants)
        if algorithm == mixtral_offloading.FULL:
            untrained, further = own_recall()
            one = one.with_options(
                predictor__kind="synthetic", predictor__recall=untrained, predictor__recall_decay=further
            )
        found[name] = [one if software == FITTED_SOFTWARE else _bare(one)]
    found["lookahead"] = []
    for depth, staging, benefit in _REACHES:
        one = load_preset("lookahead").with_options(
            **plain, predictor__kind="synthetic", predictor__depth=depth, predictor__width=_TOP, predictor__staging=staging,
            predictor__benefit=benefit, predictor__recall=recall,
            predictor__recall_decay=decay, kernel__grouping="per-expert", host__per_layer_s=constants.layer_host_s,
            host__per_kernel_s=depth * constants.guess_host_s / _LAUNCHES_PER_LAYER,
        )  # fmt: skip
        found["lookahead"].append(one if software == FITTED_SOFTWARE else _bare(one))
    alone = load_preset("lookahead").with_options(
        **plain, predictor__kind="none", predictor__benefit=False, predictor__depth=1, kernel__grouping="per-expert",
        host__per_layer_s=constants.layer_host_s,
    )  # fmt: skip
    found["lookahead"].append(alone if software == FITTED_SOFTWARE else _bare(alone))
    return found


def always_right(bits: str, cached_experts: int, software: str) -> list[OffloadSchedule]:
    """Return lookahead with the truth for guesses, at every reach, and lookahead without any: what better gates alone could gain."""
    *guessing, alone = schedules(bits, cached_experts, software)["lookahead"]
    return [alone, *(one.with_options(predictor__kind="oracle", predictor__width=None) for one in guessing)]


def cells_of(bits: str, software: str) -> list[Cell]:
    """Return a weight format's gains over both baselines, and those of guesses that are always right."""
    run = _simulation(software)
    cached = mixtral_offloading.cached_experts(run.profile)
    given = schedules(bits, cached, software)
    best = max(given["lookahead"], key=lambda one: _speed(run, one))
    speed, right = _speed(run, best), max(_speed(run, one) for one in always_right(bits, cached, software))
    cells = []
    for name in BASELINES:
        base = _speed(run, given[name][0])
        where: dict[str, Any] = {"row": f"{bits}-bit experts", "column": f"against {name}; {software}", "unit": "%"}
        cells += [
            Cell(table=TABLE, published=PUBLISHED[bits], simulated=_WHOLE * (speed / base - 1), role=CHECKED, note=_reach(best), **where),
            Cell(table=RIGHT, published=None, simulated=_WHOLE * (right / base - 1), role=PREDICTED,
                 note="the truth in place of guesses, at the fastest reach: better gates alone cannot gain more", **where),
        ]  # fmt: skip
    return cells


def measured_cells() -> list[Cell]:
    """Return gains that benchmarks.lookahead measured with the small model, beside those that were predicted for the same runs.

    None where no results were stored.
    """
    found: list[Cell] = []
    if not _path("lookahead.json").is_file():
        return found
    for row in _stored("lookahead.json")["rows"]:
        cores, gains, predicted = row["machine"]["cores"], row["gain"], row["predicted_gain"]
        base = row["schedules"][_BASE]
        low, high = base["quartiles_s"]
        note = (
            f"{row['model']}, experts of {row['expert_parameters']:,} parameters, {row['machine']['processor']} of {cores} cores, "
            f"{row['date']}, n = {row['repeats']}; the baseline's step {MS_PER_S * base['median_step_s']:.1f} ms "
            f"[{MS_PER_S * low:.1f} to {MS_PER_S * high:.1f}]; hiding everything would gain "
            f"{row['limit_gain']['side by side']:+.1f} % with copies and computing as they are side by side, "
            f"{row['limit_gain']['alone']:+.1f} % as they are alone; perfect guesses one layer ahead gained {row['perfect_gain']:+.1f} %; "
            f"{_chosen(row['reach'])}"
        )
        for mine, name in ((_BASE, "LRU only, one stream"), (_NEXT, "LRU + next gate")):
            found.append(
                Cell(table=MEASURED, row=f"{row['bits']}-bit experts", column=f"against {name}; experts copied from {row['link']}",
                     unit="%", published=PUBLISHED.get(row["bits"]), simulated=predicted[mine], measured=gains[mine], role=PREDICTED,
                     note=note)
            )  # fmt: skip
    return found


def _chosen(reach: Mapping[str, Any]) -> str:
    """Return what lookahead's planner took for the fastest there."""
    if reach["depth"]:
        which = "only what pays" if reach["benefit"] else "every guess"
        more = f", {reach['first_layer_extra']} more of the first" if reach["first_layer_extra"] else ""
        cache = f"{reach['policy']} with {reach['experts_per_layer']} experts a layer{more}"
        ahead = "1 layer" if reach["depth"] == 1 else f"{reach['depth']} layers"
        return f"lookahead: {ahead} ahead, {reach['width']} wide, {reach['aside']} buffers aside, {which}; {cache}"
    stream = "copies beside the stream" if reach["overlap"] else "one stream, victims not copied back"
    return f"lookahead: nothing ahead, {stream}, which was predicted to be fastest"


def reproduce_lookahead() -> Reproduction:
    """Return the paper's three figures beside simulated gains, and beside measured ones."""
    cells = [cell for bits in PUBLISHED for software in (FITTED_SOFTWARE, BARE) for cell in cells_of(bits, software)]
    cells += measured_cells()
    (recall, decay), (untrained, further) = trained_recall(), own_recall()
    return Reproduction(
        paper="lookahead", citation=CITATION, cells=tuple(cells), constants=(),
        notes=(
            f"lookahead's recall of two {recall:.3f} one layer ahead, times {decay:.3f} a further layer: our small model's, trained",
            f"the next gate's in the baseline {untrained:.3f}, times {further:.3f} a further layer: the small model's, untrained",
            "routing is synthetic, with the repeat rates of Mixtral's paper; four experts a layer are cached; A100, 25 GB/s on PCIe 4 x16",
            "the published figures stand in every column of their row: which baseline and which machine they are for is not public",
            "no figure was fitted to them; where simulated gains are lower, the abstract's own inference framework may be the rest",
            "measured: the small model with widened experts, on the machine that each cell names, and simulated for that machine",
            "the published figure beside a measured one is for another model on another machine",
        ),
    )  # fmt: skip


def _reach(schedule: OffloadSchedule) -> str:
    guesses = schedule.predictor
    if guesses.kind == "none":
        return "fastest without any guesses: the link has no time left for them"
    which = "only what pays" if guesses.benefit else "every guess"
    return f"fastest {guesses.depth} ahead, {guesses.staging} buffers aside, {which}"


@functools.cache
def _simulation(software: str) -> Simulation:
    profile: Profile = (
        mixtral_offloading.machine(_MACHINE, mixtral_offloading.fitted())
        if software == FITTED_SOFTWARE
        else dataclasses.replace(
            load_hardware(_MACHINE),
            host_to_device=mixtral_offloading.machine(_MACHINE, mixtral_offloading.fitted()).host_to_device,
        )
    )
    return Simulation(
        model=load_model(_MODEL), profile=profile, trace=mixtral_offloading.routing(), dense_format=weight_format(_DENSE_BITS)
    )  # fmt: skip


def _bare(schedule: OffloadSchedule) -> OffloadSchedule:
    """Return a schedule whose host costs are the machine's own."""
    return schedule.with_options(host__per_layer_s=None, host__per_kernel_s=None)


def _speed(simulation: Simulation, schedule: OffloadSchedule) -> float:
    decode = simulation.predict(schedule).metrics.decode_tokens_per_s
    if decode is None:
        raise Internal("the recording decodes nothing")
    return decode
