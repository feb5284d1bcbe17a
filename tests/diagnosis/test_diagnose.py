"""Verdicts: one case of each, what nothing can beat, what would help, what fits the gap, and what is shared with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeplan
from moeplan.api.diagnose import diagnose_file, file_document, share
from moeplan.base.errors import DoesNotFit, InputError
from moeplan.diagnosis.calls.read import read_command
from moeplan.diagnosis.case import DECODE, METRICS, PREFILL
from moeplan.diagnosis.ceiling import ceiling_of
from moeplan.diagnosis.origin import Asked, case_of_call
from moeplan.papers.field.predict import predict_report
from moeplan.papers.field.rows import read_reports
from moeplan.reports.diagnosis_words import answer
from moeplan.sim.offload.memory.host import HOST_SHARE
from moeplan.specs.models.load import load_model
from moeplan.specs.models.mixes.published import published_files

MACHINE = "rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB"
COMMAND = "llama-server -ngl 99 --n-cpu-moe 28 -c 16384 -ub 512"


def ask(**changes: object) -> moeplan.Diagnosis:
    given: dict[str, object] = {"command": COMMAND, "prompt_tokens": 4096, "reply_tokens": 256}
    return moeplan.diagnose("gpt-oss-120b", MACHINE, **{**given, **changes})  # type: ignore[arg-type]


def test_a_normal_number() -> None:
    found = ask(measured_decode=25.6)
    one = found.speeds[0]
    assert found.verdict == "normal" and one.low < 25.6 < one.high and found.causes == ()
    assert (
        one.bound == "cpu"
        and one.predicted < one.ceiling.as_placed < (one.ceiling.best_placed or 0) < one.ceiling.any_schedule
    )
    assert found.memory.fits and "quant: MXFP4_MOE, as gpt-oss-120b is published" in found.assumed
    # A file is published in one format only: nothing smaller is offered.
    assert not [change for change in found.changes if change.kind == "file"]


def test_a_slow_number_and_what_has_the_size_of_the_gap() -> None:
    found = ask(measured_decode=14.6, measured_prefill=280.0)
    assert found.verdict == "slow" and [one.verdict for one in found.speeds] == ["slow", "normal"]
    assert found.causes[0].what == "1 of 2 memory channels in use"
    for cause in found.causes:  # each explains what is slow, and leaves alone what is not
        for one in found.speeds:
            predicted, low, high = cause.speeds[one.metric]
            assert low <= one.measured <= high and low < predicted < high
    # A prompt held up by copies is another fault.
    link = ask(measured_decode=30.0, measured_prefill=100.0)
    assert link.verdict == "slow" and {cause.what for cause in link.causes} == {
        "the card in a slot of 4 lanes", "copies from ordinary memory (pageable), which the driver stages",
    }  # fmt: skip


def test_a_number_that_cannot_be() -> None:
    found = ask(measured_decode=55.0)
    assert found.verdict == "faster than believable" and not found.speeds[0].impossible
    assert "drafted tokens: 1.8 a pass at the predicted speed" in [cause.what for cause in found.causes]
    assert ask(measured_decode=500.0).speeds[0].impossible


def test_changes_are_predictions_and_fit_the_card() -> None:
    found = ask(measured_decode=25.6, measured_prefill=280.0)
    gains = [change.request_gain for change in found.changes if change.kind != "hardware"]
    assert gains == sorted(gains, reverse=True) and len(gains) == 3 and gains[-1] > 1.02
    for change in found.changes:
        for metric, gain in ((DECODE, change.decode_gain), (PREFILL, change.prefill_gain)):
            assert change.case.speed(metric) / found.case.speed(metric) == gain
    # The fewest layers on the cores that leave a gigabyte of the card, at the micro-batch that the prompts gain by.
    assert found.changes[0].what == "-ub 4096 -b 4096 --n-cpu-moe 26"
    left = float(found.changes[0].cost.split(" GiB")[0])
    assert 1.0 <= left < 1.0 + 1.9


def test_what_is_shared_is_predicted_alike(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    found = ask(
        measured_decode=25.6, measured_prefill=280.0, command=f"{COMMAND} -t 12 -ctk q8_0 -ctv q8_0", built="2026-03"
    )
    assert share(found, path) == 2 and share(found, path) == 0
    again = [predict_report(report) for report in read_reports(path)]
    assert [(one.value, one.low, one.high, one.bound) for one in again] == [
        (one.predicted, one.low, one.high, one.bound) for one in found.speeds
    ]
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["metric"] for row in rows] == list(METRICS) and COMMAND not in path.read_text("utf-8")
    other = tmp_path / "other.jsonl"
    other.write_text("no reports\n", "utf-8")
    with pytest.raises(InputError, match="no field reports"):
        share(found, other)
    assert other.read_text("utf-8") == "no reports\n"


@pytest.mark.parametrize(
    ("command", "model", "machine", "quant", "kind"),
    [
        ("llama-server -c 16384", "gpt-oss-120b", MACHINE, None, "n-cpu-moe"),
        ("llama-server -c 8192", "gpt-oss-20b", MACHINE, None, "gpu"),
        ("llama-server -ngl 99 -cmoe --no-op-offload", "qwen3-30b-a3b", MACHINE, "Q4_K_M", "cpu-moe"),
        ("llama-server -ngl 20", "qwen3-30b-a3b", MACHINE, "Q4_K_M", "layers"),
        ("llama-server -dev none -t 16", "qwen3-30b-a3b", MACHINE, "Q4_K_M", "cpu"),
        ("llama-server -ngl 99 -ot exps=CPU -fmoe -rtr -mla 3", "deepseek-v2-lite", MACHINE, "Q4_K_M", "cpu-moe"),
        ("vllm serve m --quantization awq", "qwen3-30b-a3b", MACHINE, None, "gpu"),
        ("python -m sglang.launch_server --kt-num-gpu-experts 16 --kt-method AMXINT4", "qwen3-30b-a3b",
        "rtx-4090 + 2 x xeon-platinum-8480+", None,
         "gpu-experts"),
        ("llama-server -ngl 99 -fa on", "gpt-oss-120b", "m3-ultra-256gb", None, "gpu"),
        ("llama-server -ngl 99 -fa on", "gpt-oss-120b", "ryzen-ai-max+-395-128gb", None, "gpu"),
    ],
)  # fmt: skip
def test_nothing_is_predicted_beyond_its_ceiling(
    command: str, model: str, machine: str, quant: str | None, kind: str
) -> None:
    case = case_of_call(read_command(command), Asked(model=model, hardware=machine, quant=quant))
    assert case.kind == kind
    for metric in METRICS:
        ceiling = ceiling_of(case, metric)
        assert 0 < case.speed(metric) < ceiling.as_placed <= ceiling.any_schedule * 1.000001


def test_what_says_too_little_or_too_much_is_refused() -> None:
    with pytest.raises(InputError, match="neither the command nor --model says how qwen3-30b-a3b is stored"):
        moeplan.diagnose("qwen3-30b-a3b", MACHINE, command="llama-server -ngl 99", measured_decode=1.0)
    with pytest.raises(InputError, match="nothing was measured"):
        moeplan.diagnose("gpt-oss-20b", MACHINE, command="llama-server -ngl 99")
    with pytest.raises(InputError, match="less than the 9000 tokens of a request"):
        ask(command="llama-server -ngl 99 -c 8192", prompt_tokens=8744, measured_decode=1.0)
    with pytest.raises(InputError, match="gpt-oss-120b was made for 131072 tokens"):
        ask(command="llama-server -ngl 99 --cpu-moe -c 262144", measured_decode=1.0)
    with pytest.raises(InputError, match="the command runs 512"):
        ask(command="llama-bench -p 512 -n 0 -ngl 99", prompt_tokens=700, measured_prefill=1.0)
    with pytest.raises(DoesNotFit):
        moeplan.diagnose(
            "deepseek-v3",
            "gtx-1650 + ryzen-5-3600 + ddr4-3200x2:768GiB",
            command="llama-server",
            quant="Q4_K_M",
            measured_decode=1.0,
        )


def test_a_host_that_is_too_small_reads_from_the_disk() -> None:
    found = moeplan.diagnose(
        "gpt-oss-120b", "rtx-3060 + ryzen-7-5800x3d + ddr4-3600x2:48GiB", command="llama-server -ngl 99 -cmoe -c 8192", measured_decode=3.0,
    )  # fmt: skip
    one = found.speeds[0]
    assert found.verdict == "normal" and one.bound == "disk" and sum(one.time_share.values()) == pytest.approx(1)
    lacking = found.memory.host_bytes - HOST_SHARE * 48 * 2**30
    said = f"the host's memory lacks {lacking / 2**30:.1f} GiB of what it must hold: predicted as read from a disk"
    assert any(note.startswith(said) for note in found.notes)
    assert "reading from the disk binds" in "\n".join(answer(found.to_dict()))
    # 225 GiB of experts beside 96 GiB of memory: no disk reads 9 GB a token 4.5 times a second, and no file is offered that lacks as much.
    large = moeplan.diagnose(
        "qwen3-235b-a22b", MACHINE, command="llama-server -m x-Q8_0.gguf -ngl 99 --cpu-moe", measured_decode=4.5
    )
    assert large.verdict == "faster than believable" and large.speeds[0].high < 1.5
    named = moeplan.diagnose(
        "gpt-oss-120b",
        "rtx-3060 + ryzen-7-5800x3d + ddr4-3600x2:48GiB + disk:7GB/s",
        command="llama-server -ngl 99 -cmoe",
        measured_decode=3.0,
    )
    assert named.speeds[0].low > one.low and named.speeds[0].high < one.high


def test_layers_off_the_card_lie_in_host_memory() -> None:
    found = moeplan.diagnose(
        "gpt-oss-20b", MACHINE, command="llama-server -m gpt-oss-20b-mxfp4.gguf -ngl 12", measured_decode=30
    )
    assert found.case.host_layers == 12 and found.memory.host_bytes > 5 * 2**30 > found.memory.device_bytes - 3 * 2**30
    assert found.speeds[0].ceiling.as_placed < (found.speeds[0].ceiling.best_placed or 0)


def test_a_fast_prompt_may_have_been_a_longer_one() -> None:
    """Lengths that nobody said are looked at before a prompt cache, whose share is taken from the gap itself."""
    fast = "llama-server -m gpt-oss-120b-mxfp4.gguf -ngl 99 -ncmoe 26 -c 32768 -ub 2048"
    found = moeplan.diagnose("gpt-oss-120b", MACHINE, command=fast, measured_decode=30, measured_prefill=900)
    assert found.verdict == "faster than believable"
    assert found.causes[0].what.startswith("prompts of about ") and "prompt cache" in found.causes[-1].what
    said = moeplan.diagnose(
        "gpt-oss-120b", MACHINE, command=fast, measured_prefill=900, prompt_tokens=512, reply_tokens=128
    )
    assert not any(cause.what.startswith("prompts of about ") for cause in said.causes)


def test_tools_to_look_with_are_those_of_the_card() -> None:
    slow = {"command": "llama-server -m gpt-oss-120b-mxfp4.gguf -ngl 99", "measured_decode": 30.0}
    checks = " ".join(cause.check for cause in moeplan.diagnose("gpt-oss-120b", "strix-halo", **slow).causes)  # type: ignore[arg-type]
    assert "amd-smi" in checks and "nvidia-smi" not in checks


LINES = """| model | size | params | backend | ngl | n_cpu_moe | fa | test | t/s |
| --- | ---: | ---: | --- | --: | --: | -: | --- | ---: |
| gpt-oss 120B MXFP4 MoE | 59.02 GiB | 116.83 B | CUDA | 99 | 28 | 1 | pp512 | 310.11 ± 2.00 |
| gpt-oss 120B MXFP4 MoE | 59.02 GiB | 116.83 B | CUDA | 99 | 28 | 1 | tg128 | 14.05 ± 0.03 |
| gpt-oss 120B MXFP4 MoE | 59.02 GiB | 116.83 B | CUDA | 99 | 28 | 1 | pp512+tg128 | 40.05 ± 0.03 |
"""


def test_lines_of_llama_bench(tmp_path: Path) -> None:
    path = tmp_path / "bench.md"
    path.write_text(LINES, "utf-8")
    found = diagnose_file(path, MACHINE)
    document = file_document(found)
    assert [line["verdict"] for line in document["lines"]] == ["normal", "slow", None]
    assert document["verdict"] == "slow" and document["shown"] == "row 2 (tg128)" and document["causes"]
    assert share([one for _, one in found if one is not None], tmp_path / "mine.jsonl") == 2
    again = [predict_report(report).value for report in read_reports(tmp_path / "mine.jsonl")]
    assert again == [line["predicted"] for line in document["lines"][:2]]


def test_files_that_are_published() -> None:
    assert published_files(load_model("gpt-oss-120b")) == ("MXFP4_MOE",)
    assert published_files(load_model("switch-base-8")) == ()
    every = published_files(load_model("qwen3-30b-a3b"))
    assert {"Q8_0", "Q4_K_M", "UD-Q2_K_XL"} <= set(every)
    # Rows that are no whole blocks: only recipes that say what happens to them. No file above what the checkpoint has.
    assert not [name for name in published_files(load_model("gemma-4-26b-a4b")) if name.startswith("UD-")]
    assert "Q8_0" not in published_files(load_model("kimi-k2.5"))


TWO = "2 x rtx-3090 + epyc-7302 + ddr4-3200x8:256GiB"
FILE = "unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"


def own(command: str, hardware: str = TWO) -> moeplan.Diagnosis:
    return moeplan.diagnose(None, hardware, command=command, measured_decode=60.0)


def test_the_command_names_the_model() -> None:
    found = own(f"llama-server -hf {FILE} -ngl 99 -c 8192 -sm none")
    assert found.case.model.name == "qwen3-30b-a3b" and found.case.quant == "Q4_K_M"
    assert "model: qwen3-30b-a3b, as the command names it" in found.assumed
    for command, said in (
        ("llama-server -ngl 99", "names no model"),
        ("vllm serve foo/bar", "no bundled model's name for certain"),
    ):
        with pytest.raises(InputError, match=said):
            own(command)


def test_cards_that_take_part() -> None:
    one, two, uneven = (
        own(f"llama-server -hf {FILE} -ngl 99 -c 8192 {more}") for more in ("-sm none -mg 1", "", "-ts 3,1")
    )
    assert one.case.profile.num_cards == 1 and two.case.profile.num_cards == uneven.case.profile.num_cards == 2
    shares = [
        len(each.case.setup(DECODE).split.layers_of(0)) if each.case.setup(DECODE).split else 0
        for each in (two, uneven)
    ]
    assert 0 < shares[0] < shares[1]
    for more in ("-ts 1,1,1", "-dev CUDA2", "-sm none -mg 2"):
        with pytest.raises(InputError, match="it has 2"):
            own(f"llama-server -hf {FILE} -ngl 99 {more}")


def test_a_slice_of_every_layer_on_each_card_is_read_at_once() -> None:
    model = "Qwen/Qwen3-30B-A3B-GPTQ-Int4"
    alone, both, stages = (own(f"vllm serve {model} --max-model-len 8192 {more}") for more in ("", "-tp 2", "-pp 2"))
    ceilings = [found.speeds[0].ceiling for found in (alone, both, stages)]
    assert [found.case.profile.num_cards for found in (alone, both, stages)] == [1, 2, 2]
    assert ceilings[1].as_placed == pytest.approx(2 * ceilings[0].as_placed) and ceilings[2].as_placed == pytest.approx(
        ceilings[0].as_placed
    )
    for found, ceiling in zip((alone, both, stages), ceilings, strict=True):
        assert found.speeds[0].predicted < ceiling.as_placed <= ceiling.any_schedule
        assert not [cause for cause in found.causes if "on the cores" in cause.what]  # vLLM puts none there


def test_ollama_leaves_whole_layers_off_the_card() -> None:
    box = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"
    found = own("ollama run qwen3:30b-a3b", box)
    assert found.case.kind == "layers" and 0 < found.case.host_layers < 48 and found.case.context == 4096
    assert found.memory.device_bytes <= found.memory.device_limit_bytes
    assert {"quant: Q4_K_M, as most of ollama's library is", "model: qwen3-30b-a3b, as the command names it"} <= set(
        found.assumed
    )
    assert not [
        change
        for change in found.changes
        if "-ctk" in change.what or (change.kind == "file" and "--n-cpu-moe" in change.what)
    ]
    fits = own("ollama run gpt-oss:20b", "rtx-4090 + ryzen-7-7700x + ddr5-5600x2:64GiB")
    assert fits.case.kind == "gpu" and fits.case.quant == "MXFP4_MOE" and fits.case.context == 32_768
    longer = own("OLLAMA_CONTEXT_LENGTH=32768 ollama run qwen3:30b-a3b", box)
    assert longer.case.host_layers > found.case.host_layers
