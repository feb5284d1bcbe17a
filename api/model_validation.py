"""Measure a real model, and run it beside its prediction: functions behind `moeplan calibrate --text` and `moeplan validate --checkpoint`.

Modelled: checkpoints, files of text and prompts, plans and profiles. They need torch and transformers. Ignored: the runs themselves
(`executor/`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base.errors import InputError
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import load_hardware
from .emit import PlanLike, as_document
from .model_folder import check_can_run, gates_in, model_in, read_bytes, read_texts
from .plan import Progress
from .run import check_planned_for, popularity_in
from .settings import SettingsLike, open_settings
from .subject import bytes_of

if TYPE_CHECKING:
    from ..executor.calibration.calibrate import Calibration
    from ..executor.validation.validated import Validation

_LONGEST_PROMPT, _LONGEST_CONTEXT = 256, 1024
"""Tokens up to which a profile from runs of a model reaches."""


def calibrate_checkpoint(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    bits: Sequence[str],
    device: str = "cpu",
    quick: bool = False,
    samples: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Return the calibration of a device by runs of the model in the folder `model` over texts; profile and samples are written.

    bits: weight formats of experts. seconds: about how long the microbenchmarks may take. Raises InputError for a checkpoint, text or
    format that cannot be used, DoesNotFit where memory does not suffice.
    """
    check_can_run(device)
    from ..executor.calibration.calibrate import check_names
    from ..executor.model.calibrate import calibrate_model, long_enough
    from ..executor.model.loading.text import Text
    from ..executor.model.session import open_model, silent

    check_names(output, samples)
    spec = model_in(model)
    given = [ids for _, ids in read_texts(texts, Text(model, spec.vocab_size))]
    long_enough(given, "--text")
    report = progress or silent
    with open_model(model, device=device, progress=report) as loaded:
        return calibrate_model(
            loaded, given, bits, longest_prompt=_LONGEST_PROMPT, longest_context=_LONGEST_CONTEXT, quick=quick, out=output,
            samples_out=samples, seconds=seconds, disk=True, progress=report,
        )  # fmt: skip


def validate_checkpoint(
    plan: PlanLike,
    model: str | os.PathLike[str],
    prompts: Sequence[str | os.PathLike[str]],
    *,
    max_new_tokens: int = 64,
    profile: str | os.PathLike[str] | Profile | None = None,
    device: str = "cpu",
    trace: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    baselines: int = 2,
    repeats: int = 3,
    memory: int | str | None = None,
    settings: SettingsLike = None,
    progress: Progress | None = None,
) -> Validation:
    """Return predicted and measured of the model in the folder `model` under an offload plan's best schedule and its rivals.

    prompts: files of text to continue. profile: of this device; None: the model is measured in the same run. trace: a recording of this
    model, from which static caches know what is popular. gates: trained gates that guess. memory: bytes that runs may take; None: most
    of what is free, with the plan's cache sizes, since prompts here may be longer than those that were planned for.

    Raises InputError for what cannot be run, DoesNotFit where memory does not suffice, MissingCalibration where the profile does not reach.
    """
    check_can_run(device)
    changes = open_settings(settings)
    for prefix in ("model", "request", "schedule"):
        changes.refuse(prefix, "what is run is the plan's own")
    known = None
    if profile is None:
        changes.refuse("machine", "without --profile the model is measured")
    else:
        known = changes.changed_machine(profile if isinstance(profile, Profile) else load_hardware(profile))
    document = as_document(plan)
    if document.get("kind") != "offload":
        raise InputError(
            "plan.kind", document.get("kind"), "only plans for one device can be run", "plan --mode offload"
        )
    from ..executor.model.calibrate import long_enough
    from ..executor.model.loading.text import Text
    from ..executor.model.session import check_prompts, silent
    from ..executor.validation.validate_model import validate_model

    spec = model_in(model)
    check_planned_for(document, spec, "the plan")
    text = Text(model, spec.vocab_size)
    asked = [text.ids(read_bytes(path, "--prompt-file"), "--prompt-file") for path in prompts]
    check_prompts(asked, max_new_tokens)
    if known is None:
        long_enough(asked, "--prompt-file")
    return validate_model(
        document, model, asked, max_new_tokens=max_new_tokens, model=spec, profile=known, device=device, num_baselines=baselines,
        repeats=repeats, memory_bytes=bytes_of(memory, "--memory"), gates=gates_in(gates, spec),
        popularity=None if trace is None else popularity_in(trace, spec), stop=text.stop, progress=progress or silent,
    )  # fmt: skip
