"""One rank of an expert-parallel run: a process of its own.

    python -m moeplan.executor.parallel.rank FOLDER RANK

reads the jobs in FOLDER and writes rank-N.npz beside each: what ran when, bytes sent, and the states its tokens end in.

Modelled: the program is the simulator's (`sim.parallel.program`): operations run in program order on this thread, exchanges on
one thread of their own, or one for each tier where the schedule lets them overlap, in the order of the job, before kernels (`priority`); an
operation waits for the exchanges that it needs. Before each step all ranks meet. A rank ends when the one that started it does. Ignored:
where the process runs (`launch`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ...sim.parallel.program import FREE, Program, Shape, build_program
from ...sim.parallel.timeline import EP_FIELDS
from .clock import clock_before
from .exchange import MOVES, REDUCED, Groups, Network, Peers, make_groups, make_peers
from .job import ROUNDS, Job, job_folders, job_sha256, read_job
from .moving import Moving
from .priority import exchanges_first
from .reason import reason
from .routes import IntArray, parts_of_tokens
from .step_run import CLOCK, StepRun
from .work import Dense, Experts, check_batches

_Held = TypeVar("_Held")


class Weights:
    """What jobs of one rank hold in common: experts of one placement, dense parts of one batch; nothing of them changes in a run."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Any] = {}

    def experts(self, job: Job, placed: IntArray) -> Experts:
        """Return the experts that `placed: [layers, slots]` names."""
        key = (repr(job.model), job.schedule.kernel.bits, job.seed, placed.shape, placed.tobytes())
        return self._get(key, lambda: Experts(job.model, job.schedule.kernel.bits, placed, job.seed))

    def dense(self, job: Job, micro: int, tokens: int) -> Dense:
        """Return the dense part of batch `micro`, whose caches are its own."""
        key = (repr(job.model), job.seed, job.context_tokens, micro, tokens)
        return self._get(key, lambda: Dense(job.model, tokens, job.context_tokens, job.seed))

    def _get(self, key: tuple[object, ...], make: Callable[[], _Held]) -> _Held:
        if key not in self._held:
            self._held[key] = make()
        found: _Held = self._held[key]
        return found


class Rank:
    """One rank: its weights, its peers and what it has noted."""

    def __init__(self, job: Job, rank: int, groups: Groups, held: Weights) -> None:
        self.job, self.rank = job, rank
        schedule, topology = job.schedule, job.topology
        self.program: Program = build_program(schedule, Shape(num_layers=job.model.num_moe_layers, has_shared=False))
        mine = slice(rank * topology.slots_per_rank, (rank + 1) * topology.slots_per_rank)
        self.experts = held.experts(job, job.physical_to_logical[:, mine])
        exchange = schedule.all_to_all
        self.network = Network(topology, rank, exchange.dispatch_bytes_per_value, exchange.combine_bytes_per_value,
                               job.inter_bytes_per_s)  # fmt: skip
        self.peers: dict[int, Peers] = make_peers(topology, rank, groups)
        self.two_channels = bool((self.program.ex_mode == FREE).any())
        self.dense: dict[tuple[int, int], Dense] = {}
        for step in job.steps:
            batch, _ = parts_of_tokens(int((step.source_rank == rank).sum()), schedule)
            for micro in range(schedule.pipeline.micro_batches):
                tokens = int((batch == micro).sum())
                check_batches(tokens)
                if (micro, tokens) not in self.dense:
                    self.dense[micro, tokens] = held.dense(job, micro, tokens)

        self.moving: Moving | None = None
        if job.move is not None:
            new = Experts(job.model, schedule.kernel.bits, job.move.physical_to_logical[:, mine], job.seed, drawn=False)
            self.moving = Moving(
                job.move,
                job.physical_to_logical,
                topology,
                rank,
                self.experts,
                new,
                groups[MOVES],
                job.inter_bytes_per_s,
            )
        self._found: dict[str, object] = {}
        self._spans: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(job.steps))}
        self._usable: list[int] = []
        self._reduced: list[list[tuple[int, int]]] = [[] for _ in job.reductions]

    def slots_of(self, number: int) -> IntArray:
        """Return the copies [tokens, layers, top_k] that a step's tokens go to: of the new placement in layers that have moved."""
        slots: IntArray = self.job.steps[number].slots
        if self.moving is None or not self.moving.usable:
            return slots
        moved = np.arange(slots.shape[1]) < self.moving.usable
        return np.where(moved[None, :, None], self.moving.move.slots[number], slots)

    def experts_of(self, layer: int) -> Experts:
        """Return the experts of a layer, under the placement that a step uses."""
        return self.moving.new if self.moving is not None and layer < self.moving.usable else self.experts

    def run(self, repeat: int) -> None:
        """Run every step once."""
        for number in range(len(self.job.steps)):
            if self.moving is not None:
                self.moving.before_step(repeat)
                self._usable.append(self.moving.usable)
            step = StepRun(self, number)
            meet(f"step {number}")
            began = CLOCK()
            with torch.inference_mode():
                step.run()
            self._spans[number].append((began, CLOCK()))
            self._found[f"busy{number}.{repeat}"] = step.busy
            tokens, states = step.outputs()
            if self.moving is not None:
                self._found[f"states{number}.{repeat}"] = states.numpy()
            self._found |= {
                f"rows{number}.{repeat}": np.array(step.rows, np.int64).reshape(-1, EP_FIELDS), f"payload{number}": step.payload,
                f"other{number}": step.other, f"tokens{number}": tokens, f"states{number}": states.numpy(),
            }  # fmt: skip

        self._reduce()

    def _reduce(self) -> None:
        """Add up values with the other ranks, as often as the job says."""
        for at, (tier, size) in enumerate(self.job.reductions):
            values = torch.ones(size, dtype=REDUCED)
            meet(f"all-reduce {at}")
            began = CLOCK()
            self.network.reduce(values, self.peers[tier])
            self._reduced[at].append((began, CLOCK()))
            if not (values == len(self.peers[tier].ranks)).all():
                raise RuntimeError(f"all-reduce {at} gave other sums than it has ranks")

    def write(self, folder: Path, clock: tuple[int, int], *, first: bool) -> None:
        """Write what was found, how this rank's clock stands to the first one's, and whether exchanges went before kernels."""
        spans = {f"spans{number}": np.array(each, np.int64) for number, each in self._spans.items()}
        spans["first"] = np.array(first)
        spans["reduced"] = np.array(self._reduced, np.int64).reshape(len(self._reduced), self.job.repeats + 1, 2)
        if self.moving is not None:
            spans |= {
                "usable": np.array(self._usable, np.int64),
                "moves": np.array(self.moving.spans, np.int64).reshape(-1, 3),
            }
        aside = folder / f"rank-{self.rank}.tmp.npz"
        np.savez(aside, clock=np.array(clock, np.int64), **self._found, **spans)  # type: ignore[arg-type]
        aside.rename(folder / f"rank-{self.rank}.npz")


