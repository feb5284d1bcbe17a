"""Published offload tables beside the simulator's: arithmetic of cells, what is fitted to what, and how well the rest comes out."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from moeplan.base.errors import DoesNotFit, InputError, UnknownName
from moeplan.cli import main
from moeplan.papers import engines, mixtral_offloading, pre_gated
from moeplan.papers.cells import CHECKED, FITTED, PREDICTED, Cell, median, worst
from moeplan.papers.mixtral_offloading import FULL, LRU, NAIVE, NEITHER
from moeplan.papers.pre_gated import LARGE, ON_DEMAND, PRE_GATED, PREFETCH
from moeplan.papers.registry import reproduce
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model

TARGET = 0.10  # median error of checked cells; a cell worse than this says why


@pytest.fixture(scope="module")
def mixtral_constants():
    return mixtral_offloading.fit()


@pytest.fixture(scope="module")
def mixtral(mixtral_constants):
    return mixtral_offloading.reproduce_mixtral_offloading()


@pytest.fixture(scope="module")
def block_host_s():
    return pre_gated.fit()


@pytest.fixture(scope="module")
def pre(block_host_s):
    return pre_gated.reproduce_pre_gated()


def explained(found):
    return [
        cell for cell in found.cells if cell.role == CHECKED and abs(cell.relative_error) > TARGET and not cell.note
    ]


def test_summaries_go_by_role_and_skip_what_is_not_published():
    def cell(published, simulated, role):
        return Cell(table="t", row="r", column="c", unit="x", published=published, simulated=simulated, role=role)

    cells = [cell(10.0, 11.0, CHECKED), cell(10.0, 7.0, CHECKED), cell(10.0, 10.5, CHECKED), cell(10.0, 10.0, FITTED),
             cell(None, 4.0, PREDICTED)]  # fmt: skip
    assert median(cells) == {CHECKED: pytest.approx(0.1), FITTED: 0.0}
    assert worst(cells) == {CHECKED: pytest.approx(0.3), FITTED: 0.0}
    assert cell(None, 4.0, PREDICTED).to_dict()["note"] == ""


# --- Mixtral-offloading ------------------------------------------------------------------------------------------------


def test_mixtral_constants_are_three_on_three_cells(mixtral):
    assert len(mixtral.constants) == 3
    fitted = [cell for cell in mixtral.cells if cell.role == FITTED]
    assert {(cell.row, cell.column) for cell in fitted} == {
        (NEITHER, "a100-80gb-sxm, 2 bits"), (NEITHER, "t4, 2 bits"), (FULL, "a100-80gb-sxm, 2 bits"),
    }  # fmt: skip
    assert all(abs(cell.relative_error) < 1e-4 for cell in fitted)
    # What is known of them: milliseconds of Python a layer, a few passes over a weight's 2 bytes.
    assert 1e-3 < mixtral.constants[0].value < 20e-3
    assert 1 < mixtral.constants[1].value < 20


def test_mixtral_checked_cells(mixtral):
    checked = [cell for cell in mixtral.cells if cell.role == CHECKED]
    assert len(checked) == 9
    assert median(mixtral.cells)[CHECKED] <= TARGET
    assert explained(mixtral) == []
    assert sum(cell.role == PREDICTED for cell in mixtral.cells) == 20
    assert all(cell.published is None for cell in mixtral.cells if cell.role == PREDICTED)


def test_mixtral_constants_ignore_checked_cells(mixtral_constants):
    checked = {key: rate * 1.5 for key, rate in mixtral_offloading.PUBLISHED.items()}
    checked |= {key: mixtral_offloading.PUBLISHED[key] for key in mixtral_offloading.FITTED_CELLS}
    assert mixtral_offloading.fit(checked) == mixtral_constants
    changed = dict(mixtral_offloading.PUBLISHED) | {mixtral_offloading.FITTED_CELLS[0]: 2.4}
    assert mixtral_offloading.fit(changed).layer_host_s < mixtral_constants.layer_host_s


def test_mixtral_link_is_not_the_one_read_off_this_table():
    constants = mixtral_offloading.Constants(layer_host_s=0.0, expand_bytes_per_weight=4.0, guess_host_s=0.0)
    for name, rate in (("a100-80gb-sxm", 25e9), ("t4", 12e9), ("rtx-3060", 12e9), ("rtx-3080-mobile", 25e9)):
        assert mixtral_offloading.machine(name, constants).host_to_device.pinned_bytes_per_s.value == rate
    given = load_hardware("rtx-4090").host_to_device
    assert mixtral_offloading.machine("rtx-4090", constants).host_to_device == given


def test_mixtral_bits_change_transfers_only(mixtral_constants):
    """Without cache every token copies 64 experts on the kernels' stream: 3 bits take longer by their bytes alone."""
    two, three = (1 / mixtral_offloading.tokens_per_s(NEITHER, "t4", bits, mixtral_constants) for bits in ("2", "3"))
    sizes = [load_model("mixtral-8x7b").expert_bytes(weight_format(bits)) for bits in ("2", "3")]
    assert three - two == pytest.approx(64 * (sizes[1] - sizes[0]) / 12e9, rel=1e-3)


