"""Run a plan, or a grid of schedules, beside its prediction: the function behind `moeplan validate`. It needs torch.

Modelled: plans just made, documents, files; grids from files; a profile of this device, or one measured in the same run. Ignored:
running (`executor/`), pages.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError, UnknownName
from ..sim.policies.policy_file import load_policy
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import load_hardware
from .emit import PlanLike, as_document
from .load import Recording, as_routing, bundled_trace_path, planned_rank_recording
from .plan import Progress
from .requests import planned_routing, prior_lengths
from .settings import SettingsLike, open_settings
from .subject import bytes_of

if TYPE_CHECKING:
    from ..executor.validation.rank_results import RanksValidation
    from ..executor.validation.validated import Validation

DEVICES = ("cpu", "cuda")


def validate(
    plan: PlanLike | None = None,
    *,
    grid: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | Profile | None = None,
    device: str = "cpu",
    trace: str | os.PathLike[str] | Recording | None = None,
    baselines: int = 2,
    steps: int | None = None,
    seconds: float = 120.0,
    memory: int | str | None = None,
    repeats: int = 3,
    settings: SettingsLike = None,
    policy: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Validation | RanksValidation:
    """Return predicted and measured of a plan's best schedule and its rivals, or of every schedule of a grid.

    An expert-parallel plan runs as so many processes of this machine as it has ranks, which exchange tokens.

    plan: a plan just made, its document or its file; grid: a .yaml of configurations; one of the two. profile: of this device; None: it
    is measured in the same run, or, for ranks, the machine that the plan was made for. trace: the recording that the plan was made
    from; None: the bundled one, or the routing that was made up for the plan. baselines: rivals to run beside it. steps: forward
    passes to run; None: 64, or what ends in about `seconds` seconds. memory: bytes that runs may take, or a text such as "6GiB".
    settings: constants of the profile, `{"machine.host.per_layer_s": "50us"}`. policy: the file with rules of one's own that the plan or
    the grid names; it is run.

    Raises InputError without torch, for a plan that cannot be run here or of another recording, DoesNotFit where nothing fits.
    """
    if (plan is None) == (grid is None):
        raise InputError("validate", "nothing" if plan is None else "both", "a plan or a grid is needed", "name one")
    changes = open_settings(settings)
    for prefix in ("model", "request", "schedule"):
        changes.refuse(prefix, "what is run is the plan's or the grid's own")
    if profile is None:
        changes.refuse("machine", "without --profile the machine is measured")
        known = None
    else:
        known = changes.changed_machine(profile if isinstance(profile, Profile) else load_hardware(profile))
    memory_bytes = bytes_of(memory, "--memory")
    for option, value in (("--trace", trace), ("--steps", steps), ("--memory", memory)):
        if plan is None and value is not None:
            raise InputError(option, value, "counts for a plan; a grid's file says it for itself", "leave it out")
    if policy is not None:
        load_policy(policy)
    check_torch()
    check_device(device)
    from ..executor.running.execute import silent

    report = progress or silent
    if plan is None:
        from ..executor.validation.grid import read_grid, trace_path
        from ..executor.validation.validate import validate_grid

        asked = read_grid(os.fspath(grid or ""))
        return validate_grid(asked, as_routing(trace_path(asked.trace, bundled_trace_path())), profile=known, device=device,
                             progress=report)  # fmt: skip
    from ..executor.validation.validate_plan import validate_plan
    from ..specs.plans.document import EXPERT_PARALLEL, check_plan, plan_kind
    from ..specs.provenance import model_of
    from ..traces.match import check_match

    document = as_document(plan)
    if plan_kind(document) == EXPERT_PARALLEL:
        check_plan(document, EXPERT_PARALLEL)
        for option, value in (("--policy", policy), ("--device", None if device == "cpu" else device)):
            if value is not None:
                raise InputError(
                    option, value, "counts for plans of one device; ranks run on this machine's cores", "leave it out"
                )
        return _ranks(
            document, trace, known, baselines=baselines, steps=steps, seconds=seconds, memory_bytes=memory_bytes, repeats=repeats,
            progress=report,
        )  # fmt: skip
    model = model_of(document)
    replayed = "bundled" if trace is None and prior_lengths(document) is None else trace
    recording = planned_routing(document, model, replayed).recording
    check_match(model, recording)
    return validate_plan(
        document, model, recording, profile=known, device=device, num_baselines=baselines, steps=steps, repeats=repeats,
        seconds=seconds, memory_bytes=memory_bytes, progress=report,
    )  # fmt: skip


def _ranks(
    document: dict[str, Any],
    trace: str | os.PathLike[str] | Recording | None,
    profile: Profile | None,
    *,
    baselines: int,
    steps: int | None,
    seconds: float,
    memory_bytes: int | None,
    repeats: int,
    progress: Progress,
) -> RanksValidation:
    """Return predicted and measured of an expert-parallel plan."""
    from ..executor.validation.ranks import validate_ranks
    from ..specs.provenance import machine_of, model_of

    model = model_of(document)
    return validate_ranks(
        document, model, planned_rank_recording(document, trace, model), profile=profile or machine_of(document),
        num_baselines=baselines, steps=steps, repeats=repeats, seconds=seconds, memory_bytes=memory_bytes, progress=progress,
    )  # fmt: skip


def check_device(name: str) -> None:
    """Return nothing; raises InputError for a device that is not there, UnknownName for one that nobody knows."""
    if name not in DEVICES:
        raise UnknownName("--device", name, DEVICES)
    if name == "cuda":
        from ..devices.device import cuda_is_present

        if not cuda_is_present():
            raise InputError("--device", name, "torch finds no CUDA device", "use --device cpu, or another machine")


def check_torch() -> None:
    """Return nothing; raises InputError where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("torch", "(absent)", "running schedules needs it", "pip install 'moeplan[run]'")
