"""What looking ahead gains for a real model here: `python -m benchmarks.lookahead --model FOLDER --prompt-file F [-o results.json]`.

One model, one memory, experts in 4, 3 and 2 bits; schedules take turns in one process:

    LRU, one stream     what the Mixtral-offloading code does: least recently used, victims copied back, nothing overlaps
    LRU + next gate     the paper's own: the next layer's gate guesses, copies overlap
    lookahead           what a forecast on the run's own recording says is fastest: how far and wide, every guess or what pays, into the
                        cache or into four buffers beside it; which cached expert leaves, and whether the first layer, for which nothing
                        can be guessed, gets some of the other layers' slots; or nothing ahead
    perfect guesses     the same, one layer ahead, with an earlier run's choices for guesses: what better gates alone could still gain

The link is what this machine has: `--link memory` copies between places of its memory, `--link disk` reads experts from a file on its
disk, past the page cache, straight into their slots (nothing is copied back then: files are only read).

Modelled: greedy generation of the same prompts; medians of the mean decode step over repetitions, with their quartiles; the gain
predicted from each run's own routing; and the limit: were everything hidden, a step would take the longer of computing and copying, and
the time in which neither goes on: once with both as they are alone, in the baseline's own rows, once as they are side by side
(`side_by_side`), in those of the schedule whose copies overlap. Costs are calibrated in the same process by runs of the model
under other schedules: once before, which is what the choice goes by, and once in turns with the runs that are measured, which is what
predicts them, since a disk that others share is not as fast now as a minute later. Rows of other formats and links that stand in the
file already stay there, with their own machine and date. A part of a step during which another program was given a core counts as the other
repetitions took for it, since all repeat the same decisions; how many parts that are is printed, and each run's mean with them is
kept. Ignored: GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeplan.api.model_folder import gates_in, model_in, read_bytes
from moeplan.base.errors import MoeplanError
from moeplan.base.progress import reporter
from moeplan.base.text_files import write_atomic
from moeplan.base.units import MS_PER_S, NS_PER_S
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.load import load_costs
from moeplan.devices.device import metadata_of
from moeplan.executor.model.calibrate import calibrate_model
from moeplan.executor.model.figures import differences, replayed
from moeplan.executor.model.loading.text import Text
from moeplan.executor.model.outcome import ModelRun
from moeplan.executor.model.prices import prices_for
from moeplan.executor.model.session import Loaded, open_model, run_model
from moeplan.executor.running.prediction import predicted_step_s, run_input
from moeplan.kernels.packing import NEAREST
from moeplan.sim.offload.forecast import forecast, with_costs
from moeplan.sim.timeline import COMPUTE, D2H, HOST
from moeplan.specs.models import ModelSpec, weight_format
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.recording import DECODE, RoutingTrace

from .side_by_side import COPIES, busy_s, idle_s, mean_steps_s, slower, together_s

LINKS = ("memory", "disk")
BASE, NEXT, AHEAD, RIGHT = "LRU, one stream", "LRU + next gate", "lookahead", "perfect guesses"
_REACHES = ((1, 1), (1, 2), (1, 3), (2, 2))
_POLICIES = ("lru", "lfu", "affinity")
_MOVED = (0, 1, 2)
"""Slots of each layer's that the first layer gets."""
_ASIDE = 4
"""Buffers for guesses beside the cache, as many as Mixtral-offloading has; without them guesses displace cached experts."""
_WHOLE = 100.0
ALONE, BESIDE = "alone", "side by side"


Calibrated = Callable[..., CostModel]
"""Returns the costs of a calibration in a format's bits, made in turns with what it is given."""


@dataclass(frozen=True)
class Asked:
    """What is run."""

    prompts: list[list[int]]
    new_tokens: int
    repeats: int
    experts: int
    link: str


def main() -> None:
    """Run, print the table, and write raw samples where asked."""
    parser = options(__doc__, bits="4,3,2", model="a checkpoint's folder")
    parser.add_argument("--gates")
    parser.add_argument("--experts", type=int, default=4, help="cached a layer")
    given = parser.parse_args()
    try:
        document = run(given)
    except MoeplanError as error:
        sys.exit(f"benchmarks.lookahead: {error}")
    _print(document)


