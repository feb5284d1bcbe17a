"""Real models under offloading: what they compute is what plain transformers computes, and their counts are the simulator's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moeplan.calibrate.costs.load import load_costs
from moeplan.executor.model.figures import differences, figures, replayed
from moeplan.executor.model.outcome import ModelRun
from moeplan.executor.model.session import open_model, run_model
from moeplan.sim.offload.forecast import forecast
from moeplan.specs.machines.load import load_machine
from moeplan.specs.schedules.offload import OffloadSchedule

pytest.importorskip("transformers")
from tiny_models import FAMILIES, build, save

PROMPTS = [list(b"def main():"), list(b"It was the best of times")]
NEW = 5
TOLERANCE = 1e-4
SCHEDULE = OffloadSchedule(name="test").with_options(
    cache__policy="lru", cache__experts_per_layer=3, experts__bits="32", predictor__kind="next-gate", predictor__depth=2,
    predictor__width=3, predictor__staging=2, kernel__grouping="per-expert",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def plainly(model: Any, prompts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [T, V] of every pass of plain transformers over the tokens that a run chose."""
    from transformers import DynamicCache

    found = []
    for prompt, mine in zip(prompts, chosen, strict=True):
        cache = DynamicCache(config=model.config)
        for ids in (list(prompt), *([token] for token in mine[:-1])):
            found.append(model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].float())
    return found


def distance(run: ModelRun, expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit."""
    return max(float((one - other).abs().max()) for one, other in zip(run.logits, expected, strict=True))


def check_tokens(run: ModelRun, expected: Sequence[torch.Tensor]) -> None:
    """Tokens are those of plain transformers wherever its two best logits differ by more than the tolerance."""
    passes = iter(expected)
    for token, logits in ((token, next(passes)) for mine in run.tokens for token in mine):
        best = logits[-1].topk(2)
        if float(best.values[0] - best.values[1]) > TOLERANCE:
            assert token == int(best.indices[0])


def check_counts(run: ModelRun, schedule: OffloadSchedule, spec: Any) -> None:
    """A run counts what the simulator counts that replays the run's own recording."""
    assert differences(run, schedule) == []
    outcome = forecast(replayed(run, schedule), spec, load_costs(load_machine("t4"), spec)).outcome
    for name in (
        "hits",
        "hits_guessed",
        "misses",
        "prefetches",
        "prefetches_used",
        "evictions",
        "next_transfer",
        "next_kernel",
    ):
        assert run.counts[name] == outcome.counts[name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(family, tmp_path):
    model = build(family)
    with open_model(save(model, tmp_path / family)) as loaded:
        run = run_model(loaded, SCHEDULE, PROMPTS, max_new_tokens=NEW, keep_logits=True, poison=True)
        spec = loaded.spec
    expected = plainly(model, PROMPTS, run.tokens)
    assert distance(run, expected) <= TOLERANCE
    check_tokens(run, expected)
    with torch.no_grad():  # experts count: without them the same comparison would not hold
        for name, tensor in model.named_parameters():
            if name.endswith("experts.down_proj"):
                tensor.zero_()
    assert distance(run, plainly(model, PROMPTS, run.tokens)) > 100 * TOLERANCE
    check_counts(run, SCHEDULE, spec)
    assert run.counts.misses > 0 and run.counts.prefetches_used > 0 and run.counts.evictions > 0
    told = figures(run, SCHEDULE)
    assert told["replay_differences"] == [] and 0 < told["hit_rate"] < 1 and 0 < told["recall"] <= 1
