"""What an engine makes of a schedule: the one its files make it run, found without writing any.

Modelled: the same rendering that writes the files says which schedule they run; None where an engine takes no such schedule. So what is
predicted for an engine is what is emitted for it. Ignored: flags that change nothing in a schedule.
"""

from __future__ import annotations

from collections.abc import Callable

from ...base.errors import InputError, UnknownName
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import ExpertParallelSchedule
from .choices import EpChoice, Placement
from .targets import PARALLEL_TARGETS

Told = Callable[[ExpertParallelSchedule, Placement], ExpertParallelSchedule | None]
# Engines by the names of their kernels.
_NAMES = {"tensorrt-llm": "trtllm"}


def parallel_target(engine: str) -> str:
    """Return the name by which plans for many devices are written for an engine; raises UnknownName."""
    name = _NAMES.get(engine, engine)
    if name not in PARALLEL_TARGETS:
        raise UnknownName("--for", engine, PARALLEL_TARGETS)
    return name


def kernel_name(engine: str) -> str:
    """Return the name by which the kernels of an engine are known."""
    return next((name for name, target in _NAMES.items() if engine == target), engine)


def runs_of(engine: str, model: ModelSpec, *, decode: bool) -> Told:
    """Return a function from a schedule and its placement to what `engine` would run; raises UnknownName."""
    target = PARALLEL_TARGETS[parallel_target(engine)]

    def told(schedule: ExpertParallelSchedule, placement: Placement) -> ExpertParallelSchedule | None:
        if schedule.parallel.experts != "expert":
            return None
        try:
            choice = EpChoice(name=schedule.name, placement=placement, schedule=schedule, decode=decode)
            runs = target.render(choice, model).runs
        except InputError:
            return None
        return runs if isinstance(runs, ExpertParallelSchedule) else None

    return told
