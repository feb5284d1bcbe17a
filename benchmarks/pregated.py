"""What gates that choose a layer early gain here: `python -m benchmarks.pregated --model FOLDER --prompt-file F [-o results.json]`.

One pre-gated model, one amount of memory (the double buffer's), experts in each of `--bits`; schedules take turns in one process:

    on demand           experts are fetched when the gate has chosen them; nothing is kept
    pre-gated           the next block's experts are fetched while this block computes; nothing is kept either

Modelled: greedy generation of the same prompts, the same tokens in both; medians of the mean decode step over repetitions, with their
quartiles; and the most that could be gained: a step that takes the longer of computing and copying after the first block's first expert
has come, which nothing hides, and the time in which neither went on. That is told three times: with both lanes as they are alone, in the
rows of the run on demand; with both as they are side by side (`side_by_side`), since two cores share one memory; and block by block, since
the published schedule lets a block's copies hide behind one block's computing and no other. Both schedules compute the model whose gates
choose early, so what is compared is the schedule alone; quality is in examples/tiny_moe. Links are those of `benchmarks.lookahead`.
Ignored: GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from typing import Any

import numpy as np

from moeplan.api.model_folder import model_in, read_bytes
from moeplan.base.errors import MoeplanError
from moeplan.base.progress import reporter
from moeplan.base.units import MS_PER_S
from moeplan.executor.model.loading.text import Text
from moeplan.executor.model.session import Loaded, open_model
from moeplan.kernels.packing import NEAREST
from moeplan.specs.schedules.presets import load_preset

from .lookahead import ALONE, BESIDE, Asked, Calibrated, Turns, calibration_of, facts, figures_of, kept_rows, options
from .side_by_side import alone_s, block_by_block_s, slower, together_s

DEMAND, AHEAD = "on demand", "pre-gated"
BLOCKS = "block by block"
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
    with open_model(given.model, rounding=NEAREST, progress=reporter("load")) as loaded:
        for bits in formats if given.link == "disk" else ():
            loaded.copy_from_disk(bits)
        calibrated = partial(calibration_of, loaded, asked, given.seconds)
        rows = (_measured(loaded, calibrated, bits, asked) | facts(loaded, asked, False) for bits in formats)
        return {"rows": kept_rows(given.output, rows)}


def _measured(loaded: Loaded, calibrated: Calibrated, bits: str, asked: Asked) -> dict[str, Any]:
    """Return one weight format's figures."""
    plain: dict[str, Any] = {"experts__bits": bits}
    schedules = {name: load_preset(preset).with_options(**plain) for name, preset in _PRESETS.items()}
    before = calibrated(bits)
    turns = Turns(loaded=loaded, schedules=schedules, costs=before, asked=asked)
    costs, runs = calibrated(bits, turns.each()), turns.runs
    if any(one.tokens != runs[DEMAND][0].tokens for done in runs.values() for one in done):
        sys.exit("benchmarks.pregated: the schedules did not generate the same tokens")
    found = {name: figures_of(runs[name], schedules[name], costs, loaded) for name in schedules}
    demand, layers = found[DEMAND], loaded.spec.num_moe_layers
    together = slower(runs[DEMAND], runs[AHEAD])
    compute, copies = np.median([alone_s(one, together) for one in runs[DEMAND]], axis=0).tolist()
    first = copies / layers / loaded.spec.top_k
    least = {
        ALONE: first + max(compute, copies - first) + demand["rest_s"],
        BESIDE: first + together_s(compute, copies - first, together) + demand["rest_s"],
        BLOCKS: float(np.median([block_by_block_s(one) for one in runs[AHEAD]])),
    }
    steps = {name: one["median_step_s"] for name, one in found.items()}
    predicted = {name: one["predicted_step_s"] for name, one in found.items()}
    return {
        "bits": bits, "repeats": len(runs[DEMAND]),
        "link": asked.link, "schedules": found, "least_step_s": least, "slower": dataclasses.asdict(together),
        "gain": _WHOLE * (steps[DEMAND] / steps[AHEAD] - 1),
        "limit_gain": {how: _WHOLE * (steps[DEMAND] / one - 1) for how, one in least.items()},
        "share": {how: (steps[DEMAND] - steps[AHEAD]) / (steps[DEMAND] - one) for how, one in least.items()},
        "predicted_gain": _WHOLE * (predicted[DEMAND] / predicted[AHEAD] - 1),
    }  # fmt: skip


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['bits']} bits from {row['link']}: {row['gain']:+.1f} %, predicted {row['predicted_gain']:+.1f} %; at most "
        + ", ".join(
            f"{row['limit_gain'][how]:+.1f} % {how} ({row['share'][how]:.0%} of it)" for how in row["limit_gain"]
        )
        + "; side by side "
        + ", ".join(f"{what} takes {row['slower'][what]:.2f} times as long" for what in ("compute", "copy", "host"))
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
