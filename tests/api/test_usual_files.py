"""Which weight formats an engine is taken to be given where nobody says: those of the files that people find."""

import pytest

from moeplan.api.load import load_model
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
