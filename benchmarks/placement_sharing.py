"""What it brings that the placement search counts what ranks of a host share, as the simulator does, and not only the busiest port.

Two searches on the same requests, with the same moves from the same starts: one minimises the layer with what ranks share
(`planner/ep_objective`), the other the layer by the busiest port at the bandwidth that a balanced exchange leaves each rank, on cores
of its own. Of two ways to choose among copies (capped, and as the search planned) each takes the better one on requests to
choose by. All placements are then simulated with what ranks share, on requests that no placement has seen and on those it was
made for, beside contiguous and EPLB. Nothing overlaps. Exchanges are those that `benchmarks/collectives.py` measured between
processes of one host (raw times in `results/collectives.json`, fitted anew), kernels those of a bundled card; or both of a
calibrated profile.

`python -m benchmarks.placement_sharing [--trace FILE --model NAME] [--hardware NAME|FILE] [--ranks 2,4] [--redundant 0,8]
[--splits 0,1,2] [--json FILE]`; cells that the file already has, made with the same arguments, are not computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

from moeplan import __version__
from moeplan.base.text_files import write_atomic
from moeplan.base.units import MS_PER_S
from moeplan.calibrate.costs.all_to_all_table import OF_COMPUTE, OF_EXCHANGE, measured_ranks
from moeplan.calibrate.fitting.all_to_all_fit import fit_exchanges
from moeplan.calibrate.samples import SampleSet, sample_from_dict
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.planner.parallel.evidence import CHOOSE, PLAN, REPORT, TokenEvidence
from moeplan.planner.parallel.objective import layer_costs
from moeplan.planner.parallel.search import EpSearch
from moeplan.sim.parallel.costs import EpCosting
from moeplan.specs.machines.profile import Constant, NodeConstants, Profile
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule
from moeplan.traces.format import load_recording
from moeplan.traces.readers import import_trace
from moeplan.traces.recording import RoutingTrace

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "collectives.json"
BUNDLED = ROOT / "traces" / "bundled" / "tiny-moe.safetensors"
TOKENS_PER_RANK = 4096
NAMES = ("by the busiest port", "with what ranks share")
CITATION = "benchmarks/results/collectives.json"


def host_of(card: Profile, ranks: int) -> Profile:
    """Return a host of `ranks` such cards, whose exchanges go through its memory as those of processes were measured to."""
    if measured_ranks(card.curves):
        return card
    stored = next(each for each in json.loads(MEASURED.read_text())["ranks"] if each["ranks"] == ranks)
    samples = tuple(sample_from_dict(row, CITATION) for row in stored["samples"]["calibration"])
    found = fit_exchanges(SampleSet(device={}, conditions={}, samples=samples), CITATION)
    if found is None:
        raise ValueError("no exchanges are stored")

    def constant(value: float) -> Constant:
        return Constant(
            value=value, source="measured", citation=CITATION, relative_uncertainty=found.relative_uncertainty
        )

    node = NodeConstants(
        num_gpus=ranks,
        gpu_link_bytes_per_s=constant(found.bytes_per_s),
        gpu_link_latency_s=constant(found.latency_s),
    )
    # Cards do not compute on the host's cores: only the exchanges themselves are taken over.
    tables = measured_ranks(found.curves).values()
    kept = {name: curve for name, curve in found.curves.items() if name in (*tables, OF_COMPUTE, OF_EXCHANGE)}
    return dataclasses.replace(card, node=node, curves={**card.curves, **kept})


def search_of(
    model: ModelSpec, profile: Profile, evidence: TokenEvidence, request: ParallelRequest, *, shared: bool
) -> EpSearch:
    """Return a search of placements that minimises the layer with what ranks share, or by the busiest port alone."""
    plain = plain_schedule("16")
    search = prepare_ep(model, profile, evidence, request, plain)
    if not shared:
        costing = search.simulation.costing
        alone = dataclasses.replace(costing.constants, intra=dataclasses.replace(costing.constants.intra, table=None))
        by_port = EpCosting(costing.costs, alone, costing.prefill, costing.context_tokens)
        search.placements.layer_costs = layer_costs(
            by_port, plain, step_tokens=evidence.step_tokens, num_ranks=search.simulation.num_ranks,
            ranks_per_node=request.ranks_per_node, weight=evidence.weight,
        )  # fmt: skip
    return search


def schedules_of(policy: str, redundant: int) -> list[ExpertParallelSchedule]:
    """Return plain expert parallelism with a placement, once for every way to choose among copies."""
    choices = ["nearest"] if not redundant else ["capped", "planned"] if policy == "search" else ["capped"]
    return [
        plain_schedule("16").with_options(
            placement__policy=policy, placement__num_redundant=redundant, replica__choice=choice
        )
        for choice in choices
    ]


def cells_of(
    model: ModelSpec, card: Profile, trace: RoutingTrace, ranks: int, redundant: int, split: int, moves: int
) -> list[dict[str, Any]]:
    """Return the simulated steps of every placement for one machine, number of copies and split of the requests."""
    request = ParallelRequest(
        num_nodes=1, ranks_per_node=ranks, num_redundant=redundant, prefill=True, context_tokens=512,
        tokens_per_rank=TOKENS_PER_RANK, search_moves=moves, seed=split,
    )  # fmt: skip
    profile, evidence = host_of(card, ranks), evidence_of(model, trace, request)
    if not isinstance(evidence, TokenEvidence):
        raise TypeError("placements are searched on tokens")
    found = []
    for name, policy, shared in (
        ("contiguous", "contiguous", True),
        ("eplb", "eplb", True),
        (NAMES[0], "search", False),
        (NAMES[1], "search", True),
    ):
        search = search_of(model, profile, evidence, request, shared=shared)
        search.placements.placement("occult", redundant)  # what searches start from is not part of what they take
        begin = time.process_time()
        tried = schedules_of(policy, 0 if policy == "contiguous" else redundant)
        schedule = min(tried, key=lambda each: search.predict(each, CHOOSE).step_s)
        seconds = time.process_time() - begin
        told, before = (search.predict(schedule, part) for part in (REPORT, PLAN))
        line: dict[str, Any] = {
            "machine": card.name, "ranks": ranks, "redundant": redundant, "split": split, "name": name,
            "step_ms": told.step_s * MS_PER_S, "exchange_ms": told.exchange_s * MS_PER_S, "expert_ms": told.expert_s * MS_PER_S,
            "planning_step_ms": before.step_s * MS_PER_S, "exchanged_bytes": told.intra_node_bytes,
            "max_over_mean_load": told.max_over_mean_load, "copies": schedule.replica.choice,
        }  # fmt: skip
        if policy == "search":
            ours = search.placements.searched_for(schedule).layers_from.count("search")
            line |= {"layers_ours": ours, "cpu_s_per_layer": seconds / model.num_moe_layers}
        found.append(line)
        times = "".join(f"  {what} {line[what]:9.3f}" for what in ("step_ms", "planning_step_ms", "exchange_ms"))
        print(f"{card.name} x {ranks}  {redundant:2d} copies  split {split}  {name:22s}{times}", flush=True)
    return found


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return and print, for every machine and number of copies, the change of the step that counting what ranks share brings."""
    found = []
    cases = dict.fromkeys((line["model"], line["machine"], line["ranks"], line["redundant"]) for line in cells)
    for case in cases:
        mine = [line for line in cells if (line["model"], line["machine"], line["ranks"], line["redundant"]) == case]
        by_name = {name: [line for line in mine if line["name"] == name] for name in (*NAMES, "eplb", "contiguous")}
        told: dict[str, Any] = dict(zip(("model", "machine", "ranks", "redundant"), case, strict=True))
        for name, lines in by_name.items():
            told[f"{name}, step ms"] = statistics.mean(line["step_ms"] for line in lines)
        for what, key in (("change", "step_ms"), ("change where planned", "planning_step_ms")):
            ratios = [
                shared[key] / port[key] - 1 for port, shared in zip(*(by_name[name] for name in NAMES), strict=True)
            ]
            told[what] = {"mean": statistics.mean(ratios), "lowest": min(ratios), "highest": max(ratios)}
        for name in NAMES:
            told[f"{name}, CPU s a layer"] = statistics.median(line["cpu_s_per_layer"] for line in by_name[name])
        found.append(told)
        print(json.dumps(told))
    return found


