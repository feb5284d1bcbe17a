"""A host that cannot hold the experts: what must lie there, what a disk takes, and how many bytes are missing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moeplan.api.subject import open_subject
from moeplan.base.errors import DoesNotFit
from moeplan.cli import main
from moeplan.planner.offload.plan import OffloadRequest, base_schedule
from moeplan.planner.offload.search import search
from moeplan.planner.offload.space import candidates
from moeplan.sim.offload.memory.host import HOST_SHARE
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import PRESETS, load_preset
from strategies import make_trace

MIB = 2**20
BASE = base_schedule(OffloadRequest(bits=("32",)), "32")
NUM_EXPERTS = 6 * 16


def simulation(
    *, host_experts: float = 1000, disk: bool = False, memory_bytes: int = 555 * MIB, extra_host: int = 0
) -> Simulation:
    """Return tiny-moe on a machine whose memory has room for so many experts."""
    profile, model = load_hardware("rtx-4090"), load_model("tiny-moe")
    each = Simulation(model=model, profile=profile, trace=_trace()).expert_bytes(BASE)
    room = dataclasses.replace(
        profile.host.memory_bytes, value=float(int(host_experts * each / HOST_SHARE) + 1 + extra_host)
    )
    profile = dataclasses.replace(
        profile, host=dataclasses.replace(profile.host, memory_bytes=room), disk=profile.disk if disk else None
    )
    return Simulation(model=model, profile=profile, trace=_trace(), window_steps=6, memory_bytes=memory_bytes)


def _trace() -> Any:
    rng = np.random.default_rng(3)
    return make_trace(rng, num_layers=6, num_experts=16, top_k=2, requests=[(3, 9)], skew=0.2, guesses=3)


def preset(name: str) -> OffloadSchedule:
    schedule = load_preset(name).with_options(experts__bits="32")
    return schedule.with_options(experts__low_bits="4") if schedule.experts.low_bits is not None else schedule


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_exactly_the_bytes_that_a_host_lacks_are_enough(name: str) -> None:
    schedule = preset(name)
    asked = {"host_experts": 20.0, "memory_bytes": 541 * MIB}
    try:
        simulation(**asked).predict(schedule)  # type: ignore[arg-type]
    except DoesNotFit as lacking:
        if lacking.place != "host":
            return  # all of it on the device, which has no room for that
        with pytest.raises(DoesNotFit):
            simulation(**asked, extra_host=lacking.missing_bytes - 1).predict(schedule)  # type: ignore[arg-type]
        found = simulation(**asked, extra_host=lacking.missing_bytes).predict(schedule)  # type: ignore[arg-type]
    else:
        pytest.fail("it was said to fit")
    assert found.schedule.copy.host_experts is None
    assert found.memory_breakdown.host_bytes > 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_exactly_the_bytes_that_a_device_lacks_are_enough(name: str) -> None:
    for budget in (300 * MIB, 516 * MIB, 541 * MIB):
        try:
            simulation(memory_bytes=budget).predict(preset(name))
        except DoesNotFit as lacking:
            found = simulation(memory_bytes=budget + lacking.missing_bytes).predict(preset(name))
            assert found.memory_breakdown.device_bytes <= budget + lacking.missing_bytes
            with pytest.raises(DoesNotFit):
                simulation(memory_bytes=budget + lacking.missing_bytes - 1).predict(preset(name))


def test_what_stays_on_the_device_needs_no_place_in_the_host() -> None:
    this = simulation(host_experts=80)
    for name in ("n-cpu-moe", "kt-uniform", "kt-frequency", "kt-front-loading", "fiddler"):
        found = this.predict(preset(name).with_options(cache__pooled_experts=32))
        assert found.schedule.copy.host_experts is None
        store = next(item for item in found.memory_breakdown.items if item.name == "expert store")
        assert store.num_bytes == (NUM_EXPERTS - 32) * this.expert_bytes(BASE)
        assert "the others stay on the device" in store.note
    for name in ("cpu-moe", "on-demand", "mixtral-offloading", "naive"):  # everything may be asked for again
        with pytest.raises(DoesNotFit, match="host"):
            this.predict(preset(name))


def test_a_disk_takes_what_the_host_cannot_hold_and_it_is_said() -> None:
    this = simulation(host_experts=40, disk=True)
    found = this.predict(preset("on-demand"))
    assert found.schedule.copy.host_experts == 40
    assert found.metrics.disk_reads > 0
    assert any("the others of the 96 are read from the disk" in text for text in found.assumptions)
    assert found.metrics.window_s > simulation(disk=True).predict(preset("on-demand")).metrics.window_s
    paged = this.predict(preset("cpu-moe"))
    assert paged.metrics.disk_reads > 0 == paged.metrics.bytes_copied
    assert paged.metrics.bound == "disk"
    assert paged.memory_breakdown.num_bytes("expert store") == 40 * this.expert_bytes(BASE)
    assert [item.note for item in paged.memory_breakdown.items if item.name == "expert store"] == [
        f"96 on disk, of them 40 experts of {this.expert_bytes(BASE)} bytes in memory, where the cores compute them"
    ]
    for name in ("naive", "mixtral-offloading-code"):
        with pytest.raises(DoesNotFit) as caught:
            this.predict(preset(name))
        assert "copy." not in str(caught.value)  # no remedy about an option that nobody set
    # A fixed cache above a disk: the host holds the most popular experts of those that are not on the device.
    fixed = this.predict(preset("fiddler").with_options(cache__pooled_experts=56))
    assert fixed.schedule.copy.host_experts is None
    assert fixed.metrics.disk_reads == 0


def test_a_search_keeps_what_the_host_can_hold() -> None:
    this = simulation(host_experts=70, memory_bytes=541 * MIB)
    level = this.slots_that_fit(BASE)
    refused: list[DoesNotFit] = []
    kept = list(candidates(this, BASE, level, refused=refused))
    assert kept and refused
    assert {one.schedule.cache.policy for one in kept} == {"static"}
    assert {"fetch", "cpu", "cheaper", "balanced"} <= {one.schedule.kernel.miss for one in kept}
    for one in kept:
        assert this.memory_breakdown(
            one.schedule, cached_experts=one.cached_slots
        ).host_bytes <= 71 * this.expert_bytes(BASE)


def test_exactly_the_bytes_that_a_search_lacks_are_enough() -> None:
    budget = 515 * MIB
    with pytest.raises(DoesNotFit) as caught:
        search(simulation(memory_bytes=budget), BASE)
    found = search(simulation(memory_bytes=budget + caught.value.missing_bytes), BASE)
    assert found.front[-1].device_bytes <= budget + caught.value.missing_bytes
    asked = {"host_experts": 20.0, "memory_bytes": budget + caught.value.missing_bytes}
    with pytest.raises(DoesNotFit) as lacking:
        search(simulation(**asked), BASE)  # type: ignore[arg-type]
    assert lacking.value.place == "host"
    search(simulation(**asked, extra_host=lacking.value.missing_bytes), BASE)  # type: ignore[arg-type]


def test_a_budget_above_the_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "moeplan",
        "simulate",
        "--model",
        "tiny-moe",
        "--hardware",
        "t4",
        "--trace",
        "bundled",
        "--memory",
        "17GiB",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--memory = '17GiB': t4 has" in capsys.readouterr().err


def test_the_host_holds_the_token_embedding_beside_experts_and_a_common_memory_holds_everything_once() -> None:
    """gpt-oss-20b's embedding takes 0.57 GiB of the host under llama.cpp; a machine of one memory has one size for card and cores."""
    parts = {"model": "gpt-oss-20b", "prompt_tokens": 8, "reply_tokens": 2}
    this = open_subject(hardware="rtx-3060 + ryzen-7-7700x + ddr5-5600x2:32GiB", **parts).simulation  # type: ignore[arg-type]
    schedule = this.resolve(load_preset("cpu-moe"))
    beside = this.memory_breakdown(schedule, cached_experts=0).num_bytes("token embedding")
    assert beside == 201_088 * 2880 * 17 // 16
    assert this.host_bytes_left(schedule, 0) == int(HOST_SHARE * 32 * 2**30) - beside
    # Experts alone would fit where experts and embedding do not.
    experts = this.num_experts * this.expert_bytes(schedule)
    for memory, fits in ((experts + beside, True), (experts + beside // 2, False)):
        host = dataclasses.replace(
            this.profile.host,
            memory_bytes=dataclasses.replace(this.profile.host.memory_bytes, value=memory / HOST_SHARE + 1),
        )
        small = dataclasses.replace(this, profile=dataclasses.replace(this.profile, host=host))
        if fits:
            assert small.within_host(schedule, cached_experts=0).copy.host_experts is None
        else:
            with pytest.raises(DoesNotFit, match=r"beside 586\.82 MiB of other things"):
                small.within_host(schedule, cached_experts=0)
    one = open_subject(hardware="strix-halo", **parts).simulation  # type: ignore[arg-type]
    held = one.memory_breakdown(schedule, cached_experts=0)
    assert one.host_bytes_left(schedule, 0) == one.profile.memory_bytes - held.device_bytes - held.num_bytes(
        "token embedding"
    )
