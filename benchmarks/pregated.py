"""What gates that choose a layer early gain here: `python -m benchmarks.pregated --model FOLDER --prompt-file F [-o results.json]`.

One pre-gated model, one amount of memory (the double buffer's), experts in each of `--bits`; schedules take turns in one process:

    on demand           experts are fetched when the gate has chosen them; nothing is kept
    pre-gated           the next block's experts are fetched while this block computes; nothing is kept either

Modelled: greedy generation of the same prompts, the same tokens in both; medians of the mean decode step over repetitions, with their
quartiles; the most that could be gained: a step that takes the longer of computing and copying, both as measured in the rows of the
run on demand, after the first block's fetch, which nothing hides; and the share of that which was gained. Both compute the model whose
gates choose early, so what is compared is the schedule alone; quality is in examples/tiny_moe. Links are those of
`benchmarks.lookahead`. Ignored: GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from moeplan.api.model_folder import model_in, read_bytes
from moeplan.base.errors import MoeplanError
from moeplan.base.progress import reporter
from moeplan.base.units import MS_PER_S
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.calibrate.costs.load import load_costs
from moeplan.executor.model.calibrate import calibrate_model
from moeplan.executor.model.loading.text import Text
from moeplan.executor.model.outcome import ModelRun
from moeplan.executor.model.session import Loaded, open_model
from moeplan.kernels.packing import NEAREST
from moeplan.specs.models import weight_format
from moeplan.specs.schedules.presets import load_preset

from .lookahead import Asked, facts, figures_of, kept_rows, options, run_once

DEMAND, AHEAD = "on demand", "pre-gated"
_PRESETS = {DEMAND: "on-demand", AHEAD: "pre-gated"}
_WHOLE = 100.0


def main() -> None:
    """Run, print the table, and write raw samples where asked."""
    given = options(__doc__, bits="32,4", model="a checkpoint whose gates choose one layer early").parse_args()
    try:
        document = run(given)
    except MoeplanError as error:
        sys.exit(f"benchmarks.pregated: {error}")
    for row in document["rows"]:
        _print(row)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Return every figure with its raw samples."""
    spec, formats = model_in(given.model), given.bits.split(",")
    text = Text(given.model, spec.vocab_size)
    prompts = [text.ids(read_bytes(path, "--prompt-file"), "--prompt-file") for path in given.prompt_file]
    asked = Asked(prompts, given.new_tokens, given.repeats, 0, given.link)
    longest = max(map(len, prompts))
    with open_model(given.model, rounding=NEAREST, progress=reporter("load")) as loaded:
        for bits in formats if given.link == "disk" else ():
            loaded.copy_from_disk(bits)
        calibration = calibrate_model(
            loaded, prompts, formats, longest_prompt=longest, longest_context=longest + given.new_tokens, quick=True,
            seconds=given.seconds, progress=reporter("calibrate"),
        )  # fmt: skip
        costs = load_costs(calibration.fit.profile, spec, dense_format=weight_format("32"))
        rows = (_measured(loaded, costs, bits, asked) | facts(loaded, asked, calibration, False) for bits in formats)
        return {"rows": kept_rows(given.output, rows)}


def _measured(loaded: Loaded, costs: CostModel, bits: str, asked: Asked) -> dict[str, Any]:
    """Return one weight format's figures."""
    plain: dict[str, Any] = {"experts__bits": bits}
    schedules = {name: load_preset(preset).with_options(**plain) for name, preset in _PRESETS.items()}
    runs: dict[str, list[ModelRun]] = {name: [] for name in schedules}
    show = reporter(f"{bits} bits")
    for number in range(asked.repeats + 1):
        for place, (name, schedule) in enumerate(schedules.items()):
            done = run_once(loaded, schedule, costs, asked)
            if number:
                runs[name].append(done)
            show(number * len(schedules) + place + 1, (asked.repeats + 1) * len(schedules), name)
    if any(one.tokens != runs[DEMAND][0].tokens for done in runs.values() for one in done):
        sys.exit("benchmarks.pregated: the schedules did not generate the same tokens")
    found = {name: figures_of(runs[name], schedules[name], costs, loaded) for name in schedules}
    demand, layers = found[DEMAND], loaded.spec.num_moe_layers
    first = demand["copy_s"] / layers
    rest = max(0.0, demand["median_step_s"] - demand["compute_s"] - demand["copy_s"])
    least = first + max(demand["compute_s"], demand["copy_s"] - first) + rest
    steps = {name: one["median_step_s"] for name, one in found.items()}
    predicted = {name: one["predicted_step_s"] for name, one in found.items()}
    return {
        "bits": bits, "link": asked.link, "schedules": found, "least_step_s": least,
        "gain": _WHOLE * (steps[DEMAND] / steps[AHEAD] - 1), "limit_gain": _WHOLE * (steps[DEMAND] / least - 1),
        "share": (steps[DEMAND] - steps[AHEAD]) / (steps[DEMAND] - least),
        "predicted_gain": _WHOLE * (predicted[DEMAND] / predicted[AHEAD] - 1),
    }  # fmt: skip


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['bits']} bits from {row['link']}: {row['gain']:+.1f} %, predicted {row['predicted_gain']:+.1f} %; at most "
        f"{row['limit_gain']:+.1f} %: {row['share']:.0%} of the time that could be saved"
    )
    for name, one in row["schedules"].items():
        low, high = (MS_PER_S * each for each in one["quartiles_s"])
        print(
            f"  {name:10} {MS_PER_S * one['median_step_s']:8.2f} ms a token [{low:.2f} to {high:.2f}], predicted "
            f"{MS_PER_S * one['predicted_step_s']:.2f}; compute {MS_PER_S * one['compute_s']:.2f}, copies "
            f"{MS_PER_S * one['copy_s']:.2f}; disturbed {one['disturbed']:.0%}; counts {'differ' if one['differences'] else 'equal'}"
        )
    print(json.dumps({name: row[name] for name in ("model", "machine", "versions", "date", "repeats")}))


if __name__ == "__main__":
    main()