def test_mixtral_cache_saves_its_hits(mixtral_constants):
    """On one stream, LRU alone is faster than no cache by exactly the copies of its hits."""
    name = "a100-80gb-sxm"
    lru, none = (mixtral_offloading.simulate(which, name, "2", mixtral_constants) for which in (LRU, NEITHER))
    profile = mixtral_offloading.machine(name, mixtral_constants)
    link, size = profile.host_to_device, load_model("mixtral-8x7b").expert_bytes(weight_format("2"))
    copy_s = link.latency_s.value + (size + link.half_size_bytes.value) / 25e9
    submit_s = profile.host.per_transfer_s.value
    saved = none.window_s / none.num_tokens - lru.window_s / lru.num_tokens
    assert 64 * lru.hit_rate * copy_s <= saved <= 64 * lru.hit_rate * (copy_s + submit_s)


def test_mixtral_naive_is_bound_by_its_link(mixtral_constants):
    size = load_model("mixtral-8x7b").expert_bytes(weight_format("2"))
    seconds = 1 / mixtral_offloading.tokens_per_s(NAIVE, "t4", "2", mixtral_constants)
    assert 250 * size / 12e9 < seconds < 256 * size / 12e9  # the first layer's chosen two, 31 whole layers


def test_mixtral_caches_two_on_twelve_gigabytes():
    assert mixtral_offloading.cached_experts(load_hardware("rtx-3060")) == 2
    assert {mixtral_offloading.cached_experts(load_hardware(name)) for name in ("t4", "rtx-3080-mobile")} == {4}


def test_mixtral_predictions_for_one_machine(mixtral):
    found = reproduce("mixtral-offloading", hardware="rtx-3080-mobile", bits="3")
    assert [cell.row for cell in found.cells] == [FULL, LRU, NEITHER, NAIVE]
    assert {cell.role for cell in found.cells} == {PREDICTED}
    rates = [cell.simulated for cell in found.cells]
    assert rates == sorted(rates, reverse=True)
    whole = {(cell.row, cell.column): cell for cell in mixtral.cells}
    assert [whole[cell.row, cell.column] for cell in found.cells] == list(
        found.cells
    )  # the same run twice: the same cells
    assert found.constants == mixtral.constants


def test_mixtral_refuses_what_does_not_exist():
    with pytest.raises(UnknownName, match="rtx-3060"):
        reproduce("mixtral-offloading", hardware="rtx-3061")
    with pytest.raises(UnknownName, match="bits"):
        reproduce("mixtral-offloading", bits="5")
    with pytest.raises(DoesNotFit):
        reproduce("mixtral-offloading", hardware="t4", bits="16")
    with pytest.raises(InputError, match="own machines"):
        reproduce("engines", hardware="t4")
    with pytest.raises(InputError, match="own machines"):
        reproduce("deepep", bits="2")


# --- Pre-gated MoE -----------------------------------------------------------------------------------------------------


def test_pre_gated_constant_and_checked_cells(pre):
    assert len(pre.constants) == 1
    (fitted,) = [cell for cell in pre.cells if cell.role == FITTED]
    assert fitted.simulated == pytest.approx(111, rel=1e-4)
    assert sum(cell.role == CHECKED for cell in pre.cells) == 13
    assert median(pre.cells)[CHECKED] <= TARGET
    assert median([cell for cell in pre.cells if cell.table != "model size"])[CHECKED] <= TARGET
    assert explained(pre) == []
    (contradicted,) = [cell for cell in pre.cells if cell.published == 52]
    assert contradicted.role == CHECKED
    assert "contradict" in contradicted.note
    json.dumps(pre.to_dict(), allow_nan=False)


def test_pre_gated_constant_ignores_checked_cells(block_host_s):
    changed = {key: value * 1.5 for key, value in pre_gated.PUBLISHED.items()}
    changed[pre_gated.FITTED_CELL] = pre_gated.PUBLISHED[pre_gated.FITTED_CELL]
    assert pre_gated.fit(changed) == block_host_s


