"""The SimPy model of one expert-parallel step: the readable reference of the compiled simulator.

Modelled: a compute stream for every rank that runs the program in order, and a network of two tiers. Life of an exchange:

1. Every rank has done the operation it follows (or the exchange it follows has ended): it is requested.
2. At the end of that instant, and whenever a tier becomes free, one arbitration picks by (class, program order) among what
   is waiting; what finds its tiers free begins.
3. Every rank's port is busy for its own bytes; the exchange (or its stage) ends with the slowest port.
4. Operations that wait for it may begin, on all ranks.

An exchange without bytes takes no time and no network. Ignored: how long anything takes (`ep_costs`), ports that end early
being used by the next exchange, and congestion inside a tier beyond the largest port.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simpy

from ..lanes import Process, at_end_of_instant
from ..policies.state import Array
from .program import FREE, IN_TURN, NONE, NUM_TIERS, Program
from .tables import EpTables
from .timeline import EP_FIELDS, LANE_COMPUTE, LANE_INTER


@dataclass(slots=True)
class Stage:
    """What is left of an exchange."""

    exchange: int
    tiers: list[int]
    """Tiers to pass, in order."""


class EpModel:
    """One run; `run()` returns what happened."""

    def __init__(self, program: Program, tables: EpTables) -> None:
        self.env = simpy.Environment()
        self.program, self.tables = program, tables
        self.num_ops, self.num_ranks = tables.work_ns.shape
        num_exchanges = len(program.ex_kind)
        self.ended = [self.env.event() for _ in range(num_exchanges)]
        self.op_end = np.zeros((self.num_ops, self.num_ranks), np.int64)
        self.ex_start = np.full(num_exchanges, NONE, np.int64)
        self.ex_end = np.full(num_exchanges, NONE, np.int64)
        self.rows: list[tuple[int, ...]] = []
        self._left = [self.num_ranks] * self.num_ops
        self._free = [True] * NUM_TIERS
        self._waiting: list[Stage] = []
        self._called = False
        self._after_op: dict[int, list[int]] = {}
        self._after_ex: dict[int, list[int]] = {}
        for exchange in range(num_exchanges):
            op, ex = int(program.ex_after_op[exchange]), int(program.ex_after_ex[exchange])
            follows = self._after_op.setdefault(op, []) if op != NONE else self._after_ex.setdefault(ex, [])
            follows.append(exchange)

    def run(self) -> tuple[Array, int]:
        """Return (rows [num_rows, EP_FIELDS] unsorted, makespan); ends are in `op_end`, `ex_start` and `ex_end`."""
        for rank in range(self.num_ranks):
            self.env.process(self._rank_process(rank))
        self.env.run()
        return np.array(self.rows, np.int64).reshape(-1, EP_FIELDS), int(self.env.now)

    def _rank_process(self, rank: int) -> Process:
        """Run one rank's operations in program order."""
        program, tables = self.program, self.tables
        for op in range(self.num_ops):
            for exchange in program.wait_list[program.wait_start[op] : program.wait_start[op + 1]].tolist():
                if not self.ended[exchange].processed:
                    yield self.ended[exchange]
            begin, work = self.env.now, int(tables.work_ns[op, rank])
            if work:
                yield self.env.timeout(work)
                what = (
                    int(program.op_kind[op]),
                    int(program.op_layer[op]),
                    int(program.op_micro[op]),
                    int(program.op_group[op]),
                )
                self.rows.append((rank, LANE_COMPUTE, *what, begin, self.env.now, 0, int(tables.op_tokens[op, rank])))
            self.op_end[op, rank] = self.env.now
            self._left[op] -= 1
            if self._left[op] == 0:
                for exchange in self._after_op.get(op, ()):
                    self._request(exchange)

    # --- the network ------------------------------------------------------------------------------------------------

    def _request(self, exchange: int) -> None:
        """Queue an exchange that is ready; one without bytes is over at once."""
        tiers = [tier for tier in self._order(exchange) if self._longest(exchange, tier)]
        if tiers:
            self._waiting.append(Stage(exchange, tiers))
            self._call()
        else:
            self.ex_start[exchange] = self.env.now
            self._end(exchange)

    def _order(self, exchange: int) -> list[int]:
        first = int(self.program.ex_first[exchange])
        return [first, 1 - first]

    def _longest(self, exchange: int, tier: int) -> int:
        return int(self.tables.ex_ns[exchange, tier].max())

    def _call(self) -> None:
        """Ask for one arbitration at the end of this instant."""
        if not self._called:
            self._called = True
            at_end_of_instant(self.env, self._arbitrate)

    def _arbitrate(self) -> None:
        self._called = False
        program = self.program
        for stage in sorted(self._waiting, key=lambda stage: (int(program.ex_class[stage.exchange]), stage.exchange)):
            needs = stage.tiers[:1] if program.ex_mode[stage.exchange] == FREE else list(range(NUM_TIERS))
            if all(self._free[tier] for tier in needs):
                self._waiting.remove(stage)
                for tier in needs:
                    self._free[tier] = False
                self.env.process(self._stage_process(stage, needs))

    def _stage_process(self, stage: Stage, holds: list[int]) -> Process:
        """Move what the held tiers can move, give them back, and queue the next stage or end the exchange."""
        exchange, mode = stage.exchange, int(self.program.ex_mode[stage.exchange])
        if self.ex_start[exchange] == NONE:
            self.ex_start[exchange] = self.env.now
        if mode == FREE:
            tier = stage.tiers.pop(0)
            self._ports(exchange, tier)
            yield self.env.timeout(self._longest(exchange, tier))
        elif mode == IN_TURN:
            while stage.tiers:
                tier = stage.tiers.pop(0)
                self._ports(exchange, tier)
                yield self.env.timeout(self._longest(exchange, tier))
        else:
            for tier in stage.tiers:
                self._ports(exchange, tier)
            yield self.env.timeout(max(self._longest(exchange, tier) for tier in stage.tiers))
            stage.tiers.clear()
        for tier in holds:
            self._free[tier] = True
        self._call()
        if stage.tiers:
            self._waiting.append(stage)
        else:
            self._end(exchange)

    def _ports(self, exchange: int, tier: int) -> None:
        """Write the rows of every rank's port, from now."""
        program, tables, now = self.program, self.tables, self.env.now
        what = (int(program.ex_kind[exchange]), int(program.ex_layer[exchange]), int(program.ex_micro[exchange]),
                int(program.ex_group[exchange]))  # fmt: skip
        for rank in range(self.num_ranks):
            length = int(tables.ex_ns[exchange, tier, rank])
            if length:
                sizes = (int(tables.ex_bytes[exchange, tier, rank]), int(tables.ex_tokens[exchange, tier, rank]))
                self.rows.append((rank, LANE_INTER + tier, *what, now, now + length, *sizes))

    def _end(self, exchange: int) -> None:
        self.ex_end[exchange] = self.env.now
        self.ended[exchange].succeed()
        for follower in self._after_ex.get(exchange, ()):
            self._request(follower)