def main() -> None:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", default="bundled", help="a recording, or `bundled`")
    parser.add_argument("--model", default="tiny-moe", help="what was recorded")
    parser.add_argument("--hardware", default="t4", help="a bundled card, or a calibrated profile with exchanges")
    parser.add_argument("--ranks", type=_numbers, default=[2, 4])
    parser.add_argument("--redundant", type=_numbers, default=[0, 8])
    parser.add_argument("--splits", type=_numbers, default=[0, 1, 2])
    parser.add_argument("--moves", type=int, default=50_000, help="moves per layer")
    parser.add_argument("--json", type=Path, help="file for all figures; resumed where it exists")
    args = parser.parse_args()
    path = BUNDLED if args.trace == "bundled" else Path(args.trace)
    trace = import_trace("npz", path) if path.suffix == ".npz" else load_recording(path)
    if not isinstance(trace, RoutingTrace):
        raise TypeError(f"{path} holds loads, not tokens")
    model, card = load_model(args.model), load_hardware(args.hardware)
    head = {"schema_version": 1, "version": __version__, "tokens_per_rank": TOKENS_PER_RANK}
    cells: list[dict[str, Any]] = []
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        cells = [line for line in before["cells"] if line["moves"] == args.moves]
    have = {(line["model"], line["machine"], line["ranks"], line["redundant"], line["split"]) for line in cells}
    for ranks in args.ranks:
        for redundant in args.redundant:
            for split in args.splits:
                if (model.name, card.name, ranks, redundant, split) not in have:
                    made = cells_of(model, card, trace, ranks, redundant, split, args.moves)
                    cells += [
                        {"model": model.name, "recording": path.name, "moves": args.moves} | line for line in made
                    ]
                if args.json:
                    write_atomic(args.json, json.dumps(head | {"cells": cells}, indent=1) + "\n")
    found = head | {"cells": cells, "summary": summary(cells)}
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=1) + "\n")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