def test_pre_gated_memory_holds_what_each_mode_fetches(block_host_s):
    """On demand one active expert; pre-gated those of two blocks; prefetch two whole blocks."""
    profile = pre_gated.machine("a100-80gb-sxm")
    for name in (LARGE, "switch-base-8"):
        model = load_model(name)
        expert = model.expert_bytes(weight_format("32"))
        peak = {
            mode: pre_gated.run_mode(name, mode, block_host_s, profile=profile).peak_bytes for mode in pre_gated.MODES
        }
        assert peak[PRE_GATED] - peak[ON_DEMAND] == expert
        assert peak[PREFETCH] - peak[ON_DEMAND] == (2 * model.num_experts - 1) * expert


def test_pre_gated_sizes_and_link(pre):
    assert load_model(LARGE).expert_bytes(weight_format("32")) == 33_554_432
    assert load_model("switch-base-8").expert_bytes(weight_format("32")) == 18_874_368
    times = {(cell.row, cell.column): cell.simulated for cell in pre.cells if cell.table == "block time"}
    # Eleven of twelve blocks move 128 experts, the first one; latency and half size of a copy add less than 1 %.
    least = (11 * 128 + 1) / 12 * 33_554_432 / 25e9 * 1e3
    assert least < times[LARGE, PREFETCH] < 1.01 * least
    # A transfer alone is less than any block.
    assert all(times[LARGE, mode] > 33_554_432 / 25e9 * 1e3 for mode in pre_gated.MODES)


def test_pre_gated_on_another_machine_is_a_prediction():
    found = reproduce("pre-gated", hardware="h100-sxm", bits="16")
    assert {cell.role for cell in found.cells} == {PREDICTED}
    assert all(cell.simulated > 0 and cell.published is None and not cell.note for cell in found.cells)
    with pytest.raises(UnknownName):
        reproduce("pre-gated", hardware="h100-sxn")


# --- engines -----------------------------------------------------------------------------------------------------------


def test_engines_fit_nothing_and_explain_every_miss():
    found = reproduce("engines")
    assert found.constants == ()
    assert {cell.role for cell in found.cells} == {CHECKED}
    assert len(found.cells) == 15
    assert explained(found) == []
    json.dumps(found.to_dict(), allow_nan=False)
    cells = {(cell.row, cell.column): cell.simulated for cell in found.cells}
    # Six of Mixtral's layers stay on the card: the other 26 move eight experts and a dense part each from ordinary memory.
    model, profile = load_model("mixtral-8x7b"), engines.machine("Accelerate")
    assert engines.resident_layers(model, profile) == 6
    moved = 26 * (8 * model.expert_bytes(weight_format("16")) + model.dense_layer_bytes(0, weight_format("16")))
    least = moved / profile.host_to_device.pageable_bytes_per_s.value
    assert least < cells["Accelerate", "Mixtral-8x7B"] < 1.05 * least
    assert cells["vLLM", "Mixtral-8x7B"] < 0.55 * cells["Accelerate", "Mixtral-8x7B"]
    assert median(found.cells)[CHECKED] < 0.4


def test_engines_keep_nothing_of_a_decoder_behind_a_large_encoder():
    profile = engines.machine("MoE-Infinity")
    assert engines.resident_layers(load_model("switch-large-128"), profile) == 0
    larger = dataclasses.replace(profile.device.memory_bytes, value=400e9)
    device = dataclasses.replace(profile.device, memory_bytes=larger)
    assert engines.resident_layers(load_model("switch-large-128"), dataclasses.replace(profile, device=device)) == 12


# --- the command -------------------------------------------------------------------------------------------------------


def test_command_prints_one_document_or_one_line(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moeplan", "reproduce", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return stop.value.code or 0, shown.out, shown.err

    status, out, _ = run("mixtral-offloading", "--hardware", "rtx-3060", "--bits", "2", "--json")
    document = json.loads(out)
    assert (status, len(document["cells"])) == (0, 4)
    assert {constant["fitted_to"] for constant in document["fitted_constants"]} == {
        "neither/a100-80gb-sxm/2", "neither/t4/2", "LRU + speculation/a100-80gb-sxm/2",
    }  # fmt: skip
    status, out, _ = run("mixtral-offloading", "--hardware", "rtx-3060", "--bits", "2")
    assert (status, out.count("fitted:"), out.count("  predicted\n")) == (0, 3, 4)
    for arguments, code in (
        (("mixtral-offloading", "--hardware", "abacus"), 2), (("pre-gated", "--bits", "5"), 2),
        (("mixtral-offloading", "--hardware", "t4", "--bits", "16"), 3), (("eps", "--json"), 2),
    ):  # fmt: skip
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (code, "", 1), arguments
