"""Drafted passes: every token of every request comes out once, whatever runs together; both simulators agree, on two cards too."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.drafting.draft import Drafting
from moeplan.sim.offload.simulate import Simulation
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.specs.card_split import by_counts
from moeplan.specs.drafting import Acceptance
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule, WorkloadOptions
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.recording import RoutingTrace
from moeplan.traces.synthesis.prior import prior_recording
from strategies import make_trace

requests_drawn = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)).filter(any), min_size=1, max_size=6).filter(
    lambda drawn: any(reply for _, reply in drawn)
)
MODEL = load_model("gpt-oss-20b")
BOX = compose_text("rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x + ddr4-3200x2:64GiB")
TRACE = prior_recording(MODEL, RequestLengths.alike(prompt_tokens=9, reply_tokens=7, requests=3))
SCHEDULES = {
    "resident": load_preset("resident"),
    "n-cpu-moe": load_preset("n-cpu-moe=9"),
    "lru": load_preset("mixtral-offloading-code").with_options(cache__experts_per_layer=7),
    "guesses": load_preset("mixtral-offloading").with_options(cache__experts_per_layer=6, predictor__kind="synthetic"),
    "balanced": load_preset("on-demand").with_options(kernel__miss="balanced"),
}


def verified(trace: RoutingTrace, together: int, length: int, chance: float, steps: int | None = None) -> Workload:
    drafting = Drafting(length=length, acceptance=Acceptance(chance=chance))
    return build_workload(
        trace, WorkloadOptions(concurrency=together, prefill_chunk_tokens=3), drafting=drafting, max_steps=steps
    )


@settings(max_examples=examples(40), deadline=None)
@given(
    requests_drawn,
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_every_token_comes_out_once(
    requests: list[tuple[int, int]], together: int, length: int, chance: float, steps: int | None
) -> None:
    trace = make_trace(np.random.default_rng(3), num_layers=2, num_experts=6, top_k=2, requests=requests)
    plain = build_workload(trace, WorkloadOptions(concurrency=together, prefill_chunk_tokens=3), max_steps=steps)
    found = verified(trace, together, length, chance, steps)
    assert (
        int(found.yields.sum()) == plain.num_tokens
    )  # the same tokens of the same requests, in fewer passes or as many
    assert found.num_steps <= plain.num_steps
    decode = found.step_phase == 1
    drafted = found.step_drafted
    assert drafted is not None and (drafted[~decode] == 0).all()
    places = found.step_tokens[decode] - drafted[decode]
    assert (places >= 1).all() and (places <= together).all() and (drafted[decode] == length * places).all()
    assert (found.yields[decode] >= places).all() and (found.yields[decode] <= places * (length + 1)).all()
    assert len(found.prompts) == len(plain.prompts) and len(found.requests) == len(plain.requests)
    kept = []
    for step in range(found.num_steps):
        mine = found.step_token[found.step_start[step] : found.step_start[step + 1]]
        kept += mine[: len(mine)].tolist() if not decode[step] else []
    assert sorted(kept) == sorted(plain.step_token[np.repeat(plain.step_phase == 0, plain.step_tokens)].tolist())
    if chance == 0:
        assert found.num_steps == plain.num_steps and (found.yields == plain.step_tokens).all()
        certain = [found.step_token[found.step_start[step]] for step in np.flatnonzero(decode)]
        assert certain == [plain.step_token[plain.step_start[step]] for step in np.flatnonzero(plain.step_phase == 1)]


def test_two_requests_by_hand() -> None:
    """Two requests of 4 reply tokens with 2 guesses that are always right: 3 tokens of each, then 1 of each."""
    trace = make_trace(np.random.default_rng(1), num_layers=1, num_experts=4, top_k=1, requests=[(2, 4), (1, 4)])
    found = verified(trace, 2, 2, 1.0)
    assert found.step_phase.tolist() == [0, 0, 1, 1]
    assert found.yields.tolist() == [2, 1, 6, 2]
    assert found.step_tokens.tolist() == [2, 1, 6, 6]
    assert found.step_token[found.step_start[2] : found.step_start[3]].tolist() == [2, 3, 4, 7, 8, 9]
    last = found.step_token[found.step_start[3] :].tolist()
    assert last[0] == 5 and last[3] == 10  # the two that are certain; the four others stand for guesses that were wrong
    assert found.requests.tolist() == [[0, 3], [1, 3]] and found.prompts.tolist() == [[0, 0], [1, 1]]


def drafted_on_two_cards(first: int, together: int, length: int, chance: float, mtp: bool) -> Simulation:
    drafting = Drafting(length=length, acceptance=Acceptance(chance=chance), mtp=mtp)
    return Simulation(
        model=MODEL,
        profile=BOX,
        trace=TRACE,
        split=by_counts((first, 24 - first)),
        memory_bytes=2**40,
        drafting=drafting,
    )


@settings(max_examples=examples(12), deadline=None)
@given(
    st.integers(1, 23),
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.6, 1.0]),
    st.booleans(),
)
def test_both_simulators_agree_on_two_cards_with_drafts(
    first: int, name: str, together: int, length: int, chance: float, mtp: bool
) -> None:
    one = drafted_on_two_cards(first, together, length, chance, mtp)
    schedule: OffloadSchedule = SCHEDULES[name].with_options(workload__concurrency=together)
    found = one.run(one.resolve(schedule), engine="both", rows=True)
    assert found.engine == "compiled, checked by simpy" and found.timeline is not None
    found.timeline.check()


def test_a_guess_of_several_requests_takes_less_than_each_alone() -> None:
    one = drafted_on_two_cards(12, 3, 2, 0.5, mtp=True)
    schedule = SCHEDULES["resident"].with_options(workload__concurrency=3)
    guess = one.workload(schedule).guess
    assert len(guess) == 3
    assert guess[0].seconds < guess[1].seconds < 2 * guess[0].seconds
    memory = one.memory_breakdown(schedule, cached_experts=0)
    alone = one.memory_breakdown(SCHEDULES["resident"], cached_experts=0)
    assert memory.num_bytes("draft") > alone.num_bytes("draft")  # keys and values of three
