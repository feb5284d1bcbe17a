"""How many tokens an expert-parallel plan drafts: chosen by generated tokens a second, none included, and what its files then say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from moeplan.api.plan import plan
from moeplan.base.errors import InputError
from moeplan.planner.emit.targets import render
from moeplan.planner.parallel.case import ParallelRequest
from moeplan.planner.parallel.drafts import lengths_of
from moeplan.planner.parallel.plan import ParallelPlan
from moeplan.reports.parallel.serving import drafting_section
from moeplan.specs.drafting import read_acceptance, tokens_per_step
from moeplan.specs.models.load import load_model
from moeplan.traces.lengths import RequestLengths
from moeplan.traces.synthesis.prior import prior_recording

MODEL = dataclasses.replace(load_model("deepseek-v3"), num_layers=5, moe_layers=(3, 4))
MACHINE = "h200-sxm"


@pytest.fixture(scope="module")
def recording():
    return prior_recording(MODEL, RequestLengths.alike(prompt_tokens=32, reply_tokens=64, requests=8))


def planned(recording, acceptance: str, target: str | None = None, **more: object) -> ParallelPlan:
    request = ParallelRequest(
        speculative=True, acceptance=acceptance, concurrency=64, search_moves=0, num_redundant=None, context_tokens=512, **more
    )  # fmt: skip
    return plan(MODEL, MACHINE, trace=recording, request=request, target=target)


def test_the_draft_length_follows_the_acceptance_and_none_is_an_answer(recording) -> None:
    pays, costs = (planned(recording, each, draft_tokens=3) for each in ("0.9", "0.02"))
    assert pays.request.draft_tokens > 0 and costs.request.draft_tokens == 0
    for each, acceptance in ((pays, "0.9"), (costs, "0.02")):
        drafting = each.to_dict()["drafting"]
        rows = {row["length"]: row for row in drafting["tried"]}
        assert sorted(rows) == [0, 1, 2, 3] and drafting["length"] == each.request.draft_tokens and rows[0]["searched"]
        for length, row in rows.items():
            yielded = tokens_per_step(length, read_acceptance(acceptance))
            assert row["tokens_per_step"] == pytest.approx(yielded)
            assert row["tokens_per_s"] == pytest.approx(64 * yielded / row["step_s"], rel=1e-6)
        best = max((row for row in rows.values() if row["searched"]), key=lambda row: row["tokens_per_s"])
        assert best["length"] == each.request.draft_tokens or best["tokens_per_s"] < rows[0]["tokens_per_s"] * 1.03
    drafted = plan(MODEL, MACHINE, trace=recording, request=dataclasses.replace(
        pays.request, speculative=False, num_redundant=None))  # fmt: skip
    assert drafted.best.step_s == pytest.approx(pays.best.step_s), "the plan is that of the length that was chosen"
    assert drafting_section(pays.to_dict()) and not drafting_section(drafted.to_dict())


def test_a_length_pays_from_the_acceptance_at_which_a_step_yields_what_it_costs(recording) -> None:
    drafting = planned(recording, "0.9", draft_tokens=2).to_dict()["drafting"]
    plain, one, _ = drafting["tried"]
    assert one["pays_from"] == pytest.approx(max(0.0, one["step_s"] / plain["step_s"] - 1), abs=1e-9)


def test_engines_are_told_to_draft_so(recording) -> None:
    found = planned(recording, "0.9", target="sglang", draft_tokens=2)
    document = json.loads(json.dumps(found.to_dict()))
    length = document["request"]["draft_tokens"]
    flags = render(document, "sglang", MODEL).files["flags.txt"].splitlines()
    assert f"--speculative-num-steps {length}" in flags and f"--speculative-num-draft-tokens {length + 1}" in flags
    told = render(document, "vllm", MODEL).files["flags.txt"]
    assert f'--speculative-config \'{{"method": "mtp", "num_speculative_tokens": {length}}}\'' in told
    files = render(document, "trtllm", MODEL).files
    options = yaml.safe_load(files["extra_llm_api_options.yaml"])
    assert options["speculative_config"] == {"decoding_type": "MTP", "num_nextn_predict_layers": length}
    if "moe_load_balancer.yaml" in files:
        assert MODEL.num_layers in yaml.safe_load(files["moe_load_balancer.yaml"])["initial_global_assignments"]
    assert any("which these files do not ask for" in line for line in render(document, "vllm-ascend", MODEL).usage)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"acceptance": None}, "how many drafts are accepted is not said"),
        ({"acceptance": "1.5"}, "outside 0..1"),
        ({"acceptance": "0.8,0.6", "draft_tokens": 5}, "acceptance is known for 2 positions"),
        ({"prefill": True}, "nothing is drafted for prompts"),
    ],
)
def test_what_cannot_be_drafted_is_refused(recording, changes: dict[str, object], says: str) -> None:
    asked = {"acceptance": "0.8", "speculative": True} | changes
    with pytest.raises(InputError, match=says):
        plan(MODEL, MACHINE, trace=recording, request=ParallelRequest(**asked))


def test_models_without_a_draft_layer_are_refused() -> None:
    model = load_model("qwen3-30b-a3b")
    trace = prior_recording(model, RequestLengths.alike(prompt_tokens=4, reply_tokens=4, requests=1))
    with pytest.raises(InputError, match="no draft"):
        plan(model, MACHINE, trace=trace, request=ParallelRequest(speculative=True, acceptance="0.8"))


def test_lengths_reach_as_far_as_the_acceptance_is_known() -> None:
    assert lengths_of(ParallelRequest(speculative=True, acceptance="0.8")) == (1, 2, 3, 4, 5, 6, 8)
    assert lengths_of(ParallelRequest(speculative=True, acceptance="0.8,0.7,0.6,0.5,0.4,0.3,0.2")) == (
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    )
    assert lengths_of(ParallelRequest(speculative=True, acceptance="0.8", draft_tokens=10))[-1] == 10
