"""The one measuring harness: benchmarks run in rounds, every repetition kept, conditions noted, instability said.

Modelled: each benchmark is warmed up, then all of them take turns, a few repetitions each, round after round, so that
whatever disturbs the machine for a while disturbs all of them alike and medians stay comparable. Times are between
two marks in a stream (events on CUDA, `perf_counter_ns` on the CPU). Short CUDA work is repeated back to back between
two marks and divided. A repetition on the host's cores during which the system gave the core to somebody else is
repeated, a few times at most. Caches are flushed by reading another buffer before a repetition where a benchmark asks
for it; most rotate over more memory than caches hold instead. Ignored: what is measured (`microbench_*`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...base.units import MIB, NS_PER_S
from ...devices.device import COMPUTE, CpuDevice, Device, metadata_of, preemptions
from ..samples import Sample, SampleSet, merge
from .journal import Journal

Progress = Callable[[int, int, str], None]
# Larger than the last-level caches of the devices at hand: 50 MiB on an H200, 32 MiB a core complex on a server CPU.
_FLUSH_BYTES = 128 * MIB
_UNSTABLE = 0.25
_STOLEN = 0.02
# Cycles, about 40 µs on a GPU of today: longer than launching one kernel takes.
_PAUSE_CYCLES = 80_000
# Work that takes longer to launch pauses the stream for one and a half times that, at two cycles a nanosecond (an H200 has 1.98).
_PAUSE_CYCLES_PER_LAUNCH_NS = 3
# What keeps the host for longer (copies from memory that is not page-locked do) is no launch, and no pause would help.
_MOST_LAUNCH_NS = 2_000_000
_MIN_WINDOW_S = 2e-4
_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Something to measure."""

    kind: str
    """A key of `samples.COLUMNS`."""
    labels: Mapping[str, str]
    arguments: Mapping[str, float]
    run: Callable[[int], Any]
    """Called with a running number, so that it can rotate over its data; what it returns is not used."""
    timed: Callable[[int], float] | None = None
    """Instead of `run`: measures itself and returns seconds."""
    prepare: Callable[[int], Any] | None = None
    """Called before each repetition, outside the time."""
    during: Callable[[], contextlib.AbstractContextManager[None]] | None = None
    """A companion that runs meanwhile: entered before a round's repetitions, left after them."""
    flush: bool = False
    """Read another buffer before each repetition, so that nothing is in a cache."""
    interrupted: bool = False
    """It shares its core with its companion: a repetition that was interrupted counts like any other."""
    stream: str = COMPUTE
    """The stream, and on the CPU the core, that it runs on; the same for all benches measured together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """How a bench is repeated."""

    inner: int = 1
    """How often between two marks."""
    launch_ns: int = 0
    """What submitting it once takes the host, where that is not running it."""


@dataclass(slots=True)
class Harness:
    """Runs benchmarks on one device and keeps what they took."""

    device: Device
    progress: Progress = field(default=lambda done, total, note: None)
    journal: Journal | None = None
    """Parts that are done are taken from it and kept in it."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why: warnings beside those about instability."""
    _part: int = 0
    _buffer: torch.Tensor | None = None
    _began: dict[str, Any] = field(default_factory=dict)
    _samples: list[Sample] = field(default_factory=list)

    def measure(
        self, benches: Sequence[Bench], *, rounds: int, repetitions: int, seconds: float | None = None, what: str = ""
    ) -> list[Sample]:
        """Return one sample for each bench, of up to rounds · repetitions times.

        seconds: stop after the round in which this much time is used up, but never before the first one is complete.
        """
        return self._done(what, lambda: self._measured(benches, rounds, repetitions, seconds, what))

    def _measured(
        self, benches: Sequence[Bench], rounds: int, repetitions: int, seconds: float | None, what: str
    ) -> list[Sample]:
        times: list[list[float]] = [[] for _ in benches]
        count = 0
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self.device.enter(benches[0].stream if benches else COMPUTE))
            paces = [self._warm_up(bench) for bench in benches]
            for round_number in range(rounds):
                for place, bench in enumerate(benches):
                    self.device.new_epoch()  # the older the origin of times is, the coarser they are
                    with bench.during() if bench.during is not None else contextlib.nullcontext():
                        for _ in range(repetitions):
                            times[place].append(self._once(bench, count, paces[place]))
                            count += paces[place].inner
                self.progress(round_number + 1, rounds, what)
                if seconds is not None and time.monotonic() - began > seconds:
                    break
        return [
            Sample(kind=bench.kind, labels=bench.labels, arguments=bench.arguments, seconds=tuple(taken))
            for bench, taken in zip(benches, times, strict=True)
        ]

    def measure_on_host(
        self,
        benches: Sequence[Bench],
        *,
        host: CpuDevice,
        rounds: int,
        repetitions: int,
        seconds: float | None,
        what: str,
    ) -> list[Sample]:
        """Return samples of benches that run on the host's cores, whatever this harness's device is."""
        own = Harness(host, self.progress)
        return self._done(
            what, lambda: own.measure(benches, rounds=rounds, repetitions=repetitions, seconds=seconds, what=what)
        )

    def keep(self, work: Callable[[], Sequence[Sample]], what: str) -> list[Sample]:
        """Return samples that `work` measures elsewhere, and add them."""
        return self._done(what, lambda: list(work()))

    def _done(self, what: str, work: Callable[[], list[Sample]]) -> list[Sample]:
        """Return the samples of the next part: those in the journal, or what `work` measures."""
        if not self._began:
            self._began = conditions_now(self.device)
        name = f"{self._part} {what}"
        self._part += 1
        found = self.journal.part(name) if self.journal is not None else None
        if found is None:
            found = work()
            if self.journal is not None:
                self.journal.keep(name, found)
        self._samples += found
        return found

    def finish(self, *, model: str | None, quick: bool) -> SampleSet:
        """Return everything measured, repetitions of the same measurement together, with conditions and warnings."""
        ended = conditions_now(self.device)
        conditions = {"began": self._began or ended, "ended": ended}
        found = merge(
            [
                SampleSet(
                    device=metadata_of(self.device),
                    conditions=conditions,
                    samples=tuple(self._samples),
                    model=model,
                    quick=quick,
                )
            ]
        )
        return dataclasses.replace(found, warnings=(*self.notes, *instabilities(found.samples, conditions)))

    def _warm_up(self, bench: Bench) -> _Pace:
        """Run a bench a few times; return how it is to be repeated."""
        if bench.timed is not None:
            bench.timed(0)
            return _Pace()
        taken, launch_ns = math.inf, 0 if not self.device.asynchronous else _MOST_LAUNCH_NS
        for number in range(3 if self.device.asynchronous else 2):
            if self.device.asynchronous:  # the first one compiles, so the least of them counts
                launch_ns = min(launch_ns, self._launch_ns(bench, number))
            if bench.prepare is not None:
                bench.prepare(number)
            taken = min(taken, self._between(bench, number, _Pace(launch_ns=launch_ns)))
        if not self.device.asynchronous or bench.prepare is not None or bench.flush:
            return _Pace(launch_ns=launch_ns)
        return _Pace(inner=max(1, min(64, math.ceil(_MIN_WINDOW_S / max(taken, 1e-7)))), launch_ns=launch_ns)

    def _launch_ns(self, bench: Bench, number: int) -> int:
        """Run a bench; return how long that kept the host."""
        if bench.prepare is not None:
            bench.prepare(number)
        self.device.mark().wait()  # an empty stream: a full one may keep the host, too
        began = time.perf_counter_ns()
        bench.run(number)
        return time.perf_counter_ns() - began

    def _once(self, bench: Bench, number: int, pace: _Pace) -> float:
        """Return one repetition's time; on the host's own cores, one that another program interrupted is made again."""
        for _ in range(_TRIES):
            before = preemptions()
            taken = self._repetition(bench, number, pace)
            if self.device.asynchronous or bench.interrupted or preemptions() == before:
                break
        return taken

    def _repetition(self, bench: Bench, number: int, pace: _Pace) -> float:
        if bench.timed is not None:
            return bench.timed(number)
        if bench.prepare is not None:
            bench.prepare(number)
        if bench.flush:
            self._flush()
        return self._between(bench, number, pace)

    def _between(self, bench: Bench, number: int, pace: _Pace) -> float:
        if self.device.asynchronous:  # work queues up behind a pause, so that launching is not what is measured
            each = max(_PAUSE_CYCLES, _PAUSE_CYCLES_PER_LAUNCH_NS * pace.launch_ns)
            torch.cuda._sleep(_PAUSE_CYCLES + each * pace.inner)  # noqa: SLF001 - torch has no public name for it
        begin = self.device.mark()
        for repetition in range(pace.inner):
            bench.run(number + repetition)
        end = self.device.mark()
        end.wait()
        return max(1, end.at_ns() - begin.at_ns()) / NS_PER_S / pace.inner

    def _flush(self) -> None:
        if self._buffer is None:
            self._buffer = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device=self.device.place)
        self._buffer.add_(1.0)
        self.device.synchronize()


