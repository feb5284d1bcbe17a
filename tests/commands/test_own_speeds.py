"""What a person's own measured speeds make of a machine, and each beside its prediction, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench_writers import FORMATS, as_csv, as_json, entry, latency, serve
from moeplan.base.errors import MoeplanError
from moeplan.calibrate.imports.llama_bench import read_llama_bench
from moeplan.commands.app import app
from moeplan.papers.field.own.lines import open_own, predict_own
from moeplan.specs.machines.profile_file import load_hardware

PARTS = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
OSS = {"model_type": "gpt-oss 20B MXFP4 MoE", "model_size": 12109566560, "model_n_params": 20914757184}


def command(*arguments: str) -> tuple[int, Any, str]:
    """Return (exit status, JSON document, message of the error)."""
    found = CliRunner().invoke(app, [*arguments, "--json"])
    if isinstance(found.exception, MoeplanError):
        return found.exception.exit_status, None, str(found.exception)
    assert found.exit_code == 0, found.output
    return 0, json.loads(found.stdout), ""


def written(folder: Path, text: str, name: str = "bench.json") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def predicted(tests: list[dict[str, str]], **options: Any) -> list[float]:
    """Return what is predicted for tests, whatever was measured."""
    own = open_own("llama-bench", read_llama_bench(as_json(tests)), hardware=PARTS, **options)
    return [predict_own(one, own.profile).value for one in own.lines]


def faster(tests: list[dict[str, Any]], factor: float) -> list[dict[str, str]]:
    """Return the tests with speeds that are `factor` times their predictions."""
    values = predicted([entry(**test) for test in tests])
    return [entry(**(test | {"speed": value * factor})) for test, value in zip(tests, values, strict=True)]


@pytest.mark.parametrize(("form", "factor"), [("json", 0.7), ("md", 1.35)])
def test_two_lines_move_what_is_predicted_of_other_work(form: str, factor: float, tmp_path: Path) -> None:
    """The card that is so much slower or faster than thought is so for another model and at other depths too."""
    file = written(tmp_path, FORMATS[form](faster([{"prompt": 512}, {"gen": 128}], factor)), f"two.{form}")
    status, learned, _ = command(
        "calibrate", "--from", "llama-bench", file, "--hardware", PARTS, "-o", str(tmp_path / "my.json")
    )
    assert status == 0
    assert (learned["num_measurements"], learned["degrees_of_freedom"]) == (2, 2)
    assert learned["median_error_after"] < learned["median_error_before"] / 3
    others = faster([{"gen": 128, "depth": 4096}, {"prompt": 2048}, {"gen": 64} | OSS, {"prompt": 512} | OSS], factor)
    file = written(tmp_path, as_json(others), "others.json")
    _, before, _ = command("validate", "--from", "llama-bench", file, "--hardware", PARTS)
    _, after, _ = command("validate", "--from", "llama-bench", file, "--hardware", str(tmp_path / "my.json"))
    assert after["median_relative_error"] < before["median_relative_error"] / 2
    for one, other in zip(before["rows"], after["rows"], strict=True):
        assert other["inside"]
        assert (other["high"] - other["low"]) / other["predicted"] < 0.8 * (one["high"] - one["low"]) / one["predicted"]


def test_what_was_measured_says_so_and_what_was_not_stays(tmp_path: Path) -> None:
    file = written(tmp_path, as_json(faster([{"gen": 128}], 1.2)))
    out = tmp_path / "my.json"
    _, document, _ = command("calibrate", "--from", "llama-bench", file, "--hardware", PARTS, "-o", str(out))
    profile = load_hardware(out)
    constants = dict(profile.constants())
    moved = constants["engine.layer_s"]
    assert moved.source == "measured"
    assert "bench.json" in moved.citation
    assert document["sha256"] in moved.citation
    assert "1 lines" in moved.citation
    for name in (
        "host.cpu.memory_bytes_per_s",
        "device.memory_bytes_per_s",
        "device.peak_flops_per_s.float16",
        "engine.expert_efficiency",
    ):
        assert constants[name].source != "measured"
        assert name not in document["changed"]
    status, _, error = command(
        "calibrate", "--from", "llama-bench", file, "--hardware", str(out), "-o", str(tmp_path / "twice.json")
    )
    assert (status, "already" in error) == (2, True)


def test_more_lines_make_surer_and_contradictions_less_sure(tmp_path: Path) -> None:
    def widths(tests: list[dict[str, str]], name: str) -> tuple[float, Any]:
        file = written(tmp_path, as_json(tests), name)
        _, document, _ = command(
            "calibrate", "--from", "llama-bench", file, "--hardware", PARTS, "-o", str(tmp_path / f"p-{name}")
        )
        return dict(load_hardware(tmp_path / f"p-{name}").constants())["engine.layer_s"].relative_uncertainty, document

    few = faster([{"gen": 128}], 1.1)
    many = faster([{"gen": 128}, {"gen": 128, "depth": 4096}, {"gen": 128, "depth": 512}, {"gen": 64} | OSS], 1.1)
    (one, _), (four, agreeing) = widths(few, "few.json"), widths(many, "many.json")
    assert four < one
    assert agreeing["widened"] == 1
    spread = [entry(**test) for test in ({"gen": 128, "speed": 60.0}, {"gen": 128, "speed": 400.0})]
    wide, contradicting = widths(spread, "spread.json")
    assert contradicting["widened"] > 1
    assert contradicting["chi_square"] > contradicting["degrees_of_freedom"]
    assert wide > one
    assert any("contradict" in warning for warning in contradicting["warnings"])


def test_a_moved_machine_composes_like_any_other(tmp_path: Path) -> None:
    file = written(tmp_path, as_json(faster([{"prompt": 512}, {"gen": 128}], 1.3)))
    out = str(tmp_path / "my.json")
    command("calibrate", "--from", "llama-bench", file, "--hardware", PARTS, "-o", out)
    asked = ("--model", "qwen3-30b-a3b", "--quant", "Q4_K_M", "--prompt-tokens", "512", "--reply-tokens", "32")
    _, before, _ = command("simulate", "--hardware", PARTS, *asked)
    _, after, _ = command("simulate", "--hardware", out, *asked)
    for name in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        assert after[name] / before[name] == pytest.approx(1.3, rel=0.1)


def test_lines_are_predicted_as_the_same_request_is(tmp_path: Path) -> None:
    (value,) = predicted([entry(prompt=512)])
    _, document, _ = command("simulate", "--hardware", PARTS, "--model", "qwen3-30b-a3b", "--quant", "Q4_K_M", "--prompt-tokens", "512",
                             "--reply-tokens", "0")  # fmt: skip
    assert value == pytest.approx(document["prefill_tokens_per_s"], rel=0.02)


def test_where_experts_are_is_read_from_the_flags() -> None:
    def schedules(**values: Any) -> list[str]:
        own = open_own("llama-bench", read_llama_bench(as_json([entry(gen=128, **values)])), hardware=PARTS)
        return [setup.schedule.name for one in own.lines for _, setup in one.parts]

    assert schedules() == ["resident"]
    assert schedules(n_cpu_moe=99) == ["cpu-moe"]
    assert schedules(tensor_buft_overrides="\\.ffn_.*_exps\\.=CPU") == ["cpu-moe"]
    some = predicted([entry(gen=128, n_cpu_moe=2)])
    assert some == predicted([entry(gen=128, tensor_buft_overrides="blk\\.[01]\\.ffn_.*_exps\\.=CPU")])
    assert predicted([entry(gen=128)])[0] > some[0] > predicted([entry(gen=128, n_cpu_moe=30)])[0]
    uploads, cores = (predicted([entry(prompt=512, n_cpu_moe=48, no_op_offload=flag)])[0] for flag in (0, 1))
    assert uploads != cores


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({}, ("--model", "gpt-oss-120b"), "not gpt-oss-120b"), ({}, ("--model", "qwen3-235b-a22b"), "30.53 B"),
        ({}, ("--quant", "Q8_0"), "GiB"), ({}, ("--quant", "Q4_X"), "--quant"), ({}, ("--engine", "vllm"), "--engine"),
        ({"fused_moe": 1}, ("--engine", "llama.cpp"), "ik_llama.cpp"), ({"gpu_info": "NVIDIA GeForce RTX 3090"}, (), "RTX 3090"),
        ({"cpu_info": "AMD EPYC 9355 32-Core Processor"}, (), "9355"), ({"backends": "CPU", "gpu_info": ""}, (), "cpu"),
        ({"n_gpu_layers": 12}, (), "12 of 48"), ({"model_type": "llama 7B Q4_0", "model_n_params": 6738415616}, (), "--model"),
        ({"type_k": "q9_9"}, (), "q9_9"), ({"tensor_buft_overrides": "(a+)+$=CPU"}, (), "involved"),
        ({"tensor_buft_overrides": "([=CPU"}, (), "none"), ({"tensor_buft_overrides": ".*=CPU"}, (), "more than experts"),
        ({"model_type": "qwen3moe 30B.A3B Q9_Z", "model_size": ""}, (), "Q9_Z"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line_and_nothing_is_written(
    values: dict[str, Any], options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    file = written(tmp_path, as_csv([entry(gen=128, **values)]))
    out = tmp_path / "my.json"
    for verb in (("calibrate", "-o", str(out)), ("validate",)):
        status, _, error = command(*verb, "--from", "llama-bench", file, "--hardware", PARTS, *options)
        assert status == 2
        assert words in error
        assert "\n" not in error
        assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_validation_fails_over_its_limits(tmp_path: Path) -> None:
    # 20 % off, inside the interval; one of three lines is not predicted, so two thirds of what was measured are held.
    lines = [*faster([{"gen": 128}, {"prompt": 512}], 1.25), entry(gen=64, n_gpu_layers=3)]
    file = written(tmp_path, as_json(lines))
    out = tmp_path / "out.json"
    for limits, status, words in (
        ((), 0, ()),
        (("--fail-over", "25%", "--min-coverage", "0.6"), 0, ()),
        (("--fail-over", "15%"), 1, ("20.00%",)),
        (("--min-coverage", "70%"), 1, ("66.67%",)),
        (("--fail-over", "0", "--min-coverage", "100%"), 1, ("20.00%", "66.67%")),
    ):
        asked = ("validate", "--from", "llama-bench", file, "--hardware", PARTS, *limits, "-o", str(out))
        found = CliRunner().invoke(app, [*asked, "--json"])
        document = json.loads(found.stdout)
        assert found.exit_code == status and document == json.loads(out.read_text("utf-8")), limits
        assert len(document["failed"]) == len(words)
        assert all(word in line for word, line in zip(words, document["failed"], strict=True))
        plain = CliRunner().invoke(app, [*asked])
        assert plain.exit_code == status and plain.stdout.count("FAILED: ") == len(words)
    for wrong in ("110%", "-1", "10 points"):
        assert command("validate", "--from", "llama-bench", file, "--hardware", PARTS, "--fail-over", wrong)[0] == 2


def test_lines_of_other_models_are_left_out_and_said(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        as_json([entry(gen=128, speed=150.0), entry(gen=128, speed=200.0, **OSS), entry(gen=64, n_gpu_layers=3)]),
    )
    _, document, _ = command("validate", "--from", "llama-bench", file, "--hardware", PARTS)
    assert [row["model"] for row in document["rows"][:2]] == ["qwen3-30b-a3b", "gpt-oss-20b"]
    assert (document["num_lines"], document["num_predicted"]) == (3, 2)
    _, document, _ = command("validate", "--from", "llama-bench", file, "--hardware", PARTS, "--model", "gpt-oss-20b")
    assert [row["predicted"] is None for row in document["rows"]] == [True, False, True]


def test_cores_alone_move_what_is_believed_of_the_cores(tmp_path: Path) -> None:
    cores = {"backends": "CPU", "gpu_info": "", "n_gpu_layers": 0}
    parts = "ryzen-9-7950x + ddr5-6000x2:64GiB"
    own = open_own("llama-bench", read_llama_bench(as_json([entry(gen=32, **cores)])), hardware=parts)
    value = predict_own(own.lines[0], own.profile).value
    file = written(tmp_path, FORMATS["md"]([entry(gen=32, speed=value * 1.2, **cores)]))
    out = tmp_path / "my.json"
    _, document, _ = command("calibrate", "--from", "llama-bench", file, "--hardware", parts, "-o", str(out))
    assert document["median_error_after"] < 0.1
    constants = dict(load_hardware(out).constants())
    assert constants["device.memory_bytes_per_s"].value == constants["host.cpu.memory_bytes_per_s"].value


def test_vllm_results_move_a_card(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps(serve(concurrency=1, ttft_ms=90.0, itl_ms=9.0)))
    card = "h100 + epyc-9355 + ddr5-6000x12:768GiB"
    out = str(tmp_path / "my.json")
    status, document, error = command("calibrate", "--from", "vllm-bench", file, "--hardware", card, "-o", out)
    assert status == 0, error
    assert [row["model"] for row in document["lines"]] == ["qwen3-30b-a3b"] * 2
    assert document["median_error_after"] < document["median_error_before"]
    assert document["kernels"]["kernels.experts"] > 1
    kernels = load_hardware(out).kernels
    assert kernels is not None
    assert document["sha256"] in kernels.citation
    _, again, _ = command("validate", "--from", "vllm-bench", file, "--hardware", out)
    assert [row["predicted"] for row in again["rows"]] == pytest.approx(
        [row["after"] for row in document["lines"]], rel=1e-3
    )
    status, _, error = command(
        "calibrate", "--from", "vllm-bench", file, "--hardware", card, "-o", out, "--model", "gpt-oss-20b"
    )
    assert (status, "gpt-oss-20b" in error) == (2, True)


def test_vllm_latency_is_compared_with_lengths_of_the_command_line(tmp_path: Path) -> None:
    file = written(tmp_path, latency([1.6, 1.5, 1.7]))
    card, lengths = "h100", ("--prompt-tokens", "512", "--reply-tokens", "128", "--concurrency", "4")
    _, document, _ = command(
        "validate", "--from", "vllm-bench", file, "--hardware", card, "--model", "qwen3-30b-a3b", *lengths
    )
    assert document["num_predicted"] == 1
    status, _, error = command("validate", "--from", "vllm-bench", file, "--hardware", card, "--model", "qwen3-30b-a3b")
    assert (status, "--prompt-tokens" in error) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "--from", "nvbandwidth"), ("validate", "--from", "llama-bench", "--steps", "3"),
        ("validate", "--from", "llama-bench", "--device", "cpu"), ("calibrate", "--from", "llama-bench", "--quick"),
        ("calibrate", "--from", "llama-bench", "--prompt-tokens", "3"), ("calibrate", "--from", "llama-bench", "--samples", "s.json"),
        ("calibrate", "--quant", "Q4_K_M"), ("validate", "--hardware", PARTS),
    ],
)  # fmt: skip
def test_options_count_or_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    verb, *rest = arguments
    if "--from" in rest:
        rest.insert(2, written(tmp_path, as_json([entry(gen=128)])))
        rest += ["--hardware", PARTS]
    status, _, error = command(verb, *rest)
    assert status == 2
    assert error
