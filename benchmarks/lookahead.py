"""What looking ahead gains for a real model here: `python -m benchmarks.lookahead --model FOLDER --prompt-file F [-o results.json]`.

One model, one memory, experts in 4, 3 and 2 bits; schedules take turns in one process:

    LRU, one stream     what the Mixtral-offloading code does: least recently used, victims copied back, nothing overlaps
    LRU + next gate     the paper's own: the next layer's gate guesses, copies overlap
    lookahead           as far and wide as a forecast on the run's own recording is fastest: every guess or what pays, into the cache or
                        into four buffers beside it; or nothing ahead

The link is what this machine has: `--link memory` copies between places of its memory, `--link disk` reads experts from a file on its
disk, past the page cache, straight into their slots (nothing is copied back then: files are only read).

Modelled: greedy generation of the same prompts; medians of the mean decode step over repetitions, with their quartiles; the gain
predicted from each run's own routing; and the limit: were everything hidden, a step would take the longer of computing and copying, and
the time in which neither goes on: once with both as they are alone, in the baseline's own rows, once as they are side by side
(`side_by_side`), in those of the schedule whose copies overlap. Costs are calibrated in the same process by runs of the model
under other schedules. Rows of other formats and links that stand in the file already stay there, with their own machine and date.
A part of a step during which another program was given a core counts as the other repetitions took for it, since all repeat the same
decisions; how many parts that are is printed, and each run's mean with them is kept. Ignored: GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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
from moeplan.executor.calibration.calibrate import Calibration
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
from moeplan.specs.models import weight_format
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.recording import DECODE

from .side_by_side import COPIES, busy_s, idle_s, mean_steps_s, slower, together_s

LINKS = ("memory", "disk")
BASE, NEXT, AHEAD = "LRU, one stream", "LRU + next gate", "lookahead"
_REACHES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2))
_ASIDE = 4
"""Buffers for guesses beside the cache, as many as Mixtral-offloading has; without them guesses displace cached experts."""
_WHOLE = 100.0
ALONE, BESIDE = "alone", "side by side"


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
    parser.add_argument("--repeats", type=int, default=5)
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
    longest = max(map(len, prompts))
    with open_model(
        given.model, gates=gates_in(given.gates, spec), rounding=NEAREST, progress=reporter("load")
    ) as loaded:
        for bits in formats if given.link == "disk" else ():
            loaded.copy_from_disk(bits)
        calibration = calibrate_model(
            loaded, prompts, formats, longest_prompt=longest, longest_context=longest + given.new_tokens, quick=True,
            seconds=given.seconds, progress=reporter("calibrate"),
        )  # fmt: skip
        costs = load_costs(calibration.fit.profile, spec, dense_format=weight_format("32"))
        rows = (
            _measured(loaded, costs, bits, asked) | facts(loaded, asked, calibration, bool(given.gates))
            for bits in formats
        )
        return {"rows": kept_rows(given.output, rows)}


def facts(loaded: Loaded, asked: Asked, calibration: Calibration, trained: bool) -> dict[str, Any]:
    """Return what was run where: the model's sizes, the request, machine, versions and date."""
    spec = loaded.spec
    return {
        "model": spec.name, "expert_parameters": 3 * spec.expert_hidden * spec.expert_intermediate_size, "experts": spec.num_experts,
        "experts_cached_a_layer": asked.experts, "prompts": list(map(len, asked.prompts)), "new_tokens": asked.new_tokens,
        "repeats": asked.repeats, "gates": "trained" if trained else "the model's own",
        "machine": {"processor": calibration.samples.device.get("name"), "cores": os.cpu_count(),
                    "memory_bytes": calibration.samples.device.get("host_memory_bytes"), "load": os.getloadavg()[0]},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _measured(loaded: Loaded, costs: CostModel, bits: str, asked: Asked) -> dict[str, Any]:
    """Return one weight format's figures."""
    plain: dict[str, Any] = {"experts__bits": bits, "cache__experts_per_layer": asked.experts}
    schedules = {
        BASE: load_preset("mixtral-offloading-code").with_options(**plain, copy__write_back=asked.link == "memory"),
        NEXT: load_preset("mixtral-offloading").with_options(**plain),
    }
    schedules[AHEAD], reach = _best_ahead(loaded, costs, plain, asked)
    runs: dict[str, list[ModelRun]] = {name: [] for name in schedules}
    show = reporter(f"{bits} bits")
    for number in range(asked.repeats + 1):
        for place, (name, schedule) in enumerate(schedules.items()):
            done = run_once(loaded, schedule, costs, asked)
            if number:
                runs[name].append(done)
            show(number * len(schedules) + place + 1, (asked.repeats + 1) * len(schedules), name)
    found = {name: figures_of(runs[name], schedules[name], costs, loaded) for name in schedules}
    base = found[BASE]
    together = slower(runs[BASE], runs[NEXT])
    least = {
        ALONE: max(base["compute_s"], base["copy_s"]) + base["rest_s"],
        BESIDE: together_s(base["compute_s"], base["copy_s"], together) + base["rest_s"],
    }
    return {
        "bits": bits, "reach": reach, "schedules": found, "link": asked.link, "slower": dataclasses.asdict(together),
        "limit_gain": {how: _WHOLE * (base["median_step_s"] / one - 1) for how, one in least.items()},
        "gain": {name: _WHOLE * (found[AHEAD]["tokens_per_s"] / found[name]["tokens_per_s"] - 1) for name in (BASE, NEXT)},
        "predicted_gain": {name: _WHOLE * (found[name]["predicted_step_s"] / found[AHEAD]["predicted_step_s"] - 1)
                           for name in (BASE, NEXT)},
    }  # fmt: skip


def _best_ahead(
    loaded: Loaded, costs: CostModel, plain: dict[str, Any], asked: Asked
) -> tuple[OffloadSchedule, dict[str, Any]]:
    """Return the schedule that is forecast to be fastest on a recording of this model, among reaches and none at all."""
    preset = load_preset("lookahead").with_options(**plain, kernel__grouping="per-expert")
    nothing = preset.with_options(predictor__kind="none", predictor__depth=1, predictor__benefit=False)
    widest = preset.with_options(predictor__depth=3, predictor__width=2, predictor__benefit=False)
    recording = run_once(loaded, widest, costs, asked).recording
    alone = load_preset("mixtral-offloading-code").with_options(**plain, copy__write_back=False)
    candidates = [alone, nothing] + [
        preset.with_options(predictor__depth=d, predictor__width=w, predictor__staging=aside, predictor__benefit=pays)
        for d, w in _REACHES for aside in (0, _ASIDE) for pays in (True, False)
    ]  # fmt: skip
    times = []
    for one in candidates:
        given = with_costs(run_input(one, recording), loaded.spec, costs)
        times.append(predicted_step_s(forecast(given, loaded.spec, costs).outcome, given.workload))
    best = candidates[int(np.argmin(times))]
    depth, width = (best.predictor.depth, best.predictor.width) if best.predictor.kind != "none" else (0, 0)
    return best, {"overlap": best.copy.overlap, "depth": depth, "width": width, "aside": best.predictor.staging if depth else 0,
                  "benefit": best.predictor.benefit, "forecast_s": times}  # fmt: skip


def run_once(loaded: Loaded, schedule: OffloadSchedule, costs: CostModel, asked: Asked) -> ModelRun:
    """Return a run of every prompt under a schedule."""
    context = max(map(len, asked.prompts)) + asked.new_tokens // 2
    prices = prices_for(schedule, loaded.spec, costs, context_tokens=context)
    return run_model(loaded, schedule, asked.prompts, max_new_tokens=asked.new_tokens, prices=prices)


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
            f"  {reach['depth']} layers ahead, {reach['width']} wide, {reach['aside']} buffers aside; {gain:+.1f} % against {BASE}, "
            f"predicted {row['predicted_gain'][BASE]:+.1f} %; at most {limits}"
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
