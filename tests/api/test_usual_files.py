"""Which weight formats an engine is taken to be given where nobody says: those of the files that people find."""

import pytest

from moeplan.api.load import load_model
from moeplan.api.simulate import simulate
from moeplan.api.subject import open_subject
from moeplan.specs.models.mixes.names import mix_names

BOX = "rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB"


def opened(engine: str, **more: object):
    return open_subject(model="gpt-oss-20b", hardware=BOX, engine=engine, prompt_tokens=16, reply_tokens=2, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["llama.cpp", "ik_llama.cpp", "ollama"])
def test_a_checkpoint_of_few_bits_is_the_file_that_is_published_of_it(engine: str) -> None:
    usual, said = opened(engine), opened(engine, quant="MXFP4_MOE")
    assert usual.simulation.model == said.simulation.model
    assert usual.simulation.dense_format == said.simulation.dense_format
    assert usual.asked["quant"] == "MXFP4_MOE" and any("--quant says another" in note for note in usual.notes)
    assert not any("--quant says another" in note for note in said.notes)


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("vllm", {}),
        ("llama.cpp", {"dense_bits": "16"}),
        ("llama.cpp", {"native": False}),
        ("llama.cpp", {"settings": {"experts.bits": "4"}}),
    ],
)
def test_what_is_said_of_formats_counts(engine: str, more: dict) -> None:
    subject = opened(engine, **more)
    assert subject.simulation.model == load_model("gpt-oss-20b") and subject.asked["quant"] is None
    assert subject.simulation.dense_format is not None and subject.simulation.dense_format.name == "16"


def test_other_checkpoints_are_taken_as_they_are_and_the_answer_says_so() -> None:
    subject = open_subject(model="olmoe-1b-7b", hardware=BOX, engine="llama.cpp", prompt_tokens=16, reply_tokens=2)
    (note,) = (note for note in subject.notes if note.startswith("weights as the checkpoint has them"))
    assert "experts 16" in note and note.split()[-1] in mix_names()


def test_ollama_leaves_whole_layers_off_the_card() -> None:
    box = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"
    asked = {"quant": "Q4_K_M", "prompt_tokens": 32, "reply_tokens": 4}
    whole, alone = (simulate("qwen3-30b-a3b", box, engine=engine, **asked) for engine in ("ollama", "llama.cpp"))  # type: ignore[arg-type]
    assert 0 < whole.subject.simulation.layers_off < 48 and alone.subject.simulation.layers_off == 0
    assert any("off the card as a whole" in note for note in whole.subject.notes)
    fast, slow = alone.prediction.metrics.decode_tokens_per_s, whole.prediction.metrics.decode_tokens_per_s
    assert fast is not None and slow is not None and slow < 0.9 * fast
    small = simulate("gpt-oss-20b", box.replace("3060", "3090"), engine="ollama", prompt_tokens=32, reply_tokens=4)
    assert small.subject.simulation.layers_off == 0
