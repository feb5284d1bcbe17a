"""What a machine can run: memory that is there, speeds in order, one line for what cannot be asked."""

from __future__ import annotations

import json
import sys

import pytest

from moeplan.api.fit import ENGINES, FORMATS, fit
from moeplan.api.load import load_machine
from moeplan.base.errors import InputError, UnknownName
from moeplan.base.units import GIB
from moeplan.cli import main
from moeplan.planner.emit.engines.llamacpp_commands import SERVER

SMALL = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:32GiB"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["moeplan", "fit", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    done = capsys.readouterr()
    return int(stop.value.code or 0), done.out, done.err


def test_fewer_bits_need_less_memory_and_are_faster() -> None:
    found = fit(SMALL, model="qwen3-30b-a3b", context=4096)
    assert [one.quant for one in found.rows] == [*FORMATS] and not found.left_out
    for one, next_one in zip(found.rows, found.rows[1:], strict=False):
        assert one.bits_per_weight > next_one.bits_per_weight and one.host_layers >= next_one.host_layers
        assert one.decode_tokens_per_s < next_one.decode_tokens_per_s
    for one in found.rows:
        assert one.device_bytes <= 11 * GIB and one.host_bytes <= 32 * GIB
        low, high = one.decode_tokens_per_s_interval
        assert low < one.decode_tokens_per_s < high
        assert {word for word in one.command.split() if word.startswith("--")} <= set(SERVER.flags)
        assert (f"--n-cpu-moe {one.host_layers}" in one.command) == bool(one.host_layers)


def test_what_is_too_slow_or_too_large_is_left_out_with_its_reason() -> None:
    fast = fit(SMALL, model="qwen3-30b-a3b", context=4096, min_decode=60.0)
    assert 0 < len(fast.rows) < len(FORMATS) and all(one.decode_tokens_per_s >= 60 for one in fast.rows)
    large = fit(SMALL, model="deepseek-v3")
    assert not large.rows and "host" in large.left_out["deepseek-v3"]


def test_one_memory_is_not_divided() -> None:
    found = fit("Mac M2 Ultra 192GB", model="gpt-oss-120b")
    (one,) = found.rows
    assert one.host_layers == 0 and one.device_bytes > 60 * GIB and "--n-cpu-moe" not in one.command


def test_the_command_prints_rows_or_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--hardware", SMALL, "--model", "gpt-oss-20b", "--context", "8192")
    assert status == 0 and "MXFP4_MOE" in out and "llama-server --model MODEL.gguf --ctx-size 8192" in out
    status, out, _ = call(capsys, "--hardware", SMALL, "--model", "gpt-oss-20b", "--json")
    assert status == 0 and json.loads(out)["rows"][0]["model"] == "gpt-oss-20b"
    status, out, err = call(capsys, "--hardware", SMALL, "--model", "deepseek-v3")
    assert (status, out) == (3, "") and "does not fit" in err.splitlines()[-1]


@pytest.mark.parametrize("engine", ["vllm", "lama.cpp"])
def test_other_engines_are_refused(engine: str) -> None:
    assert engine not in ENGINES
    with pytest.raises(UnknownName, match="--engine"):
        fit(SMALL, engine=engine)


def test_a_whole_machine_has_no_engine_to_place_for() -> None:
    with pytest.raises(InputError, match="--engine"):
        fit(load_machine("t4"), model="olmoe-1b-7b")
