"""Expert-parallel schedules on this machine's ranks: `python -m benchmarks.ep_executor [--profile cluster.json] [-o raw.json]`.

    profile     this machine with its ranks, as `moeplan calibrate --ranks 4 --nodes 2 --quick` measures it, unless one is given
    schedules   some twenty, taking turns: predicted, measured, noise, bytes; what each ingredient gains over contiguous experts
    reductions  all-reduces of sizes that took no part in the calibration, predicted and measured
    groups      how many groups of experts: EPS-MoE's rule and the simulator beside what is fastest
    kernels     grouped or dense: the predicted faster one beside the measured one
    moves       weights that travel while steps go on, in three ways: pauses and slow-down, predicted and measured

A part that is done is in the output at once; the same command goes on with what is missing. Without -o nothing is kept.

Modelled: four ranks in two nodes of the bundled model under its own recording. Ignored: other machines; whether another program disturbed a
run is printed, not corrected.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeplan.api.load import load_trace
from moeplan.base.errors import InputError, MoeplanError
from moeplan.base.progress import reporter
from moeplan.base.text_files import write_atomic
from moeplan.devices.device import cpu_name
from moeplan.executor.calibration.calibrate import calibrate_device
from moeplan.executor.calibration.rank_runs import RankExtent
from moeplan.executor.validation.ranks import network_of, simulation_of
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.planner.parallel.search import EpSearch
from moeplan.sim.parallel.simulate import ParallelSimulation
from moeplan.specs.machines.profile import Profile, profile_to_json
from moeplan.specs.machines.profile_file import load_hardware, profile_from_json
from moeplan.specs.models.load import load_model

from . import compare, groups, kernels, moves, reductions

PARTS = ("schedules", "reductions", "groups", "kernels", "moves")
RANKS, NODES, CONTEXT, COPIES = 4, 2, 64, 8
TOKENS_AND_STEPS = ((128, 3), (512, 1))
"""Of each rank in a step, and how many steps."""


def main() -> None:
    """Run the parts that are asked for, print them, and keep raw figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--profile", type=Path, help="of calibrate --ranks 4 --nodes 2; default: it is measured first")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--moves", type=int, default=4000, help="that our placement search proposes for each layer")
    parser.add_argument("-o", "--output", type=Path, help="raw figures; a run that was cut short goes on there")
    given = parser.parse_args()
    try:
        run(given)
    except MoeplanError as error:
        sys.exit(f"ep_executor: {error}")


class Kept:
    """The parts that are done, in a file where there is one."""

    def __init__(self, path: Path | None, asked: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"asked": asked, "took_s": {}}
        if path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before.get("asked") != asked:
                raise InputError("-o", str(path), f"holds a run of {before.get('asked')}, not {asked}", "give another")
            self.document = before

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what a part found, now or in an earlier run."""
        if name not in self.document:
            began = time.monotonic()
            found = work()
            self.document["took_s"][name] = round(time.monotonic() - began, 1)
            self.document[name] = found
            if self.path is not None:
                write_atomic(self.path, json.dumps(self.document, indent=1) + "\n")
            print(f"{name}: {self.document['took_s'][name]:.0f} s", file=sys.stderr, flush=True)
        return self.document[name]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Return everything that was measured, as plain values; raises InputError for unknown parts and a file of another run."""
    asked = given.parts.split(",")
    unknown = [name for name in asked if name not in PARTS]
    if unknown:
        raise InputError("--parts", unknown[0], f"one of {', '.join(PARTS)}", "leave it out")
    told = {
        "repeats": given.repeats,
        "moves": given.moves,
        "profile": None if given.profile is None else str(given.profile),
    }
    kept = Kept(given.output, told)
    profile = profile_from_json(kept.part("profile", partial(_profile_text, given.profile)))
    kept.part("about", about)
    kept.part("load_average_before", lambda: os.getloadavg()[0])
    simulation = simulation_of(load_model("tiny-moe"), profile, _request(128, given.moves), CONTEXT)
    laws = simulation.costing.constants.ranks
    if laws is None:
        raise InputError("--profile", profile.name, "no steps of ranks", "calibrate --ranks 4 --nodes 2")
    with network_of(simulation) as (nodes, limit, network):
        kept.part("network", lambda: network)
        kept.part("exchanges_first", lambda: laws.exchanges_first)
        for tokens, steps in TOKENS_AND_STEPS if "schedules" in asked else ():
            print(f"{tokens} tokens of each rank, {steps} steps")
            found = kept.part(f"schedules of {tokens} tokens", lambda tokens=tokens, steps=steps: compare.run(
                _search(profile, tokens, given.moves), simulation, nodes, limit, COPIES, steps, given.repeats,
                reporter(f"{tokens} tokens")))  # fmt: skip
            compare.print_schedules(found)
        if "reductions" in asked:
            run_them = partial(reductions.run, simulation, laws, nodes, limit, given.repeats, reporter("all-reduce"))
            reductions.print_reductions(kept.part("reductions", run_them))
        if "groups" in asked:
            groups.print_groups(
                kept.part("groups", partial(groups.run, profile, laws, nodes, limit, given.repeats, reporter("groups")))
            )
        if "kernels" in asked:
            kernels.print_kernels(kept.part("kernels", partial(kernels.run, 2 * given.repeats)))
        if "moves" in asked:
            moves.print_moves(kept.part("moves", partial(_moves, profile, simulation, given.moves, nodes, limit)))
    kept.part("load_average_after", lambda: os.getloadavg()[0])
    found, took = kept.document, sum(kept.document["took_s"].values())
    print(f"{found['about']['machine']}, {network}; load average {found['load_average_before']:.1f} before, "
          f"{found['load_average_after']:.1f} after; {took:.0f} s in all")  # fmt: skip
    return found


def _request(tokens: int, search_moves: int) -> ParallelRequest:
    return ParallelRequest(
        num_nodes=NODES, ranks_per_node=RANKS // NODES, tokens_per_rank=tokens, context_tokens=CONTEXT, num_redundant=COPIES,
        bits="32", dense_bits="32", search_moves=search_moves,
    )  # fmt: skip


def _search(profile: Profile, tokens: int, search_moves: int) -> EpSearch:
    model, recording, request = load_model("tiny-moe"), load_trace("bundled"), _request(tokens, search_moves)
    return prepare_ep(model, profile, evidence_of(model, recording, request), request, plain_schedule("32"))


def _moves(profile: Profile, simulation: ParallelSimulation, search_moves: int, nodes: Any, limit: float) -> Any:
    return moves.run(_search(profile, *TOKENS_AND_STEPS[0][:1], search_moves), simulation, nodes, limit, 3)


def _profile_text(path: Path | None) -> str:
    """Return the profile that is given, or that of this machine, measured now."""
    if path is not None:
        return profile_to_json(load_hardware(str(path)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cluster.json"
        calibrate_device("cpu", quick=True, bits=("32",), out=out, ranks=RankExtent(ranks=RANKS, nodes=NODES),
                         progress=reporter("calibrate"))  # fmt: skip
        return out.read_text(encoding="utf-8")


def about() -> dict[str, Any]:
    """Return what a table must say beside its figures."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    main()
