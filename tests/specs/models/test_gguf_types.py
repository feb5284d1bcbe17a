"""Weight formats of GGUF files: exact blocks, published mixes."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from moeplan.api import subject
from moeplan.base.errors import UnknownName
from moeplan.calibrate.costs.load import load_costs
from moeplan.papers.field import setup
from moeplan.papers.field.rows import read_reports
from moeplan.specs.machines.load import load_machine
from moeplan.specs.memory import MemoryNeeds, break_down_memory
from moeplan.specs.models import quantised_as, stated_format, weight_format
from moeplan.specs.models.gguf_types import block_bits, tensor_type
from moeplan.specs.models.load import load_model
from moeplan.specs.models.mixes.names import mix, mix_names
from moeplan.specs.models.mixes.unsloth import DYNAMIC


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("Q8_0", "8.5"),
        ("Q4_0", "4.5"),
        ("Q6_K", "6.5625"),
        ("IQ4_XS", "4.25"),
        ("MXFP4", "4.25"),
        ("Q2_K", "2.625"),
        ("IQ4_K_R4", "4.5"),
    ],
)
def test_blocks_are_exact(name: str, bits: str) -> None:
    found = block_bits(name)
    assert found is not None and found[1] == Fraction(bits)


@pytest.mark.parametrize(
    ("number", "name", "num_bytes"),
    [
        (39, "MXFP4", 8 * 17), (40, "NVFP4", 4 * 36), (41, "Q1_0", 2 * 18), (42, "Q2_0", 4 * 18), (133, "Q6_0", 8 * 26), (137, "IQ2_K", 76),
        (144, "IQ4_KS", 136 + 4), (145, "IQ2_KS", 70 + 2), (146, "IQ4_KSS", 128 + 4), (151, "Q8_KV", 256 + 8), (157, "IQ2_KL", 86 + 2),
        (212, "Q4_K", 144), (219, "IQ1_S_R4", 8 * 6 + 2), (229, "IQ1_M_R4", 8 * 7 + 2), (337, "IQ2_K", 76), (344, "IQ4_KS", 136 + 4),
        (352, "IQ5_KS", 168 + 4), (353, "MXFP4", 8 * 17), (399, "Q8_K_R8", 258),
    ],
)  # fmt: skip
def test_types_of_files_by_their_numbers(number: int, name: str, num_bytes: int) -> None:
    """A row of 256 weights takes what ggml's and ik_llama.cpp's tables of types say."""
    found = tensor_type(number)
    assert found is not None and found.name == name and found.num_bytes((256, 1)) == num_bytes
    assert found.num_bytes((255, 1)) is None


def test_a_mix_lies_between_its_types() -> None:
    found = mix("Q4_K_M")
    assert found is not None and found.exact
    # Half of the layers' down matrices are Q6_K: (2 · 4.5 + (4.5 + 6.5625) / 2) / 3.
    assert found.experts == Fraction("4.84375")


def test_names_are_formats() -> None:
    for name in mix_names():
        fmt = weight_format(name)
        assert 1 <= fmt.bits_per_weight < 11 and fmt.quantised
    assert weight_format("4.58bpw").bits_per_weight == Fraction("4.58")
    for wrong in ("Q4_K_X", "0.5bpw", "41bpw", "bpw"):
        with pytest.raises(UnknownName):
            weight_format(wrong)


def test_rows_that_are_no_whole_blocks_take_other_types() -> None:
    # DeepSeek-V2-Lite's experts are 1408 wide: Q4_K falls back to Q5_0 there, Q6_K to Q8_0; 13 of its 26 MoE layers are in the finer type.
    experts, dense = quantised_as("Q4_K_M", None, load_model("deepseek-v2-lite"))
    assert abs(
        experts.bits_per_weight - (2 * Fraction("4.5") + Fraction("5.5") / 2 + Fraction("8.5") / 2) / 3
    ) < Fraction(1, 25)
    assert (dense.embedding_bits, dense.head_bits) == (Fraction("4.5"), Fraction("6.5625"))
    assert quantised_as("Q4_K_M", None, load_model("qwen3-30b-a3b"))[0].name == "Q4_K_M"
    assert (
        quantised_as("int4-g128", None, load_model("qwen3-30b-a3b"))[1].head_bits is None
    )  # other quantisers leave the outer matrices


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "UD-Q2_K_XL"])
def test_outer_matrices_are_counted_in_their_own_types(quant: str) -> None:
    model = load_model("qwen3-30b-a3b")
    experts, dense = quantised_as(quant, None, model)
    memory_breakdown = break_down_memory(
        MemoryNeeds(model=model, expert_format=experts, dense_format=dense), offloaded=False
    )
    values = model.vocab_size * model.hidden_size
    assert dense.embedding_bits is not None and dense.head_bits is not None
    assert memory_breakdown.num_bytes("embeddings") == values * (dense.embedding_bits + dense.head_bits) / 8
    profile = load_machine("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB", "llama.cpp")
    wide = load_costs(profile, model, dense_format=weight_format("16")).head(1).seconds
    own = load_costs(profile, model, dense_format=dense).head(1).seconds
    assert own / wide == pytest.approx(float(dense.head_bits) / 16)


def test_stated_formats_come_back_by_their_names() -> None:
    for bits in (Fraction(1), Fraction(16, 3), Fraction("8.5"), Fraction(16)):
        fmt = stated_format(bits, bits, Fraction("6.5625"))
        assert weight_format(fmt.name) == fmt and abs(fmt.bits_per_weight - bits) < Fraction(1, 10**9)


def test_weights_are_as_large_as_published_files(capsys: pytest.CaptureFixture[str]) -> None:
    by_name, by_size, dynamic, within, table = [], [], [], [], {}
    for report in read_reports():
        stated = report.number("quant", "file_bytes")
        if stated is None:
            continue
        model = setup.model_of(report)
        quant = report.part("quant")
        spread = next((each.spread for name, each in DYNAMIC.items() if quant["experts"] in (name, name[3:])), None)
        for errors, (experts, dense) in (
            (by_name if spread is None else dynamic, setup.stored_by_name(model, quant["experts"], quant["dense"])),
            (by_size, setup.formats_of(report, model, [])[:2]),
        ):
            needs = MemoryNeeds(model=model, expert_format=experts, dense_format=dense)
            memory_breakdown = break_down_memory(needs, cached_experts=model.num_routed_experts, offloaded=False)
            weights = sum(
                memory_breakdown.num_bytes(name) for name in ("resident experts", "embeddings", "dense weights")
            )
            errors.append(abs(weights / stated - 1))
            if errors is dynamic:
                within.append(errors[-1] <= (spread or 0))
        key = f"{model.name} {quant['experts']}, {quant['dense']}"
        table[key] = (
            f"{key:<40} {stated / 1e9:8.2f} GB, counted by name {(by_name if spread is None else dynamic)[-1]:7.2%} off"
        )
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(table.values()))
        sys.stdout.write(
            f"\nweights against {len(by_name)} stated files: median {median(by_name):.2%} by name, {median(by_size):.2%} by size\n"
        )
    assert len(by_size) > 60 and len(by_name) > 40
    assert median(by_name) < 0.01 and median(by_size) < 0.01 and max(by_size) < 0.01
    # Names whose recipes differ from model to model state how far their files lie apart.
    assert len(within) > 10 and sum(within) >= 0.8 * len(within), sorted(dynamic)


PUBLISHED = json.loads((Path(__file__).parent / "published_files.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "row", [row for row in PUBLISHED if "differs" not in row], ids=lambda row: f"{row['model']} {row['quant']}"
)
def test_files_have_their_published_sizes(row: dict[str, Any]) -> None:
    """Files of the unchanged quantiser, as their publishers state them; the rest is tokens' names and rounding."""
    model = load_model(row["model"])
    experts, dense = quantised_as(row["quant"], None, model)
    weights = model.dense_bytes(dense) + model.num_routed_experts * model.expert_bytes(experts)
    assert weights / (row["gigabytes"] * 1e9) == pytest.approx(1, abs=0.0015)


def test_a_mix_without_a_recipe_says_so_and_widens_the_answer() -> None:
    profile, model = (
        load_machine("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB", "llama.cpp"),
        load_model("qwen3-30b-a3b"),
    )

    def asked(quant: str) -> tuple[list[str], float]:
        spec, dense = subject._formats(model, quant, None)
        found, said = subject._as_uncertain(profile, spec, quant, dense, quant)
        return said, found.device.memory_bytes_per_s.relative_uncertainty

    plain, usual = asked("Q4_K_M")
    assert "18.6 GB in all" in plain[0] and usual == profile.device.memory_bytes_per_s.relative_uncertainty
    open_name, wider = asked("UD-Q4_K_XL")
    assert (
        "no published recipe" in open_name[0]
        and f"may differ by {DYNAMIC['UD-Q4_K_XL'].spread:.0%}" in open_name[0]
        and wider > usual
    )
    said, as_usual = asked("int4-g128")
    assert said[0].startswith("int4-g128: ") and "GB in all" in said[0] and as_usual == usual
