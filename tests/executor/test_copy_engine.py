"""The copy engine takes transfers in the simulator's order, waits for slots, and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from executor_stages import small_model
from moeplan.devices.device import CpuDevice, Device, InstantMark
from moeplan.devices.stores.host import ExpertStore, make_store
from moeplan.executor.running.copy_engine import BackEngine, CopyEngine, Gate
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.executor.running.slots import Slots
from moeplan.executor.running.transfers import Transfer, WriteBack
from moeplan.sim.policies.state import DEMAND, PREFETCH

WAIT_S = 20.0
NUM_KEYS = 12


class HeldStore(ExpertStore):
    """Notes every piece it is asked for, and holds the worker until the test lets it go on."""

    def __init__(self, source: ExpertStore) -> None:
        super().__init__(source.layout, source.activation, source._slots.view(-1))
        self.pieces: list[tuple[int, int, int]] = []
        self.begun = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        self.pieces.append((key, low, high))
        self.begun.release()
        assert self.allowed.acquire(timeout=WAIT_S)
        super().bring(device, target, key, low, high)

    def until_begun(self) -> None:
        assert self.begun.acquire(timeout=WAIT_S)

    def let(self, pieces: int) -> None:
        for _ in range(pieces):
            self.allowed.release()


@dataclass
class Bench:
    store: HeldStore
    slots: Slots
    gate: Gate
    engine: CopyEngine
    device: CpuDevice
    made: list[Transfer] = field(default_factory=list)

    def transfer(self, number: int, kind: int, target: int, slot: int, **waits: int) -> Transfer:
        made = Transfer(id=number, key=number, kind=kind, target=target, slot=slot, transient=slot < 0,
                        wait_kernel=waits.get("kernel", -1), wait_back=waits.get("back", -1), format=0,
                        num_bytes=self.slots.slot_bytes)  # fmt: skip
        self.made.append(made)
        return made

    def submit(self, *args: int, **waits: int) -> Transfer:
        made = self.transfer(*args, **waits)
        self.engine.submit(made)
        return made

    def keys(self) -> list[int]:
        return [key for key, _, _ in self.store.pieces]


def open_bench(piece_bytes: int | None = None, num_transient: int = 2) -> Bench:
    device = CpuDevice()
    model = small_model(hidden=32, inter=32)
    store = HeldStore(make_store(model, "32", device, num_keys=NUM_KEYS))
    slots = Slots(device, [store.layout], store.activation, num_slots=6, num_transient=num_transient)
    gate = Gate()
    return Bench(store, slots, gate, CopyEngine(device, [store], slots, gate, piece_bytes=piece_bytes), device)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = open_bench()
    yield made
    made.store.let(1000)
    made.engine.close()


@pytest.fixture
def cut() -> Iterator[Bench]:
    made = open_bench(piece_bytes=6144)  # slots of 12,288 bytes: two pieces each
    assert made.slots.slot_bytes == 12288
    yield made
    made.store.let(1000)
    made.engine.close()


def test_demands_go_first_then_prefetches_by_layer_step_then_by_number(bench: Bench) -> None:
    bench.submit(0, PREFETCH, 1, 0)
    bench.store.until_begun()
    for number, kind, target in ((1, PREFETCH, 5), (2, PREFETCH, 3), (3, PREFETCH, 3), (4, DEMAND, 2), (5, DEMAND, 2)):
        bench.submit(number, kind, target, number)
    bench.store.let(6)
    bench.engine.drain()
    assert bench.keys() == [0, 4, 5, 2, 3, 1]
    assert all(transfer.arrived() for transfer in bench.made)
    for slot in range(6):
        assert torch.equal(bench.slots.bytes_of(slot), bench.store.bytes_of(slot))


def test_a_promoted_prefetch_goes_with_the_demands_by_number(bench: Bench) -> None:
    bench.submit(0, PREFETCH, 1, 0)
    bench.store.until_begun()
    for number, kind, target in ((1, PREFETCH, 9), (2, PREFETCH, 3), (3, DEMAND, 2)):
        bench.submit(number, kind, target, number)
    bench.engine.promote([0, 1])  # 0 is running; 1 waits behind 2 but was asked for before 3
    bench.store.let(4)
    bench.engine.drain()
    assert bench.keys() == [0, 1, 3, 2]


def test_a_demand_passes_a_prefetch_between_its_pieces(cut: Bench) -> None:
    cut.submit(0, PREFETCH, 1, 0)
    cut.store.until_begun()
    cut.submit(1, DEMAND, 1, 1)
    cut.store.let(4)
    cut.engine.drain()
    assert cut.store.pieces == [(0, 0, 6144), (1, 0, 6144), (1, 6144, 12288), (0, 6144, 12288)]
    assert torch.equal(cut.slots.bytes_of(0), cut.store.bytes_of(0))


def test_a_prefetch_promoted_while_it_runs_is_not_passed_by_a_later_demand(cut: Bench) -> None:
    cut.submit(0, PREFETCH, 1, 0)
    cut.store.until_begun()
    cut.engine.promote([0])
    cut.submit(1, DEMAND, 1, 1)
    cut.store.let(4)
    cut.engine.drain()
    assert [key for key, _, _ in cut.store.pieces] == [0, 0, 1, 1]


def test_a_transfer_waits_for_the_kernel_that_reads_its_slot(bench: Bench) -> None:
    first = bench.submit(0, DEMAND, 0, 0, kernel=1)
    second = bench.submit(1, DEMAND, 0, 1)  # stands behind the first, as in the simulator
    bench.store.let(2)
    assert not first.issued.wait(0.05)
    bench.gate.kernel_launched(bench.device.mark())
    assert not first.issued.wait(0.05)
    assert bench.keys() == []
    bench.gate.kernel_launched(bench.device.mark())
    assert second.issued.wait(WAIT_S)
    assert bench.keys() == [0, 1]


def test_a_transfer_waits_for_the_write_back_of_its_slot(bench: Bench) -> None:
    backs = BackEngine(bench.device, [bench.store], bench.slots, bench.gate)
    bench.slots.bytes_of(0).fill_(7)
    filled = bench.submit(2, DEMAND, 0, 0, back=0)
    bench.store.let(1)
    backs.submit(WriteBack(id=0, key=9, step=0, slot=0, wait_kernel=0, format=0, num_bytes=bench.slots.slot_bytes))
    assert not filled.issued.wait(0.05)
    bench.gate.kernel_launched(bench.device.mark())
    assert filled.issued.wait(WAIT_S)
    backs.drain()
    backs.close()
    assert bool((bench.store.bytes_of(9) == 7).all())
    assert torch.equal(bench.slots.bytes_of(0), bench.store.bytes_of(2))


def test_transient_buffers_are_given_when_a_transfer_starts_and_taken_back(bench: Bench) -> None:
    one, two = bench.submit(0, DEMAND, 0, -1), bench.submit(1, DEMAND, 0, -1)
    bench.store.let(2)
    bench.engine.drain()
    assert {one.slot, two.slot} == {6, 7}
    bench.engine.release([one, two])
    assert one.slot == two.slot == -1
    three = bench.submit(2, DEMAND, 1, -1)
    bench.store.let(1)
    bench.engine.drain()
    assert torch.equal(bench.slots.bytes_of(three.slot), bench.store.bytes_of(2))


def test_a_used_guess_waits_for_the_older_guess_in_its_slot(bench: Bench) -> None:
    """The layer step that gives a slot away demands the copy under way into it; what comes next into the slot stands behind it."""
    bench.submit(0, DEMAND, 0, 0)
    bench.store.until_begun()
    older = bench.submit(1, PREFETCH, 1, 2)
    bench.engine.promote([1])
    newer = bench.submit(2, PREFETCH, 3, 2)
    bench.submit(3, DEMAND, 2, 3)
    bench.engine.promote([2])
    bench.store.let(4)
    bench.engine.drain()
    assert bench.keys() == [0, 1, 2, 3]
    assert older.arrived() and torch.equal(bench.slots.bytes_of(newer.slot), bench.store.bytes_of(2))


def test_more_transients_than_counted_are_an_internal_error() -> None:
    made = open_bench(num_transient=1)
    made.store.let(10)
    made.submit(0, DEMAND, 0, -1)
    second = made.submit(1, DEMAND, 0, -1)
    assert second.issued.wait(WAIT_S)
    with pytest.raises(Exception, match="more transient experts"):
        made.gate.wait_for(second)
    made.engine.close()


def test_a_run_whose_experts_are_all_on_the_device_is_not_stalled() -> None:
    gate = Gate()
    gate.moved_at_s -= 1000
    with pytest.raises(ExecutionFailed, match="no expert has moved for 120 s"):
        gate.check()
    gate.kernel_launched(InstantMark())
    gate.check()