def meet(before: str) -> None:
    """Return when all ranks are here; raises RuntimeError, naming what was to come, where one does not come."""
    try:
        dist.barrier()
    except RuntimeError as error:
        raise RuntimeError(f"waiting for all ranks before {before}: {reason(error)}") from None


def check_same_job(folder: Path, rank: int, ranks: int) -> None:
    """Return nothing; raises RuntimeError, naming them, where ranks have other jobs than rank 0."""
    every_job = b"".join(bytes.fromhex(job_sha256(each)) for each in job_folders(folder))
    mine = torch.frombuffer(bytearray(hashlib.sha256(every_job).digest()), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine)
    other = [str(at) for at, one in enumerate(every) if not torch.equal(one, every[0])]
    if other:
        raise RuntimeError(f"refused: the plan or recording of rank {', '.join(other)} differs from that of rank 0")


def main(folder: Path, rank: int) -> None:
    """Run the jobs in a folder as one rank: all of them once to warm up, then in turns."""
    torch.set_num_threads(1)
    folders = job_folders(folder)
    jobs = [read_job(each) for each in folders]
    topology = jobs[0].topology
    ranks = topology.num_ranks
    limit = dt.timedelta(seconds=jobs[0].timeout_s)
    meeting = os.environ.get("MOEPLAN_MEETING", str(folder / "meeting"))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=limit)
    check_same_job(folder, rank, ranks)
    clock = clock_before(rank, ranks)
    groups = make_groups(ranks, topology.ranks_per_node, rank)
    # Weights of one job may still travel on their thread when another's do: each move has a group of its own, or ranks would mix them up.
    moves = {at: dist.new_group(list(range(ranks))) for at, job in enumerate(jobs) if job.move is not None}
    meet("the start")  # its threads are there
    first = exchanges_first()
    held = Weights()
    mine = [
        Rank(job, rank, groups | {MOVES: moves[at]} if at in moves else groups, held) for at, job in enumerate(jobs)
    ]
    for repeat in range(max(job.repeats for job in jobs) + 1):
        for job, one in zip(jobs, mine, strict=True):
            if repeat <= job.repeats:
                one.run(repeat)
        if rank == 0:
            (folder / ROUNDS).write_text(str(repeat + 1))
    for one, place in zip(mine, folders, strict=True):
        if one.moving is not None:
            one.moving.finish()
        one.write(place, clock, first=first)
    meet("the end")  # nobody closes its connections while another one still talks
    dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process at once when the one that started it is gone: then the pipe from it is closed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, name="moeplan parent", daemon=True).start()


def run_rank(arguments: Sequence[str]) -> None:
    """Run as the rank that the command line names, and end with one line where that fails."""
    folder, rank = Path(arguments[0]), int(arguments[1])
    try:
        main(folder, rank)
    except RuntimeError as error:
        print(f"rank {rank}: {reason(error)}", flush=True)  # noqa: T201 - what the launcher reads
        os._exit(1)  # threads may still be inside an exchange that nobody answers


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its ranks
    end_with_parent()
    run_rank(sys.argv[1:])