# --- conditions -------------------------------------------------------------------------------------------------------


def conditions_now(device: Device) -> dict[str, Any]:
    """Return what the machine is doing: load, time stolen by a hypervisor, clocks, temperature and throttling where known."""
    found: dict[str, Any] = {"unix_time_s": round(time.time(), 3), "load_average": list(os.getloadavg())}
    found["cpu_jiffies"] = _cpu_jiffies()
    with contextlib.suppress(OSError):
        found["governor"] = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    with contextlib.suppress(OSError, ValueError):
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
        found["cpu_khz"] = int(path.read_text())
    if device.kind == "cuda":
        found |= _gpu_conditions()
    return found


def instabilities(samples: Sequence[Sample], conditions: Mapping[str, Any]) -> list[str]:
    """Return one line for everything that makes the numbers doubtful, each with what to do about it."""
    found = []
    began, ended = conditions["began"], conditions["ended"]
    cores = os.cpu_count() or 1
    load = max(began["load_average"][0], ended["load_average"][0])
    if load > cores:
        found.append(f"load average {load:.1f} on {cores} cores: stop other programs and measure again")
    before, after = began.get("cpu_jiffies"), ended.get("cpu_jiffies")
    if before and after and after["total"] > before["total"]:
        stolen = (after["steal"] - before["steal"]) / (after["total"] - before["total"])
        if stolen > _STOLEN:
            found.append(f"the hypervisor took {stolen:.0%} of the processor time: measure on a machine of its own")
    if str(ended.get("governor", "performance")) not in ("performance", "schedutil"):
        found.append(f"the processor's governor is {ended['governor']}: set it to performance")
    throttle = str(ended.get("throttle_reasons", "")).lower()
    if throttle not in ("", "0x0000000000000000", "0x0000000000000001", "[n/a]"):
        found.append(f"the GPU's clocks are held back ({throttle}): let it cool down, and check power limits")
    shaky = sorted((s for s in samples if s.spread > _UNSTABLE), key=lambda s: -s.spread)
    for sample in shaky[:3]:
        names = [value for key, value in sample.labels.items() if key != "matrix"]  # a whole matrix names nothing
        at = ", ".join([*names, *(f"{k} {v:g}" for k, v in sample.arguments.items())])
        found.append(
            f"{sample.kind} ({at}) varies by {sample.spread:.0%} between quartiles: measure when the machine is quiet"
        )
    if len(shaky) > 3:
        found.append(f"{len(shaky) - 3} more measurements vary by more than {_UNSTABLE:.0%}")
    return found


def _cpu_jiffies() -> dict[str, int] | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle, waiting = numbers[3:5]
        mine = os.times()
        own = round((mine.user + mine.system) * os.sysconf("SC_CLK_TCK"))
        return {"total": sum(numbers), "steal": numbers[7], "busy": sum(numbers) - idle - waiting, "own": own}
    return None


def _gpu_conditions() -> dict[str, Any]:
    """Return clocks, temperature, power and throttling as nvidia-smi tells them; it is only asked, nothing is set."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    names = {
        "clocks.sm": "sm_mhz",
        "clocks.mem": "memory_mhz",
        "temperature.gpu": "celsius",
        "power.draw": "watts",
        "clocks_throttle_reasons.active": "throttle_reasons",
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(  # noqa: S603 - a fixed command
            [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.splitlines()[0]
        return dict(zip(names.values(), (part.strip() for part in line.split(",")), strict=False))
    return {}
