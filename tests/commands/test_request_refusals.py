"""What commands about requests and engines refuse: one line with the option, its value and what would do; exit 2 or 3, nothing written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moeplan.cli import main

MACHINE = "rtx-3060 + ryzen-5-5600x + ddr4-3200x2:32GiB"
PLAN = ("plan", "--model", "gpt-oss-20b", "--hardware", MACHINE, "--for", "llama.cpp")
SHORT = ("--prompt-tokens", "20", "--reply-tokens", "10")
FIT = ("fit", "--hardware", MACHINE, "--model", "gpt-oss-20b")
DIAGNOSE = ("diagnose", "--hardware", MACHINE, "--model", "gpt-oss-20b", "--command")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((*PLAN, "--prompt-tokens", "0", "--reply-tokens", "0"), 2, "--reply-tokens = 0: a request without any token"),
        ((*PLAN, "--prompt-tokens", "200000", "--reply-tokens", "1"), 2, "was made for 131072 tokens of context"),
        ((*PLAN, "--context", "999999"), 2, "--context = 999999: gpt-oss-20b was made for 131072 tokens"),
        ((*PLAN, *SHORT, "--context", "25"), 2, "shorter than the longest request, 30 tokens; give at least 30"),
        ((*PLAN, *SHORT, "--ttft", "1us"), 3, "no schedule keeps --ttft 0.001ms; "),
        ((*PLAN, *SHORT, "--tpot", "soon"), 2, "--tpot = 'soon'"),
        ((*PLAN, *SHORT, "--kv-type", "f16,q9_0"), 2, "--kv-type = 'q9_0': llama.cpp has "),
        ((*PLAN, *SHORT, "--kv-type", "f16,"), 2, "--kv-type = 'f16,': a type is missing"),
        ((*PLAN, *SHORT, "--engine", "vllm"), 2, "--for llama.cpp plans for llama.cpp"),
        ((*PLAN, *SHORT, "--ubatch", "0"), 2, "--ubatch = 0: not a whole number from 1"),
        ((*PLAN, *SHORT, "--reserve", "12GiB"), 2, "reserve less"),
        ((*PLAN[:-1], "lama.cpp", *SHORT), 2, "did you mean 'llama.cpp'?"),
        (("plan", "--model", "tiny-moe", "--hardware", "rtx-3060", "--trace", "bundled", "--prompt-tokens", "99999"), 2,
         "the recording has 3143 tokens of prompts"),
        ((*FIT, "--min-decode", "99999"), 3, "MXFP4_MOE generates "),
        ((*FIT, "--engine", "vllm"), 2, "not one of: ik_llama.cpp, llama.cpp"),
        ((*FIT, "--context", "1"), 2, "--context = 1: not a whole number from 64"),
        ((*DIAGNOSE, "llama-server --n-cpu-mo 3", "--measured-decode", "9"), 2, "did you mean --n-cpu-moe?"),
        ((*DIAGNOSE, "llama-server -cmoe -ncmoe 3", "--measured-decode", "9"), 2, "keep one of the two"),
        ((*DIAGNOSE, "llama-server -ngl 99"), 2, "nothing was measured"),
        ((*DIAGNOSE, "llama-server -c 999999", "--measured-decode", "9"), 2, "was made for 131072 tokens"),
        ((*DIAGNOSE, "llama-server -c 256", "--measured-decode", "9", "--prompt-tokens", "512"), 2, "less than the 640 tokens"),
        (("emit", "absent.json"), 2, "no such file"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    arguments: tuple[str, ...],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    done = capsys.readouterr()
    line = done.err.strip().splitlines()[-1]
    assert stop.value.code == status and said in line and line.startswith("moeplan: ") and done.out == ""
    assert sum(each.startswith("moeplan: ") and "compiling" not in each for each in done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