def options(description: str, *, bits: str, model: str) -> argparse.ArgumentParser:
    """Return the options of a benchmark that runs a real model: which, over what, how often. bits: its formats; model: what it is."""
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--prompt-file", action="append", required=True)
    parser.add_argument("--bits", default=bits)
    parser.add_argument("--link", choices=LINKS, default="memory")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="turns in each of the calibration's three passes")
    parser.add_argument("--seconds", type=float, default=12.0, help="of microbenchmarks")
    parser.add_argument("-o", "--output", type=Path)
    return parser


def keep(path: Path, document: dict[str, Any]) -> None:
    """Put rows into the file, in place of those of the same format and link."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    new = {(row["bits"], row["link"]) for row in document["rows"]}
    rows = [row for row in kept if (row["bits"], row["link"]) not in new] + document["rows"]
    rows.sort(key=lambda row: (LINKS.index(row["link"]), -int(row["bits"])))
    write_atomic(path, json.dumps({"rows": rows}, indent=1) + "\n")


def kept_rows(path: Path | None, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, each put into the file, where one is asked for, as soon as it is measured: it stays, whatever ends the rest."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        if path is not None:
            keep(path, {"rows": [row]})
    return found


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Return every figure with its raw samples."""
    spec, formats = model_in(given.model), given.bits.split(",")
    text = Text(given.model, spec.vocab_size)
    prompts = [text.ids(read_bytes(path, "--prompt-file"), "--prompt-file") for path in given.prompt_file]
    asked = Asked(prompts, given.new_tokens, given.repeats, given.experts, given.link)
    with open_model(
        given.model, gates=gates_in(given.gates, spec), rounding=NEAREST, progress=reporter("load")
    ) as loaded:
        for bits in formats if given.link == "disk" else ():
            loaded.copy_from_disk(bits)
        calibrated = partial(calibration_of, loaded, asked, given.seconds)
        rows = (
            _measured(loaded, calibrated, bits, asked) | facts(loaded, asked, bool(given.gates)) for bits in formats
        )
        return {"rows": kept_rows(given.output, rows)}


def calibration_of(
    loaded: Loaded, asked: Asked, seconds: float, bits: str, turns: Sequence[Callable[[], None]] = ()
) -> CostModel:
    """Return the costs of a calibration with experts in one format, made now by runs of the model, which take turns with `turns`."""
    longest = max(map(len, asked.prompts))
    found = calibrate_model(
        loaded, asked.prompts, [bits], longest_prompt=longest, longest_context=longest + asked.new_tokens, quick=True,
        seconds=seconds, turns=turns, progress=reporter("calibrate"),
    )  # fmt: skip
    return load_costs(found.fit.profile, loaded.spec, dense_format=weight_format("32"))


