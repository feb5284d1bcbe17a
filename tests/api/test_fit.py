"""What a machine can run: memory that is there, speeds in order, one line for what cannot be asked."""

from __future__ import annotations

import json
import sys

import pytest

from moeplan import plan
from moeplan.api.fit import ABOUT_FOUR_BITS, ENGINES, fit
from moeplan.api.load import load_machine
from moeplan.base.errors import InputError, UnknownName
from moeplan.base.units import GIB
from moeplan.cli import main
from moeplan.planner.emit.engines.llamacpp_commands import SERVER
from moeplan.specs.models.load import load_model
from moeplan.specs.models.mixes.published import published_files

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
    published = published_files(load_model("qwen3-30b-a3b"))
    names = [one.quant for one in found.rows]
    # Each name once, in the publishers' order; those that store no fewer bits than a larger one are left out.
    assert len(names) > 6 and names == [name for name in published if name in names] and not found.left_out
    for one, next_one in zip(found.rows, found.rows[1:], strict=False):
        assert one.bits_per_weight > next_one.bits_per_weight and one.host_layers >= next_one.host_layers
    for one in found.rows:
        assert one.device_bytes <= 11 * GIB and one.host_bytes <= 32 * GIB
        low, high = one.decode_tokens_per_s_interval
        assert low < one.decode_tokens_per_s < high
        assert {word for word in one.command.split() if word.startswith("--")} <= set(SERVER.flags)
        assert (f"--n-cpu-moe {one.host_layers}" in one.command) == bool(one.host_layers)
        # Each micro-batch copies or computes what lies in host memory anew: the larger one pays where anything does.
        assert ("--ubatch-size 2048" in one.command) == bool(one.host_layers) and not one.from_disk


def test_what_is_too_slow_or_too_large_is_left_out_with_its_reason() -> None:
    fast = fit(SMALL, model="qwen3-30b-a3b", context=4096, min_decode=60.0)
    assert 0 < len(fast.rows) < 10 and all(one.decode_tokens_per_s >= 60 for one in fast.rows)
    large = fit(SMALL, model="deepseek-v3")
    assert not large.rows and "host" in large.left_out["deepseek-v3"]


def test_of_every_model_the_largest_formats_worth_showing_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.api.fit.list_models", lambda: ["gpt-oss-20b", "jamba-1.5-mini", "qwen3-30b-a3b"])
    found = fit(SMALL, context=4096)
    rows = [one for one in found.rows if one.model == "qwen3-30b-a3b"]
    alone = fit(SMALL, model="qwen3-30b-a3b", context=4096).rows
    assert rows[0] == alone[0] and len(rows) <= 3
    assert rows[-1] == next(one for one in alone if one.host_layers == 0)
    assert next(one for one in alone if one.bits_per_weight <= ABOUT_FOUR_BITS) in rows
    assert [one.quant for one in found.rows if one.model == "gpt-oss-20b"] == ["MXFP4_MOE"]
    assert "no file of it is published" in found.left_out["jamba-1.5-mini"]


def test_what_is_paged_from_a_disk_says_so() -> None:
    found = fit("rtx-3060 + ryzen-7-7700x + ddr5-5600x2:32GiB + disk:7GB/s", model="gpt-oss-120b", context=4096)
    (one,) = found.rows
    assert one.from_disk and one.placement.endswith("paged from disk") and one.bound == "disk"


def test_tables_beside_experts_must_have_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.api.fit.published_files", lambda model: ("Q6_K", "IQ4_XS", "UD-IQ2_M"))
    machine = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
    alone = fit(machine, model="qwen3.8-flash-next").rows
    assert alone and all(one.host_bytes <= 0.88 * 64 * GIB and not one.from_disk for one in alone)
    shared = fit("strix-halo-128gb", model="qwen3.8-flash-next").rows  # 39.6 GiB of tables beside everything else
    assert shared and all(one.device_bytes + one.host_bytes <= 128 * GIB for one in shared)
    paged = fit(f"{machine} + disk:7GB/s", model="qwen3.8-flash-next").rows
    assert any(one.from_disk and "disk" in one.placement for one in paged) and len(paged) >= len(alone)


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


@pytest.mark.parametrize(
    ("cards", "model"),
    [("2x3090", "gpt-oss-120b"), ("2x3090", "qwen3-30b-a3b"), ("3090 + 3060", "glm-4.5-air"), ("3x 3060", "gpt-oss-120b")]
)  # fmt: skip
def test_several_cards_hold_their_shares_and_keep_their_margins(cards: str, model: str) -> None:
    found = fit(f"{cards} + 9950X + 96GB DDR5-6000", model=model, context=8192)
    room = 24 * GIB * (int(cards[0]) if "x" in cards else 1) + (12 * GIB if "3060" in cards else 0)
    count = 2 if "x" not in cards else int(cards[0])
    assert found.rows and (any(one.quant.startswith("UD-") for one in found.rows) or "qwen" not in model)
    for one in found.rows:
        assert one.device_bytes <= room - count * GIB and one.host_bytes <= 0.88 * 96 * GIB
        shares = one.command.split("--tensor-split ")[1].split()[0].split(",")
        assert len(shares) == count and f"-ts {','.join(shares)}" in one.placement
        assert ("--n-cpu-moe" in one.command) == bool(one.host_layers)


def test_what_cards_and_host_hold_only_together_is_placed() -> None:
    """142 GB of weights: too large for 112 GiB of host memory, and for the cards, but not for both."""
    box = "2x3090 + 9950X + 128GB DDR5-5600"
    (row,) = [one for one in fit(box, model="qwen3-235b-a22b", context=4096).rows if one.quant == "Q4_K_M"]
    found = plan("qwen3-235b-a22b", box, quant="Q4_K_M", target="llama.cpp", prompt_tokens=512, reply_tokens=16)
    assert found.served is not None and "--n-cpu-moe" in found.served["setting"]["name"]
    assert "--cpu-moe -ub 512" in found.to_dict()["baselines_that_do_not_fit"]
    assert 0 < found.served["setting"]["told_layers"] <= row.host_layers + 2


@pytest.mark.parametrize(
    ("machine", "model", "context", "said", "not_said"),
    [
        ("3060 + 5600X + 32GB DDR4", "gpt-oss-120b", "4096", "disk:7GB/s", "--kv-type"),
        ("3060 + 5600X + 128GB DDR4", "glm-4.5-air", "131072", "less than --context 131072 or --kv-type q8_0", "disk:"),
    ],
)
def test_what_does_not_fit_says_what_would_take_less(
    capsys: pytest.CaptureFixture[str], machine: str, model: str, context: str, said: str, not_said: str
) -> None:
    """Of the host's memory a disk, of the card's a shorter context or smaller keys and values."""
    status, _, error = call(capsys, "--hardware", machine, "--model", model, "--context", context)
    assert status == 3 and said in error and not_said not in error and error.count("does not fit") == 1
