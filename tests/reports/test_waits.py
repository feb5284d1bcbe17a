"""Arrows in a timeline: worked out from rows alone, they must name transfers that kernels really waited for."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.reports.timelines.waits import Wait, waits
from moeplan.sim.offload.simpy_model import OffloadModel
from moeplan.sim.offload.simulators import fresh_state
from moeplan.sim.policies.state import NONE, make_decision
from moeplan.sim.timeline import Timeline, canonical
from strategies import make_costs, runs


def rows_of(*rows: tuple[str, str, int, int, int, int, int], device: str = "device 0") -> pd.DataFrame:
    """Return a frame of (lane, op, step, layer, expert, start, end)."""
    frame = pd.DataFrame(rows, columns=["lane", "op", "step", "layer", "expert", "start_ns", "end_ns"])
    frame["device"], frame["bytes"], frame["tokens"] = device, 0, 0
    return frame


def test_a_kernel_that_began_when_its_bytes_arrived_waited_for_them() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 10),
        ("h2d", "fetch", 0, 0, 3, 12, 30),
        ("compute", "expert", 0, 0, 3, 30, 40),
    )
    assert waits(frame) == [Wait(transfer=1, kernel=2)]


def test_a_kernel_that_began_later_than_its_bytes_waited_for_something_else() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 10),
        ("h2d", "fetch", 0, 0, 3, 12, 30),
        ("compute", "expert", 0, 0, 3, 33, 40),
    )
    assert waits(frame) == []
    assert waits(frame, slack_ns=3) == [Wait(transfer=1, kernel=2)]
    assert waits(frame, slack_ns=2) == []


def test_bytes_that_arrived_while_the_lane_was_busy_were_not_waited_for() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 30),
        ("h2d", "prefetch", 0, 0, 3, 12, 30),
        ("compute", "expert", 0, 0, 3, 30, 40),
    )
    assert waits(frame) == []


def test_the_last_chunk_is_the_one_that_counts() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 10),
        ("h2d", "fetch", 0, 0, 3, 12, 20),
        ("h2d", "fetch", 0, 0, 3, 20, 30),
        ("compute", "expert", 0, 0, 3, 30, 40),
    )
    assert waits(frame) == [Wait(transfer=2, kernel=3)]


def test_a_grouped_kernel_waited_for_every_demand_and_for_the_guess_that_came_last() -> None:
    frame = rows_of(
        ("h2d", "prefetch", 0, 0, 7, 0, 12),  # in time for all that the rows say, or a wrong guess
        ("compute", "dense", 0, 0, -1, 0, 10),
        ("h2d", "fetch", 0, 0, 3, 12, 20),
        ("h2d", "fetch", 0, 0, 4, 20, 25),
        ("h2d", "prefetch", 0, 0, 5, 25, 30),
        ("compute", "expert", 0, 0, -1, 30, 40),
        ("h2d", "fetch", 0, 1, 4, 31, 50),  # of another layer
        ("compute", "expert", 0, 1, -1, 60, 70),
    )
    assert waits(frame) == [Wait(2, 5), Wait(3, 5), Wait(4, 5)]


def test_where_whole_layers_are_fetched_the_first_kernel_waited_for_the_last_transfer() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 10),
        ("h2d", "fetch", 0, 0, 1, 10, 20),
        ("h2d", "fetch", 0, 0, 0, 20, 30),
        ("compute", "expert", 0, 0, 1, 30, 35),
        ("compute", "expert", 0, 0, 0, 35, 40),
    )
    assert waits(frame) == [Wait(1, 3), Wait(2, 3)]


def test_devices_do_not_wait_for_each_other() -> None:
    one = rows_of(("compute", "dense", 0, 0, -1, 0, 10), ("compute", "expert", 0, 0, 3, 30, 40), device="a")
    two = rows_of(("h2d", "fetch", 0, 0, 3, 12, 30), device="b")
    assert waits(pd.concat([one, two], ignore_index=True)) == []


def test_the_last_kernel_of_a_streamed_layer_waits_for_an_expert_that_nothing_uses() -> None:
    frame = rows_of(
        ("compute", "dense", 0, 0, -1, 0, 8), ("h2d", "fetch", 0, 0, 0, 10, 16), ("compute", "expert", 0, 0, 0, 16, 28),
        ("h2d", "fetch", 0, 0, 2, 16, 30), ("h2d", "fetch", 0, 0, 1, 30, 37), ("compute", "expert", 0, 0, 2, 37, 43),
    )  # fmt: skip
    assert waits(frame) == [Wait(transfer=1, kernel=2), Wait(transfer=3, kernel=5), Wait(transfer=4, kernel=5)]


class WatchedModel(OffloadModel):
    """The SimPy model, noting what each kernel needs and which kernels stood idle for bytes."""

    def run(self):
        self.needs: dict[tuple[int, int, int], list[set[int]]] = {}
        self.arrived: dict[int, int] = {}
        self.waited: dict[int, set[int]] = {}
        return super().run()

    def _kernels(self, step, layer, decided):
        launches = super()._kernels(step, layer, decided)
        sets: list[set[int]] = [set() for _ in launches]
        for item in decided.items:
            if item.transfer >= 0:
                sets[item.kernel].add(item.transfer)
        if self.config.policy == NONE and sets:  # a block that was fetched ahead is waited for as a whole
            sets[0] |= {promotion.transfer for promotion in decided.promotions}
        for launch, needed in zip(launches, sets, strict=True):
            self.needs[id(launch)] = (launch, needed)
        return launches

    def _moved(self, transfer, begin, num_bytes):
        super()._moved(transfer, begin, num_bytes)
        self.arrived[transfer.id] = self.env.now

    def _book_stall(self, launch):
        if id(launch) in self.needs and self.env.now > self._compute_end:
            self.waited[self.env.now] = self.needs[id(launch)][1]
        super()._book_stall(launch)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(runs(), st.integers(0, 2**32))
def test_arrows_agree_with_what_the_model_waited_for(case, seed) -> None:
    config, workload, _, capacities, schedule, _ = case
    # Durations so varied that two things end at one instant only where one causes the other.
    costs = make_costs(np.random.default_rng(seed), workload, schedule, scale=10**7)
    state, decision = fresh_state(config, workload, capacities, costs), make_decision(config)
    model = WatchedModel(config, workload.steps, costs, state, decision, serial=not schedule.copy.overlap)
    rows, _, _ = model.run()
    frame = Timeline(rows=canonical(rows)).frame()
    found: dict[int, set[int]] = {}
    transfer_at = {end: transfer for transfer, end in model.arrived.items()}
    for wait in waits(frame):
        kernel = int(frame["start_ns"].iloc[wait.kernel])
        found.setdefault(kernel, set()).add(transfer_at[int(frame["end_ns"].iloc[wait.transfer])])
    whole_layers = schedule.copy.fetch != "routed"
    for kernel, transfers in found.items():
        assert kernel in model.waited
        assert whole_layers or transfers <= model.waited[kernel]
    for kernel, needed in model.waited.items():
        last = max((model.arrived[transfer] for transfer in needed if transfer in model.arrived), default=-1)
        # Streamed layers: a test of their own above. Still open, seen in a drawn run: a kernel of several experts is tied to a wrong
        # guess that was demanded because its place was given away; rows do not tell it from what the kernel needs.
        if last == kernel and schedule.copy.fetch != "layer-streamed":
            assert transfer_at[kernel] in found[kernel]
