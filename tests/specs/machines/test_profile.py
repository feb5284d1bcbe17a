"""Profiles: every constant has a source, the file is the profile, and no mutation of the file gets through or crashes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError, MissingCalibration
from moeplan.calibrate.costs.cost_model import CostModel
from moeplan.specs.catalog import HARDWARE_FOLDER
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.profile import LANES, SOURCES, Constant, Curve, Profile, profile_to_json
from moeplan.specs.machines.profile_file import list_hardware, load_hardware, profile_from_json
from moeplan.specs.machines.ranges import MOST_UNCERTAIN
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model

NAMES = list_hardware()
A100 = json.loads((HARDWARE_FOLDER / "a100-80gb-sxm.json").read_text(encoding="utf-8"))
TINY = load_model("tiny-moe")


def read(data: Any) -> Profile:
    return profile_from_json(json.dumps(data), "p.json")


def place(data: Any, path: str) -> tuple[Any, str]:
    """Return the innermost table of a dotted path and its last key."""
    *parents, last = path.split(".")
    for key in parents:
        data = data[key]
    return data, last


def changed(path: str, value: Any) -> Any:
    data = copy.deepcopy(A100)
    table, key = place(data, path)
    table[key] = value
    return data


# --- the bundled profiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_byte_stable(name: str) -> None:
    text = (HARDWARE_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    profile = profile_from_json(text)
    assert profile.name == name
    assert profile_to_json(profile) == text
    assert profile_from_json(profile_to_json(profile)) == profile


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_has_a_source_and_an_uncertainty(name: str) -> None:
    constants = dict(load_hardware(name).constants())
    assert len(constants) > 30
    for where, constant in constants.items():
        assert constant.source in SOURCES and constant.source != "measured", where  # nobody measured on your machine
        assert len(constant.citation) >= 10, where
        assert 0 < constant.relative_uncertainty <= 0.7, where


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_plausible(name: str) -> None:
    """Guards against slips of a power of ten: each figure in the range of all accelerators on sale."""
    profile = load_hardware(name)
    device, link = profile.device, profile.host_to_device
    assert 8e9 < profile.memory_bytes < 300e9 and 1e8 < device.runtime_bytes.value < 2e9
    assert 2e11 < device.memory_bytes_per_s.value < 1e13
    assert 5e12 < device.peak_flops_per_s["float32"].value < device.peak_flops_per_s["float16"].value < 3e15
    assert 10e9 < link.pinned_bytes_per_s.value < 64e9  # PCIe 3 to 5, sixteen lanes
    assert link.pageable_bytes_per_s.value < link.pinned_bytes_per_s.value < device.memory_bytes_per_s.value
    assert 1e4 < link.half_size_bytes.value < 1e6
    assert {"16", "32"}.isdisjoint(device.dequantise_efficiency)


@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [("a100-80gb-sxm", 23.8), ("t4", 11.3), ("rtx-3060", 26.0), ("h100-sxm", 57.06), ("rtx-5090", 56.3)],
)
def test_links_are_the_published_ones(name: str, gigabytes_per_s: float) -> None:
    rate = load_hardware(name).host_to_device.pinned_bytes_per_s
    assert rate.value == gigabytes_per_s * 1e9 and rate.source == "published"


def test_nodes() -> None:
    h800 = load_hardware("h800-sxm").node
    assert h800 is not None and h800.num_gpus == 8 and h800.gpu_link_bytes_per_s.value == 160e9
    assert h800.nic_bytes_per_s is not None and h800.nic_bytes_per_s.value == 8 * 400e9 / 8 / 8
    assert load_hardware("rtx-4090").node is None


def test_the_rtx_3060_of_the_paper_is_told_apart() -> None:
    assert "PCIe 3" in load_hardware("rtx-3060").description


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version = 2: this version reads 1"), ("schema_version", "1", "schema_version = '1'"),
        ("schema_version", True, "this version reads 1"), ("extra", 1, "p.json: extra = 1: unknown field"),
        ("device.colour", "red", "device.colour = 'red': unknown field"), ("host", None, "p.json: host = None"),
        ("device.launch_s.value", "3", "device.launch_s.value = '3': input should be a valid number"),
        ("device.launch_s.value", True, "valid number"),
        ("device.launch_s.value", -1.0, "not a finite number of at least zero"),
        ("device.launch_s.value", float("nan"), "finite number"), ("device.launch_s.value", float("inf"), "finite number"),
        ("device.launch_s.source", "guess", "'guess': not one of: assumed, datasheet, measured, published"),
        ("device.launch_s.citation", "  ", "every constant says where it comes from"),
        ("device.launch_s.relative_uncertainty", -0.1, "relative_uncertainty = -0.1"),
        ("device.memory_efficiency.value", 1.01, "a share of a peak from 0.001 to 1"),
        ("device.memory_efficiency.value", 0, "a share of a peak from"),
        ("device.memory_bytes_per_s.value", 0, "bytes per second from"),
        ("device.peak_flops_per_s.float16.value", 0, "operations per second"),
        ("host_to_device.pinned_bytes_per_s.value", 0.0, "bytes per second"),
        ("host.per_step_s.value", 4000, "seconds from 0 to 3600"), ("device.kind", "tpu", "not one of: cpu, gpu"),
        ("device.peak_flops_per_s.bf16", A100["device"]["launch_s"], "'bf16': not one of"),
        ("contention.compute/h2d.value", 0, "a share of the speed alone"),
        ("contention.compute/h2d.value", 1.5, "a share of the speed alone"),
        ("contention.compute", A100["device"]["launch_s"], "not lane/companion"),
        ("contention.gpu/h2d", A100["device"]["launch_s"], "not lane/companion"),
        ("contention.h2d/h2d", A100["device"]["launch_s"], "not lane/companion"),
        ("node.num_gpus", 0, "node.num_gpus = 0: below one"), ("node.num_gpus", 8.0, "valid integer"),
        ("curves.expert", {"arguments": {"tokens": [1, 2]}, "seconds": [1.0], "relative_uncertainty": 0}, "different or zero"),
        ("curves.expert", {"arguments": {}, "seconds": [], "relative_uncertainty": 0}, "different or zero"),
        ("curves.expert", {"arguments": {"tokens": [1]}, "seconds": [-1.0], "relative_uncertainty": 0.1}, "at least zero"),
        ("name", 5, "name = 5"), ("device", [], "device = []"), ("contention", None, "contention = None"),
    ],
)  # fmt: skip
def test_wrong_profiles(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(changed(path, value))
    text = str(caught.value)
    assert message in text and "p.json" in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "path",
    ["name", "device", "device.launch_s", "device.launch_s.citation", "host.per_step_s", "contention"],
)
def test_absent_fields(path: str) -> None:
    data = copy.deepcopy(A100)
    table, key = place(data, path)
    del table[key]
    with pytest.raises(InputError, match=f"p.json: {path} = '.absent.': a field is absent"):
        read(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema_version": 1}', '{"schema_version": 1e999}'])
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(InputError) as caught:
        profile_from_json(text, "p.json")
    assert len(str(caught.value).splitlines()) == 1


def test_optional_parts() -> None:
    bare = {key: value for key, value in A100.items() if key not in ("disk", "node", "samples", "curves")}
    bare["host"] = {key: value for key, value in A100["host"].items() if key != "cpu"}
    profile = read(bare)
    assert profile.disk is None and profile.node is None and profile.host.cpu is None and profile.curves == {}
    curve = {
        "arguments": {"tokens": [1, 8]},
        "seconds": [1e-5, 2e-5],
        "relative_uncertainty": 0.05,
        "citation": "run 3",
    }
    with_curve = read(changed("curves.expert", curve))
    assert with_curve.curves["expert"] == Curve(
        arguments={"tokens": (1.0, 8.0)}, seconds=(1e-5, 2e-5), relative_uncertainty=0.05, citation="run 3"
    )
    assert profile_from_json(profile_to_json(with_curve)) == with_curve


def test_curves_of_older_profiles_are_read_by_their_old_names() -> None:
    curve = {"arguments": {"lap": [0.0, 1.0]}, "seconds": [1.0, 2.0], "relative_uncertainty": 0.05}
    data = copy.deepcopy(A100)
    data["curves"] = {"laps.compute": curve, "wake": curve | {"arguments": {"visits": [1.0, 2.0]}}, "odd": 3}
    with pytest.raises(InputError, match="odd"):
        read(data)
    del data["curves"]["odd"]
    assert {name: set(one.arguments) for name, one in read(data).curves.items()} == {
        "passes.compute": {"pass"}, "wake": {"layer_steps"}
    }  # fmt: skip


def test_profiles_made_in_code_are_checked_too() -> None:
    profile = load_hardware("t4")
    wrong = Constant(value=-1, source="measured", citation="a bad clock", relative_uncertainty=0)
    with pytest.raises(InputError, match=r"host.per_step_s.value = -1"):
        dataclasses.replace(profile, host=dataclasses.replace(profile.host, per_step_s=wrong))


PATHS = sorted(name for name, _ in load_hardware("a100-80gb-sxm").constants())
PARTS = ("", ".value", ".source", ".citation", ".relative_uncertainty", ".new")
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.floats(), max_size=2), st.floats(0, 1), st.sampled_from(sorted(SOURCES)),
    st.just(5e-324), st.just(1.7e308), st.just(10**400),
)  # fmt: skip


@settings(max_examples=examples(300))
@given(
    where=st.dictionaries(st.sampled_from(PATHS), st.sampled_from(PARTS), min_size=1, max_size=3),
    value=JUNK, drop=st.booleans(),
)  # fmt: skip
def test_mutations_read_or_say_why_not(where: dict[str, str], value: Any, drop: bool) -> None:
    data = copy.deepcopy(A100)
    for path, part in where.items():
        table, key = place(data, path + part)
        if drop and isinstance(table, dict):
            table.pop(key, None)
        elif isinstance(table, dict):
            table[key] = copy.deepcopy(value)
    try:
        profile = profile_from_json(json.dumps(data), "p.json")
        assert profile_from_json(profile_to_json(profile)) == profile
        exercise(profile)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def exercise(profile: Profile) -> None:
    """Ask a profile for every cost; what its constants cannot answer is a MissingCalibration."""
    costs = CostModel(profile, TINY)
    fmt = weight_format("4")
    asked = [
        lambda: costs.dense_layer(0, 1, 10), lambda: costs.head(1), lambda: costs.expert_kernel(1, fmt), costs.grouped_base,
        lambda: costs.host_to_device(10), lambda: costs.device_to_host(10, pinned=False), costs.host_per_layer,
        lambda: costs.disk_to_host(10), lambda: costs.cpu_expert(1, fmt),
    ]  # fmt: skip
    for ask in asked:
        try:
            assert ask().seconds >= 0
        except MissingCalibration as error:
            assert profile.name in str(error)
    for lane in LANES:
        assert 0 < costs.rate_fraction(lane, frozenset(LANES) - {lane}) <= 1


@pytest.mark.parametrize("spread", [0.0, 0.07, 0.4])
@pytest.mark.parametrize(
    "cards", ["rtx-3090", "2 x rtx-3090", "rtx-3090 + 2 x rtx-3060 + pcie-3.0x4", "strix-halo", "epyc-9355"]
)
def test_rates_of_every_card_are_less_certain_where_nobody_knows_the_bytes(cards: str, spread: float) -> None:
    before = compose_text(f"{cards} + disk:7GB/s")
    after = before.with_rates_uncertain_by(spread)
    assert profile_from_json(profile_to_json(after)) == after
    one_by_one = [(before.of_card(card), after.of_card(card)) for card in range(before.num_cards)]
    for old, new in [(before, after), *one_by_one]:
        for rate in ("device.memory_bytes_per_s", "host_to_device.pinned_bytes_per_s"):
            part, name = rate.split(".")
            was, now = getattr(getattr(old, part), name), getattr(getattr(new, part), name)
            assert now.value == was.value
            assert now.relative_uncertainty == pytest.approx(
                min(math.hypot(was.relative_uncertainty, spread), MOST_UNCERTAIN)
            )
