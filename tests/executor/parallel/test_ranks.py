"""Ranks that exchange tokens give what one process gives, and send just the bytes that were predicted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from long_runs import LONG
from moeplan.base.errors import InputError
from moeplan.executor.parallel.agreement import first_difference, rounding_bound, worst_error
from moeplan.executor.parallel.launch import run_jobs
from moeplan.executor.parallel.reference import reference_states
from moeplan.executor.parallel.routes import parts_of_tokens, slots_of_group, split
from moeplan.sim.parallel.traffic import Topology, count_step
from moeplan.specs.schedules.parallel import ExpertParallelSchedule
from parallel_jobs import FOUR_RANKS, TWO_RANKS, prepared, preset32


def check_all(schedules: Mapping[str, ExpertParallelSchedule], ranks: int, nodes: int, steps: int = 1) -> None:
    made = {name: prepared(schedule, ranks=ranks, nodes=nodes, steps=steps) for name, schedule in schedules.items()}
    found = run_jobs([one.job for one in made.values()])
    differences = {name: first_difference(one, runs) for (name, one), runs in zip(made.items(), found, strict=True)}
    assert differences == dict.fromkeys(made)
    errors = {}
    for (name, one), runs in zip(made.items(), found, strict=True):
        assert sum(len(run.tokens[0]) for run in runs) == len(one.job.steps[0].source_rank)
        errors[name] = worst_error(one.job, runs, reference_states(one.job)) / rounding_bound(one.job)
    assert max(errors.values()) <= 1, errors
    assert (
        errors.get("plain", 1) > 0
    )  # sums are made in another order: not even one bit of difference would be suspicious


def test_two_ranks_equal_one_process_and_send_the_predicted_bytes() -> None:
    check_all(TWO_RANKS, 2, 1)


@pytest.mark.skipif(not LONG, reason="four processes: MOEPLAN_LONG=1")
def test_four_ranks_in_two_nodes_equal_one_process_and_send_the_predicted_bytes() -> None:
    check_all(FOUR_RANKS | TWO_RANKS, 4, 2, steps=2)


@given(
    st.sampled_from(("all-choices", "per-rank", "hierarchical")),
    st.sampled_from(((1, 1, "none", 1), (2, 1, "none", 1), (1, 2, "expert", 2), (2, 3, "token", 3))),
    st.integers(0, 1000),
)
def test_what_ranks_send_by_themselves_is_what_is_counted_for_all(
    kind: str, shape: tuple[int, int, str, int], seed: int
) -> None:
    batches, _, cut, groups = shape
    schedule = preset32("ep", all_to_all__kind=kind, pipeline__micro_batches=batches, pipeline__split=cut,
                        pipeline__num_groups=groups)  # fmt: skip
    topology = Topology(num_ranks=4, num_nodes=2, slots_per_rank=3)
    draw = np.random.default_rng(seed)
    tokens = int(draw.integers(4, 30))
    slots = np.argsort(draw.random((tokens, 1, 12)), axis=2)[:, :, :3].astype(np.int64)
    source = draw.integers(0, 4, tokens)
    load = count_step(slots, source, topology, schedule)
    links = np.zeros((4, 4), np.int64)
    rank_of_slot = np.arange(12) // 3
    for rank in range(4):
        mine = slots[source == rank, 0]
        batch, chunk = parts_of_tokens(len(mine), schedule)
        for micro in range(batches):
            for group in range(schedule.num_groups):
                inside = (batch == micro) & ((chunk == group) if cut == "token" else True)
                header = slots_of_group(mine[inside], topology, schedule, group)
                if kind != "hierarchical":
                    sent = split(header, rank_of_slot, 4, every_choice=kind == "all-choices")
                    links[rank] += sent.counts
                    continue
                first = split(header, rank_of_slot // 2, 2)
                links[rank, rank % 2 :: 2] += first.counts
                for node in range(2):
                    landed = first.slots[np.repeat(np.arange(2), first.counts) == node]
                    second = split(landed, rank_of_slot - 2 * node, 2)
                    links[2 * node + rank % 2, 2 * node : 2 * node + 2] += second.counts
    np.fill_diagonal(links, 0)
    assert links.tolist() == load.links.tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensor-parallel", "slices of layers: simulated but not executed"),
        ("comet", "an idealised division: simulated but not executed"),
    ],
)
def test_schedules_that_are_only_simulated_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepared(preset32(name))


def test_tokens_of_other_widths_are_refused() -> None:
    with pytest.raises(InputError, match="tokens travel in 4 or 2 bytes for each value"):
        prepared(preset32("ep", all_to_all__dispatch_bytes_per_value=1.03125))
