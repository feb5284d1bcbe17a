"""What the demo answers before anything is measured: three placements of a model that does not fit, beside hand arithmetic."""

from __future__ import annotations

import json

import pytest

from moeplan.base.units import GIB
from moeplan.commands.parts import first_question
from moeplan.commands.parts.first_question import Answer, first_answer
from moeplan.specs.models import quantised_as, weight_format
from moeplan.specs.models.load import load_model


@pytest.fixture(scope="module")
def answer() -> Answer:
    return first_answer()


def test_what_does_not_fit_is_short_by_what_memory_says(answer: Answer) -> None:
    assert 59 * GIB < answer.resident_bytes < 61 * GIB  # its file is 63.4 GB, and caches and the runtime come on top
    assert answer.missing_bytes == answer.resident_bytes - 24 * GIB


def test_one_layer_more_would_not_fit(answer: Answer) -> None:
    model = load_model(first_question.MODEL)
    layer = model.num_experts * model.expert_bytes(quantised_as(first_question.QUANT, None, model)[0])
    held = answer.rows[-1][1].memory_breakdown.device_bytes
    assert held <= 24 * GIB < held + layer
    assert answer.rows[-1][1].memory_breakdown.num_bytes("expert store") == answer.cpu_layers * layer


def test_the_more_on_the_card_the_faster_and_main_memory_binds(answer: Answer) -> None:
    on_cores, split = (one.metrics for _, one in answer.rows)
    assert on_cores.bound == split.bound == "cpu"
    assert on_cores.decode_tokens_per_s is not None and split.decode_tokens_per_s is not None
    assert on_cores.decode_tokens_per_s < split.decode_tokens_per_s
    # Experts of a token over the theoretical bandwidth of two sticks of DDR5-5600 is a ceiling that no engine reaches.
    model = load_model(first_question.MODEL)
    read = model.num_moe_layers * model.top_k * model.expert_bytes(weight_format("MXFP4"))
    assert 0.3 < on_cores.decode_tokens_per_s * read / 89.6e9 < 1


def test_it_is_said_in_words_on_a_page_and_as_values(answer: Answer) -> None:
    words, page = "\n".join(answer.lines()), answer.page()
    document = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    for text in ("does not fit", f"--n-cpu-moe {answer.cpu_layers}", "likely", "moeplan simulate"):
        assert text in words and text in page
    low, high = document["rows"][-1]["decode_tokens_per_s_interval"]
    assert low < document["rows"][-1]["decode_tokens_per_s"] < high
