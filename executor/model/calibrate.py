"""What operations cost inside runs of a real model: its own dense part, routers and experts, in place of stand-ins.

    text ──► the model generates under the schedules that calibrations run ──► rows of its timelines ──► samples ──► profile

The schedules, and how rows become samples, are those of `executor/calibration`; routing is the model's, and so are activations.
Modelled: prompts of several lengths and decoding; masks and positions, which the first layer's dense part finds to do and others
do not, belong to the step; a gate run early has a cost of its own. Microbenchmarks of the model's shapes give the surfaces that
these runs correct. Ignored: batches of requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...base.errors import InputError
from ...calibrate.costs.run_kind import DISK_LINK, TRANSIENT
from ...calibrate.microbenchmarks.measure import FULL, QUICK, Extent
from ...calibrate.samples import Sample
from ...sim.policies.state import Array
from ...sim.timeline import OP_DENSE, OP_HOST_STEP, ROW_END, ROW_LAYER, ROW_OP, ROW_START, ROW_STEP
from ...specs.models import ModelSpec
from ...specs.schedules.offload import OffloadSchedule
from ..calibration.calibrate import Calibration, calibrate_device
from ..calibration.host_overheads import fetching_costs, resident_costs
from ..calibration.run_samples import Key, add_host, calibrated_schedules, operations, samples_of, undisturbed
from .figures import replayed
from .loading.store import CheckedFile, Progress
from .session import Loaded, run_model

_PROMPTS = (6, 24)
"""Tokens of the prompts that are run, beside the longest that is asked for."""
_NEW = 10
_QUICK_PASSES, _QUICK_REPETITIONS = 3, 3
"""Of a quick calibration: a spell in which others use the machine spoils a pass, and the median of three passes hardly."""
_GUESSING = {"predictor__kind": "next-gate"}


def groups_of(spec: ModelSpec) -> list[range]:
    """Return for each MoE layer the decoder layers that end with it."""
    begins = (0, *(layer + 1 for layer in spec.moe_layers[:-1]))
    return [range(begin, layer + 1) for begin, layer in zip(begins, spec.moe_layers, strict=True)]


def extent_for(
    longest_prompt: int, longest_context: int, *, quick: bool, cores: bool = False, disk: bool = False
) -> Extent:
    """Return how much is measured for runs of prompts and contexts, in tokens, up to these."""
    known = (
        dataclasses.replace(QUICK, passes=_QUICK_PASSES, rounds=1, repetitions=_QUICK_REPETITIONS) if quick else FULL
    )

    def reach(sizes: Sequence[int], most: int) -> tuple[int, ...]:
        """Return sizes doubled on until they reach `most`."""
        found = list(sizes)
        while found[-1] < most:
            found.append(min(2 * found[-1], most))
        return tuple(found)

    return dataclasses.replace(
        known,
        expert_tokens=reach(known.expert_tokens, longest_prompt),
        group_tokens=reach(known.group_tokens, longest_prompt),
        pass_tokens=reach(known.pass_tokens, longest_prompt),
        contexts=reach((32, *known.contexts), longest_context),
        host_cores=cores,
        disk=disk,
    )


def long_enough(texts: Sequence[Sequence[int]], option: str) -> list[Sequence[int]]:
    """Return the texts that prompts can be cut from; raises InputError where there is none."""
    found = [ids for ids in texts if len(ids) >= max(_PROMPTS)]
    if not found:
        most = max(map(len, texts), default=0)
        raise InputError(option, f"{most} tokens", f"runs of a model need {max(_PROMPTS)} at least", "give more text")
    return found


def calibrate_model(
    loaded: Loaded,
    texts: Sequence[Sequence[int]],
    bits: Sequence[str],
    *,
    longest_prompt: int,
    longest_context: int,
    quick: bool,
    cores: bool = False,
    disk: bool = False,
    out: Any = None,
    samples_out: Any = None,
    seconds: float | None = None,
    turns: Sequence[Callable[[], None]] = (),
    progress: Progress,
) -> Calibration:
    """Return the calibration of the model's device by runs of the model itself over `texts`, ids, written to `out` where that is given.

    longest_prompt, longest_context: tokens up to which the profile reaches. cores, disk: schedules compute on the host's cores, read a
    disk. turns: what the calibration's runs take turns with, once each, so that both meet the machine as it was in the same minutes.
    Raises InputError for texts shorter than a short prompt.
    """
    texts = long_enough(texts, "--text")
    extent = extent_for(longest_prompt, longest_context, quick=quick, cores=cores, disk=disk)
    return calibrate_device(
        loaded.device.kind, models=[loaded.spec], bits=bits, out=out, samples_out=samples_out, seconds=seconds, extent=extent, quick=quick,
        own=partial(model_samples, loaded, texts, bits, longest_prompt=longest_prompt, turns=turns, progress=progress),
        own_name=f"runs of {loaded.assembled.folder}", progress=progress,
    )  # fmt: skip


def model_samples(
    loaded: Loaded, texts: Sequence[Sequence[int]], bits: Sequence[str], *, longest_prompt: int, turns: Sequence[Callable[[], None]] = (),
    progress: Progress,
) -> list[Sample]:  # fmt: skip
    """Return samples of kinds run_expert, run_dense, run_head, run_copy, run_grouped and host from the model's own runs.

    texts: ids of which prompts are the beginnings, one after the other. turns: each is called once, and the runs are made once more
    after it.
    """
    found: dict[Key, list[float]] = {}
    _run_all(loaded, texts, bits, longest_prompt, found, progress)
    for turn in turns:
        turn()
        _run_all(loaded, texts, bits, longest_prompt, found, progress)
    return samples_of(found)


def _run_all(
    loaded: Loaded, texts: Sequence[Sequence[int]], bits: Sequence[str], longest_prompt: int, found: dict[Key, list[float]],
    progress: Progress,
) -> None:  # fmt: skip
    """Run the model under every calibrated schedule and add what its operations took to `found`."""
    spec, groups = loaded.spec, groups_of(loaded.spec)
    every = np.zeros((spec.num_moe_layers, spec.num_experts), np.int64)
    lengths = sorted({*_PROMPTS, min(longest_prompt, max(map(len, texts)))})
    prompts = [_beginning(texts, number, length) for number, length in enumerate(lengths)]
    for kind in bits:
        schedules = _schedules(loaded, kind)
        for number, (mode, schedule) in enumerate(schedules):
            progress(number, len(schedules), f"runs of the model in {kind} bits")
            run = run_model(loaded, schedule, prompts, max_new_tokens=_NEW, popularity=every)
            given = replayed(run, schedule)
            rows = _with_passes_apart(undisturbed(run.execution()), groups)
            if len(run.guess_ns):
                add_host(found, {"guess": run.guess_ns.tolist()})
            if mode is None:
                add_host(found, resident_costs(rows, loaded.device.asynchronous))
                continue
            if mode[0] == TRANSIENT and schedule.predictor.kind == "none":
                add_host(found, fetching_costs(rows))
            read = isinstance(loaded.store(kind, on_disk=False), CheckedFile)
            for key, seconds in operations(spec, groups, loaded.dtype.itemsize, given, kind, mode, rows).items():
                found.setdefault(_of_link(key, read), []).extend(seconds)


def _of_link(key: Key, read: bool) -> Key:
    """Return a kind of operation, copies that are reads of a file marked as such: theirs are a disk's times."""
    kind, labels, arguments = key
    return (kind, (*labels, ("link", DISK_LINK)), arguments) if read and kind == "run_copy" else key


