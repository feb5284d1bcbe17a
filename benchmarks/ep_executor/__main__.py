"""Expert-parallel schedules on this machine's ranks: `python -m benchmarks.ep_executor [--profile cluster.json] [-o raw.json]`.

    schedules   some twenty, taking turns: predicted, measured, noise, bytes; what each ingredient gains over contiguous experts
    groups      how many groups of experts: EPS-MoE's rule and the simulator beside what is fastest
    kernels     grouped or dense: the predicted faster one beside the measured one
    moves       weights that travel while steps go on, in three ways: pauses and slow-down, predicted and measured

Modelled: four ranks in two nodes of the bundled model under its own recording; costs from a profile of `moeplan calibrate --ranks 4
--nodes 2`, made first where none is given. Ignored: other machines; whether another program disturbed a run is printed, not corrected.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moeplan.api.load import load_trace
from moeplan.base.errors import MoeplanError
from moeplan.base.progress import reporter
from moeplan.devices.device import cpu_name
from moeplan.executor.calibration.calibrate import calibrate_device
from moeplan.executor.calibration.rank_runs import RankExtent
from moeplan.executor.validation.ranks import network_of, simulation_of
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.specs.machines.profile import Profile
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model

from . import compare, groups, kernels, moves

PARTS = ("schedules", "groups", "kernels", "moves")
RANKS, NODES, CONTEXT, COPIES = 4, 2, 64, 8


def main() -> None:
    """Run the parts that are asked for, print them, and write raw samples where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--profile", type=Path, help="of calibrate --ranks 4 --nodes 2; default: it is measured first")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tokens", type=int, default=128, help="of each rank in a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--moves", type=int, default=4000, help="that our placement search proposes for each layer")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    try:
        document = run(given)
    except MoeplanError as error:
        sys.exit(f"ep_executor: {error}")
    if given.output is not None:
        given.output.write_text(json.dumps(document, indent=1) + "\n")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Return everything that was measured, as plain values."""
    profile = measured_profile() if given.profile is None else load_hardware(str(given.profile))
    model, recording = load_model("tiny-moe"), load_trace("bundled")
    request = ParallelRequest(
        num_nodes=NODES, ranks_per_node=RANKS // NODES, tokens_per_rank=given.tokens, context_tokens=CONTEXT, num_redundant=COPIES,
        bits="32", dense_bits="32", search_moves=given.moves,
    )  # fmt: skip
    simulation = simulation_of(model, profile, request, CONTEXT)
    laws = simulation.costing.constants.ranks
    if laws is None:
        sys.exit("ep_executor: the profile has no steps of ranks: calibrate --ranks 4 --nodes 2")
    asked = given.parts.split(",")
    document: dict[str, Any] = about(profile)
    before = os.getloadavg()[0]
    search = prepare_ep(model, profile, evidence_of(model, recording, request), request, plain_schedule("32"))
    with network_of(simulation) as (nodes, limit, network):
        document["network"] = network
        if "schedules" in asked:
            document["schedules"] = compare.run(search, simulation, nodes, limit, COPIES, given.steps, given.repeats)
            compare.print_schedules(document["schedules"])
        if "groups" in asked:
            document["groups"] = groups.run(profile, laws, nodes, limit, given.repeats)
            groups.print_groups(document["groups"])
        if "kernels" in asked:
            document["kernels"] = kernels.run(4 * given.repeats)
            kernels.print_kernels(document["kernels"])
        if "moves" in asked:
            document["moves"] = moves.run(search, simulation, nodes, limit, given.steps)
            moves.print_moves(document["moves"])
    document["load_average"] = {"before": before, "after": os.getloadavg()[0]}
    print(f"{document['machine']}, {network}; load average {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    return document


def measured_profile() -> Profile:
    """Return a profile of this machine, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.json"
        calibrate_device("cpu", quick=True, bits=("32",), out=path, ranks=RankExtent(ranks=RANKS, nodes=NODES),
                         progress=reporter("calibrate"))  # fmt: skip
        return load_hardware(str(path))


def about(profile: Profile) -> dict[str, Any]:
    """Return what a table must say beside its figures."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "torch": str(torch.__version__),
        "profile": profile.name,
    }


if __name__ == "__main__":
    main()
