"""Weight formats of GGUF files: exact blocks, published mixes."""

from __future__ import annotations

import sys
from fractions import Fraction
from statistics import median

import pytest

from moeplan.calibrate.fitted_model import load_costs
from moeplan.errors import UnknownName
from moeplan.machines.load import load_machine
from moeplan.memory import MemoryNeeds, device_ledger
from moeplan.papers.field import setup
from moeplan.papers.field.rows import read_reports
from moeplan.specs import quantised_as, stated_format, weight_format
from moeplan.specs.gguf import block_bits, mix, mix_names
from moeplan.specs_io import load_model


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


def test_a_mix_lies_between_its_types() -> None:
    found = mix("Q4_K_M")
    assert found is not None and found.exact
    # Half of the layers' down matrices are Q6_K: (2 · 4.5 + (4.5 + 6.5625) / 2) / 3.
    assert found.experts == Fraction("4.84375") and found.dense == Fraction("4.5") and found.head == Fraction("6.5625")


def test_names_are_formats() -> None:
    for name in mix_names():
        fmt = weight_format(name)
        assert 1.5 < fmt.bits_per_weight < 11 and fmt.quantised
    assert weight_format("4.58bpw").bits_per_weight == Fraction("4.58")
    for wrong in ("Q4_K_X", "0.5bpw", "41bpw", "bpw"):
        with pytest.raises(UnknownName):
            weight_format(wrong)


def test_rows_that_are_no_whole_blocks_take_other_types() -> None:
    # DeepSeek-V2-Lite's experts are 1408 wide: Q4_K falls back to Q5_0 there, Q6_K to Q8_0.
    experts, dense = quantised_as("Q4_K_M", hidden=2048, width=1408)
    assert abs(experts.bits_per_weight - Fraction(16, 3)) < Fraction(1, 10**9)
    assert (dense.bits_per_weight, dense.embedding_bits, dense.head_bits) == (
        Fraction("4.5"), Fraction("4.5"), Fraction("6.5625"),
    )  # fmt: skip
    assert quantised_as("Q4_K_M", hidden=2048, width=768)[0].name == "Q4_K_M"
    assert quantised_as("int4-g128")[1].head_bits is None  # other quantisers leave the outer matrices at 16 bits


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "UD-Q2_K_XL"])
def test_outer_matrices_are_counted_in_their_own_types(quant: str) -> None:
    model = load_model("qwen3-30b-a3b")
    experts, dense = quantised_as(quant, hidden=model.expert_hidden, width=model.expert_intermediate_size)
    ledger = device_ledger(MemoryNeeds(model=model, expert_format=experts, dense_format=dense), offloaded=False)
    values = model.vocab_size * model.hidden_size
    assert dense.embedding_bits is not None and dense.head_bits is not None
    assert ledger.num_bytes("embeddings") == values * (dense.embedding_bits + dense.head_bits) / 8
    profile = load_machine("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB", "llama.cpp")
    wide = load_costs(profile, model, dense_format=weight_format("16")).head(1).seconds
    own = load_costs(profile, model, dense_format=dense).head(1).seconds
    assert own / wide == pytest.approx(float(dense.head_bits) / 16)


def test_stated_formats_come_back_by_their_names() -> None:
    for bits in (Fraction(1), Fraction(16, 3), Fraction("8.5"), Fraction(16)):
        fmt = stated_format(bits, bits, Fraction("6.5625"))
        assert weight_format(fmt.name) == fmt and abs(fmt.bits_per_weight - bits) < Fraction(1, 10**9)


def test_weights_are_as_large_as_published_files(capsys: pytest.CaptureFixture[str]) -> None:
    by_name, by_size = [], []
    for report in read_reports():
        stated = report.number("quant", "file_bytes")
        if stated is None:
            continue
        model = setup.model_of(report)
        quant = report.part("quant")
        for errors, (experts, dense) in (
            (by_name, setup.stored_by_name(model, quant["experts"], quant["dense"])),
            (by_size, setup.formats_of(report, model, [])[:2]),
        ):
            needs = MemoryNeeds(model=model, expert_format=experts, dense_format=dense)
            ledger = device_ledger(needs, cached_experts=model.num_routed_experts, offloaded=False)
            weights = sum(ledger.num_bytes(name) for name in ("resident experts", "embeddings", "dense weights"))
            errors.append(abs(weights / stated - 1))
    with capsys.disabled():
        sys.stdout.write(
            f"\nweights against {len(by_name)} stated files: median {median(by_name):.2%} by name, {median(by_size):.2%} by size\n"
        )
    assert len(by_name) > 60 and median(by_name) < 0.01 and median(by_size) < 0.01 and max(by_size) < 0.01
