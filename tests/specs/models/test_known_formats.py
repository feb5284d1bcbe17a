"""Names of weight formats as people write them: in reports, and behind `--quant`."""

from __future__ import annotations

import pytest

from moeplan.api.subject import open_subject
from moeplan.base.errors import UnknownName
from moeplan.papers.field.setup import stored_by_name
from moeplan.specs.models.load import load_model
from moeplan.specs.models.mixes.known import USUAL, known_name
from moeplan.specs.schedules.presets import load_preset


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("f16", 16), ("bf16", 16), ("fp8", 8.002), ("W8A8", 8.002), ("W4A16", 4.125), ("AWQ-4bit", 4.156), ("GPTQ-Int4", 4.125),
        ("GPTQ-Int8", 8.002), ("MLX-6bit", 6.5), ("4bit", 4.5), ("mlx-3bit", 3.5), ("exl3_4.25bpw", 4.25), ("EXL2-3.5bpw", 3.5),
        ("QAT-Q4_0", 4.5), ("Q4_0_8_8", 4.5), ("smol-IQ2_KS", 2.217), ("NF4", 4.5), ("UD-Q6_K", 6.5625), ("Q2_K_XL", 2.85),
        ("UD-Q4_K_M", 5), ("q4f16_1", 4.5), ("AutoRound-INT4", 4.125), ("q4_k_m", 4.84375),
    ],
)  # fmt: skip
def test_experts_take_what_the_name_says(name: str, bits: float) -> None:
    experts, _ = stored_by_name(load_model("qwen3-30b-a3b"), name, name)
    assert float(experts.bits_per_weight) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("name", ["Q4_K_M", "UD-Q2_K_XL", "IQ4_KSS", "MXFP4", "IQ3_K_R4", "no such format"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert known_name(name) == name


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("name", [*USUAL, "fp8", "awq", "Q8", "int4", "W8A8", "bf16", "q4_k"])
def test_every_usual_name_is_a_format_to_ask_about(name: str, engine: str) -> None:
    """What reports are read by is what `--quant` takes, and what messages offer."""
    ask = open_subject(
        model="qwen3-30b-a3b", hardware="h100", engine=engine, quant=name, prompt_tokens=16, reply_tokens=2
    )
    stored, _ = stored_by_name(load_model("qwen3-30b-a3b"), name, name)
    found = ask.simulation.expert_format(ask.simulation.resolve(load_preset("resident")))
    assert float(found.bits_per_weight) == pytest.approx(float(stored.bits_per_weight))


def test_a_name_of_no_format_is_answered_with_usual_ones() -> None:
    with pytest.raises(UnknownName, match="Q4_K_M") as error:
        open_subject(
            model="qwen3-30b-a3b", hardware="h100", engine="vllm", quant="Q4", prompt_tokens=16, reply_tokens=2
        )
    assert "AWQ" in str(error.value) and "IQ1_BN" not in str(error.value)
