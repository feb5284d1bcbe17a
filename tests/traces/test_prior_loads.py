"""Loads for models that nothing was recorded of."""

import numpy as np
import pytest

from moeplan.specs.models.load import load_model
from moeplan.traces.synthesis.loads import ASSUMED, POPULARITY, popularity_of, prior_load


def busiest(name: str, *, prefill: bool) -> float:
    counts = prior_load(load_model(name), prefill=prefill).counts
    return float((counts.max(axis=1) / counts.mean(axis=1)).mean())


@pytest.mark.parametrize("prefill", [True, False])
def test_families_are_as_uneven_as_published(prefill: bool) -> None:
    assert busiest("mixtral-8x7b", prefill=prefill) < 1.35  # nearly even: 1.1 to 1.3 in the paper
    assert 5 < busiest("deepseek-v3", prefill=prefill) < 8.5  # 5.6 to 8.1 in SGLang's recordings
    assert busiest("deepseek-v2-lite", prefill=prefill) < busiest("qwen3-30b-a3b", prefill=prefill)


def test_a_load_has_the_model_s_shape_and_says_what_it_is() -> None:
    model = load_model("deepseek-v3")
    load = prior_load(model, prefill=False)
    assert load.counts.shape == (model.num_moe_layers, model.num_experts) and load.layer_ids == tuple(model.moe_layers)
    assert load.top_k == model.top_k and "no recording" in load.metadata[ASSUMED]
    assert np.array_equal(load.counts, prior_load(model, prefill=False).counts)
    assert not np.array_equal(load.counts, prior_load(model, prefill=True).counts)


def test_a_recorded_load_that_is_named_is_not_scaled() -> None:
    mixtral = load_model("mixtral-8x7b")
    assert popularity_of("decode2k", "decode", mixtral) == POPULARITY["decode"]
    assert popularity_of("", "decode", mixtral).own < POPULARITY["decode"].own / 3
    assert popularity_of("", "decode", load_model("qwen3-235b-a22b")) == POPULARITY["decode"]
