"""Cards that nobody measured: kernels in proportion to the measured card's, links of their own; what is known is left alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moeplan.base.errors import InputError
from moeplan.papers.field.parallel.rows import Row
from moeplan.papers.field.parallel.setup import machine_of
from moeplan.specs.machines.bundled_kernels import bundled_kernels
from moeplan.specs.machines.catalogue import gpu_parts
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.load import load_machine
from moeplan.specs.machines.overlap import parallel_constants, served_error, shared_speed
from moeplan.specs.machines.profile import SET_BY_USER
from moeplan.specs.machines.profile_file import list_hardware, load_hardware
from moeplan.specs.machines.serving import load_server, serving_engines, serving_machine
from moeplan.specs.machines.siblings import OTHER_CARD, as_server, servers


def test_every_server_is_of_a_card_that_is_known_and_says_where_its_figures_come_from() -> None:
    known = {*gpu_parts(), *list_hardware()}
    for card, row in servers().items():
        assert card in known and row["source"]
        assert row.get("as") in (None, *list_hardware())


def test_an_h20_reads_as_fast_as_its_memory_and_multiplies_no_faster_than_its_peak() -> None:
    found, h100 = as_server(compose_text("h20", "sglang"), "h20", "sglang"), bundled_kernels("h100-sxm", "sglang")
    assert found.kernels is not None and h100 is not None and found.node is not None
    memory = 4000 / 3350
    for number, kernel in h100.experts.items():
        mine = found.kernels.experts[number]
        assert mine.bytes_per_s == pytest.approx(kernel.bytes_per_s * memory, rel=0.01)
        assert mine.start_s == kernel.start_s
        assert mine.relative_uncertainty == pytest.approx(kernel.relative_uncertainty + OTHER_CARD)
    # Triton's kernel leaves matrix units idle on an H100: fewer units cost it, a lower peak hardly.
    assert found.kernels.experts["bf16"].flops_per_s == pytest.approx(0.8 * 148e12)
    assert found.kernels.num_units == 78 and found.kernels.source == "assumed"


def test_an_h800_is_an_h100_with_slower_links() -> None:
    found, h100 = (
        as_server(load_hardware("h800-sxm"), "h800-sxm", "sglang").kernels,
        bundled_kernels("h100-sxm", "sglang"),
    )
    assert found is not None and h100 is not None
    assert found.products["bf16"].flops_per_s == h100.products["bf16"].flops_per_s
    assert (
        found.exchanges["normal-dispatch/node-8"].bytes_per_s
        == 160e9
        < h100.exchanges["normal-dispatch/node-8"].bytes_per_s
    )
    assert (
        found.exchanges["low-latency-dispatch/network-4"].bytes_per_s
        == h100.exchanges["low-latency-dispatch/network-4"].bytes_per_s
    )


def test_what_is_in_no_table_comes_back_as_it_is() -> None:
    profile = load_hardware("rtx-4090")
    assert as_server(profile, "rtx-4090", "vllm") is profile


def test_a_card_of_another_maker_has_links_and_its_engines_constants() -> None:
    found = as_server(compose_text("mi355x", "vllm"), "mi355x", "vllm")
    assert found.node is not None and found.kernels is None


def test_constants_of_clusters_say_what_they_were_fitted_on() -> None:
    table = parallel_constants()
    assert 0.5 < shared_speed() <= 1 and 0 < served_error() < 0.5
    assert set(table["left_out"]) == {"LMSYS", "DeepSeek", "vLLM"}
    assert not any(name.startswith(("silicon", "aic-")) for name in table["fitted_on"])


@pytest.mark.parametrize("card", ["h20", "h800-sxm", "gb200"])
def test_a_prediction_of_ones_own_and_a_score_meet_the_same_machine(card: str) -> None:
    mine = serving_machine(load_machine(card), "sglang")
    row = Row(id="x", row={"gpu": card, "backend": "sglang"}, folder=Path())
    assert mine == machine_of(row, [])
    assert mine.kernels is not None and mine.kernels.engine == "sglang" and mine.node is not None


def test_a_machine_whose_rates_are_set_has_no_kernels_of_another_card() -> None:
    profile = load_machine("h20")
    device = dataclasses.replace(
        profile.device,
        memory_bytes_per_s=dataclasses.replace(profile.device.memory_bytes_per_s, source=SET_BY_USER),
    )
    changed = dataclasses.replace(profile, device=device)
    assert serving_machine(changed).kernels is None
    with pytest.raises(InputError, match="not known on h100-sxm"):
        serving_machine(changed, "sglang")


@pytest.mark.parametrize(
    ("said", "machine"),
    [
        ("h100", "h100-sxm"),
        ("h200", "h200-sxm"),
        ("b200", "b200-sxm"),
        ("a100-80gb", "a100-80gb-sxm"),
        ("h800", "h800-sxm"),
    ],
)
def test_a_card_by_any_of_its_names_is_the_server_it_was_measured_in(said: str, machine: str) -> None:
    assert load_server(said) == load_hardware(machine)
    assert serving_machine(load_server(said), "sglang") == serving_machine(load_hardware(machine), "sglang")


def test_other_machines_stay_what_they_are() -> None:
    for said in ("rtx-4090", "h20", "h100-pcie-80gb", "h100 + epyc-9554 + ddr5-4800x12"):
        assert load_server(said) == load_machine(said)


def test_engines_of_a_card_are_those_of_the_one_it_is_made_like() -> None:
    assert serving_engines(load_server("gb200")) == serving_engines(load_hardware("b200-sxm"))
    assert set(serving_engines(load_server("h800"))) == {"tensorrt-llm", "sglang", "vllm"}
    assert serving_engines(load_server("mi300x")) == ("sglang", "vllm")


def test_a_card_without_a_sibling_is_served_not_run_by_the_engine_of_machines_at_home() -> None:
    found = serving_machine(load_server("mi300x"))
    assert found.engine is not None and found.engine.name == "sglang"
    named = serving_machine(load_machine("mi300x", "vllm"))
    assert named.engine is not None and named.engine.name == "vllm"