def facts(loaded: Loaded, asked: Asked, trained: bool) -> dict[str, Any]:
    """Return what was run where: the model's sizes, the request, machine, versions and date."""
    spec, device = loaded.spec, metadata_of(loaded.device)
    return {
        "model": spec.name, "expert_parameters": 3 * spec.expert_hidden * spec.expert_intermediate_size, "experts": spec.num_experts,
        "experts_cached_a_layer": asked.experts, "prompts": list(map(len, asked.prompts)), "new_tokens": asked.new_tokens,
        "gates": "trained" if trained else "the model's own",
        "machine": {"processor": device.get("name"), "cores": os.cpu_count(),
                    "memory_bytes": device.get("host_memory_bytes"), "load": os.getloadavg()[0]},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _measured(loaded: Loaded, calibrated: Calibrated, bits: str, asked: Asked) -> dict[str, Any]:
    """Return one weight format's figures."""
    plain: dict[str, Any] = {"experts__bits": bits, "cache__experts_per_layer": asked.experts}
    schedules = {
        BASE: load_preset("mixtral-offloading-code").with_options(**plain, copy__write_back=asked.link == "memory"),
        NEXT: load_preset("mixtral-offloading").with_options(**plain),
    }
    before = calibrated(bits)
    schedules[AHEAD], reach, truth = _best_ahead(loaded, before, plain, asked)
    schedules[RIGHT] = schedules[AHEAD].with_options(
        copy__overlap=True, predictor__kind="next-gate", predictor__depth=1, predictor__width=loaded.spec.top_k,
        predictor__staging=_ASIDE, predictor__benefit=False,
    )  # fmt: skip
    turns = Turns(loaded=loaded, schedules=schedules, costs=before, asked=asked, hindsight={RIGHT: truth})
    costs, runs = calibrated(bits, turns.each()), turns.runs
    found = {name: figures_of(runs[name], schedules[name], costs, loaded) for name in schedules}
    base = found[BASE]
    together = slower(runs[BASE], runs[NEXT])
    least = {
        ALONE: max(base["compute_s"], base["copy_s"]) + base["rest_s"],
        BESIDE: together_s(base["compute_s"], base["copy_s"], together) + base["rest_s"],
    }
    return {
        "bits": bits, "repeats": len(runs[BASE]),
        "reach": reach, "schedules": found, "link": asked.link, "slower": dataclasses.asdict(together),
        "limit_gain": {how: _WHOLE * (base["median_step_s"] / one - 1) for how, one in least.items()},
        "gain": {name: _WHOLE * (found[AHEAD]["tokens_per_s"] / found[name]["tokens_per_s"] - 1) for name in (BASE, NEXT)},
        "perfect_gain": _WHOLE * (found[RIGHT]["tokens_per_s"] / base["tokens_per_s"] - 1),
        "predicted_gain": {name: _WHOLE * (found[name]["predicted_step_s"] / found[AHEAD]["predicted_step_s"] - 1)
                           for name in (BASE, NEXT)},
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Runs of several schedules, which take turns with each other and with a calibration's own."""

    loaded: Loaded
    schedules: Mapping[str, OffloadSchedule]
    costs: CostModel
    asked: Asked
    hindsight: Mapping[str, RoutingTrace] = field(default_factory=dict)
    """An earlier run, whose choices are the guesses, by schedule."""
    runs: dict[str, list[ModelRun]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.schedules:  # what is run first is not kept
            self._once(name)
            self.runs[name] = []

    def each(self) -> list[Callable[[], None]]:
        """Return one turn for each repetition; a calibration takes all of them in each of its passes."""
        return [self._turn] * self.asked.repeats

    def _turn(self) -> None:
        for name, mine in self.runs.items():
            mine.append(self._once(name))

    def _once(self, name: str) -> ModelRun:
        return run_once(self.loaded, self.schedules[name], self.costs, self.asked, self.hindsight.get(name))


def _best_ahead(
    loaded: Loaded, costs: CostModel, plain: dict[str, Any], asked: Asked
) -> tuple[OffloadSchedule, dict[str, Any], RoutingTrace]:
    """Return the schedule that is forecast to be fastest on a recording of this model, what it is, and the recording."""
    preset = load_preset("lookahead").with_options(**plain, kernel__grouping="per-expert")
    nothing = preset.with_options(predictor__kind="none", predictor__depth=1, predictor__benefit=False)
    widest = preset.with_options(predictor__depth=2, predictor__width=3, predictor__benefit=False)
    recording = run_once(loaded, widest, costs, asked).recording
    alone = load_preset("mixtral-offloading-code").with_options(**plain, copy__write_back=False)
    candidates = [alone, nothing] + [
        preset.with_options(
            **sizes, cache__policy=policy, predictor__depth=d, predictor__width=w, predictor__staging=aside, predictor__benefit=pays
        )
        for sizes in _sizes(asked.experts, loaded.spec) for policy in _POLICIES
        for d, w in _REACHES for aside in (0, _ASIDE) for pays in (True, False)
    ]  # fmt: skip
    times = []
    for one in candidates:
        given = with_costs(run_input(one, recording), loaded.spec, costs)
        times.append(predicted_step_s(forecast(given, loaded.spec, costs).outcome, given.workload))
    best = candidates[int(np.argmin(times))]
    depth, width = (best.predictor.depth, best.predictor.width) if best.predictor.kind != "none" else (0, 0)
    reach = {
        "overlap": best.copy.overlap, "depth": depth, "width": width, "aside": best.predictor.staging if depth else 0,
        "benefit": best.predictor.benefit, "policy": best.cache.policy, "experts_per_layer": best.cache.experts_per_layer,
        "first_layer_extra": best.cache.first_layer_extra, "forecast_s": float(min(times)),
    }  # fmt: skip
    return best, reach, recording


def _sizes(experts: int, spec: ModelSpec) -> list[dict[str, int]]:
    """Return ways to give the slots of `experts` a layer to layers: as many to each, or some of each layer's to the first."""
    found = []
    for moved in _MOVED:
        each = experts - moved
        if each >= 1:
            extra = min(moved * spec.num_moe_layers, spec.num_experts - each)
            found.append({"cache__experts_per_layer": each, "cache__first_layer_extra": extra})
    return found


def run_once(
    loaded: Loaded, schedule: OffloadSchedule, costs: CostModel, asked: Asked, hindsight: RoutingTrace | None = None
) -> ModelRun:
    """Return a run of every prompt under a schedule; hindsight: an earlier run, whose choices are the guesses."""
    context = max(map(len, asked.prompts)) + asked.new_tokens // 2
    prices = prices_for(schedule, loaded.spec, costs, context_tokens=context)
    return run_model(
        loaded, schedule, asked.prompts, max_new_tokens=asked.new_tokens, prices=prices, hindsight=hindsight
    )


def figures_of(runs: Sequence[ModelRun], schedule: OffloadSchedule, costs: CostModel, loaded: Loaded) -> dict[str, Any]:
    """Return one schedule's speed with its spread, its prediction, what its steps consisted of, and its counts."""
    whole = [float((one.step_end_ns - one.step_begin_ns)[one.step_phase == DECODE].mean()) / NS_PER_S for one in runs]
    steps = mean_steps_s(runs)
    given = replayed(runs[0], schedule)
    predicted = predicted_step_s(forecast(given, loaded.spec, costs).outcome, given.workload)
    low, middle, high = np.quantile(steps, (0.25, 0.5, 0.75))
    compute, copy, back, host = (
        float(np.median([busy_s(one, lanes) for one in runs])) for lanes in ((COMPUTE,), COPIES, (D2H,), (HOST,))
    )
    counts = runs[0].counts
    return {
        "step_s": steps, "interrupted_step_s": whole, "median_step_s": float(middle), "quartiles_s": [float(low), float(high)],
        "tokens_per_s": 1 / float(middle),
        "predicted_step_s": predicted, "compute_s": compute, "copy_s": copy, "copy_back_s": back,
        "host_s": host, "rest_s": float(np.median([idle_s(one) for one in runs])),
        "hit_rate": float(counts.hits / max(1, counts.hits + counts.misses)),
        "prefetches": int(counts.prefetches), "prefetches_used": int(counts.prefetches_used),
        "disturbed": float(np.mean([one.disturbed.mean() for one in runs])),
        "differences": [line for one in runs for line in differences(one, schedule)],
    }  # fmt: skip


def _print(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        machine, versions = row["machine"], row["versions"]
        print(
            f"{row['model']}, {row['bits']} bits from {row['link']}, {row['experts_cached_a_layer']} experts a layer cached; "
            f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}; torch {versions['torch']}, "
            f"transformers {versions['transformers']}; n = {row['repeats']}"
        )
        gain, reach = row["gain"][BASE], row["reach"]
        limits = ", ".join(
            f"{limit:+.1f} % {how} ({gain / limit:.0%} of it)" for how, limit in row["limit_gain"].items()
        )
        print(
            f"  {reach['depth']} layers ahead, {reach['width']} wide, {reach['aside']} buffers aside; {reach['policy']}, "
            f"{reach['experts_per_layer']} a layer and {reach['first_layer_extra']} more of the first; {gain:+.1f} % against {BASE}, "
            f"predicted {row['predicted_gain'][BASE]:+.1f} %; perfect guesses {row['perfect_gain']:+.1f} %; at most {limits}"
        )
        for name, one in row["schedules"].items():
            low, high = (MS_PER_S * each for each in one["quartiles_s"])
            counts = "differ" if one["differences"] else "equal"
            print(
                f"  {name:16} {MS_PER_S * one['median_step_s']:8.2f} ms a token [{low:.2f} to {high:.2f}], predicted "
                f"{MS_PER_S * one['predicted_step_s']:.2f}; compute {MS_PER_S * one['compute_s']:.2f}, copies "
                f"{MS_PER_S * one['copy_s']:.2f}; hits {one['hit_rate']:.3f}; disturbed {one['disturbed']:.0%}; counts {counts}"
            )


if __name__ == "__main__":
    main()