def _schedules(loaded: Loaded, bits: str) -> list[tuple[tuple[str, str] | None, OffloadSchedule]]:
    """Return the schedules that calibrations run, as this model can be run by them."""
    early = loaded.assembled.pre_gates
    guessing = _GUESSING if early is None else {"predictor__kind": "pre-gate"}
    found = calibrated_schedules(loaded.spec, bits, guessing=guessing)
    if early is not None and early.distance > 1:  # run without looking ahead
        found = [(mode, one) for mode, one in found if one.predictor.kind == "none"]
    if isinstance(loaded.store(bits, on_disk=False), CheckedFile):  # it is only read
        found = [(mode, one.with_options(copy__write_back=False)) for mode, one in found]
    return found


def _beginning(texts: Sequence[Sequence[int]], number: int, length: int) -> Sequence[int]:
    """Return the first `length` ids of a text, of the `number`-th that is long enough."""
    enough = [ids for ids in texts if len(ids) >= length] or [max(texts, key=len)]
    return enough[number % len(enough)][:length]


def _with_passes_apart(rows: Array, groups: Sequence[range]) -> Array:
    """Return rows in which what a pass costs beside its layers is the step's, not the first layer's.

    The first layer's dense part also embeds tokens and makes masks and positions. As much of it as other layers like it took
    remains; the rest lengthens the step's own row. Where no other MoE layer has as many layers before it, rows stay as they are.
    """
    alike = [column for column, group in enumerate(groups) if column and len(group) == len(groups[0])]
    if not alike:
        return rows
    rows = rows.copy()
    dense, steps = rows[:, ROW_OP] == OP_DENSE, rows[:, ROW_OP] == OP_HOST_STEP
    lengths = rows[:, ROW_END] - rows[:, ROW_START]
    for number in np.unique(rows[:, ROW_STEP]):
        mine = rows[:, ROW_STEP] == number
        others = lengths[mine & dense & np.isin(rows[:, ROW_LAYER], alike)]
        if not len(others):
            continue
        middle = int(np.median(others))
        for at in np.flatnonzero(mine & dense & (rows[:, ROW_LAYER] == 0)):
            apart = max(0, int(lengths[at]) - middle)
            rows[at, ROW_START] += apart
            rows[np.flatnonzero(mine & steps), ROW_END] += apart
    return rows
