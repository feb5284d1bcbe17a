"""moeplan: rehearse Mixture-of-Experts inference before you run it.

    result = moeplan.simulate("gpt-oss-120b", "rtx-4090 + ryzen-9-7950x + ddr5-5600x2:96GiB", quant="MXFP4_MOE")
    result.metrics.decode_tokens_per_s

Names are found when they are asked for: importing this package loads nothing else. Ignored: everything that is not for others to
call; it may change between versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base.version import __version__

__all__ = [
    "CheckResult",
    "Diagnosis",
    "DoesNotFit",
    "FieldReproduction",
    "FitResult",
    "InputError",
    "LoadProfile",
    "ModelSpec",
    "MoeplanError",
    "OffloadPlan",
    "OffloadRequest",
    "OffloadSchedule",
    "ParallelPlan",
    "ParallelRequest",
    "ParallelResult",
    "Profile",
    "Reproduction",
    "RoutingTrace",
    "SimulationResult",
    "StudyResult",
    "Validation",
    "__version__",
    "check",
    "diagnose",
    "emit",
    "fit",
    "load_machine",
    "load_model",
    "load_trace",
    "plan",
    "reproduce",
    "simulate",
    "simulate_parallel",
    "sweep",
    "validate",
]

# Name → module below this package: a new public name is a line here, in `__all__` and below.
_HOMES = {
    "CheckResult": "baselines.check",
    "Diagnosis": "diagnosis.diagnose",
    "DoesNotFit": "base.errors",
    "FieldReproduction": "api.reproduce",
    "FitResult": "api.fit",
    "InputError": "base.errors",
    "LoadProfile": "traces.recording",
    "ModelSpec": "specs.models",
    "MoeplanError": "base.errors",
    "OffloadPlan": "planner.offload.plan",
    "OffloadRequest": "planner.offload.plan",
    "OffloadSchedule": "specs.schedules.offload",
    "ParallelPlan": "planner.parallel.plan",
    "ParallelRequest": "planner.parallel.case",
    "ParallelResult": "api.parallel",
    "Profile": "specs.machines.profile",
    "Reproduction": "papers.cells",
    "RoutingTrace": "traces.recording",
    "SimulationResult": "api.simulate",
    "StudyResult": "studies.sweep",
    "Validation": "executor.validation.validated",
    "check": "baselines.check",
    "diagnose": "api.diagnose",
    "fit": "api.fit",
    "emit": "api.emit",
    "load_machine": "api.load",
    "load_model": "api.load",
    "load_trace": "api.load",
    "plan": "api.plan",
    "reproduce": "api.reproduce",
    "simulate": "api.simulate",
    "simulate_parallel": "api.parallel",
    "sweep": "studies.sweep",
    "validate": "api.validate",
}

if TYPE_CHECKING:
    from .api.diagnose import diagnose
    from .api.emit import emit
    from .api.fit import FitResult, fit
    from .api.load import load_machine, load_model, load_trace
    from .api.parallel import ParallelResult, simulate_parallel
    from .api.plan import plan
    from .api.reproduce import FieldReproduction, reproduce
    from .api.simulate import SimulationResult, simulate
    from .api.validate import validate
    from .base.errors import DoesNotFit, InputError, MoeplanError
    from .baselines.check import CheckResult, check
    from .diagnosis.diagnose import Diagnosis
    from .executor.validation.validated import Validation
    from .papers.cells import Reproduction
    from .planner.offload.plan import OffloadPlan, OffloadRequest
    from .planner.parallel.case import ParallelRequest
    from .planner.parallel.plan import ParallelPlan
    from .specs.machines.profile import Profile
    from .specs.models import ModelSpec
    from .specs.schedules.offload import OffloadSchedule
    from .studies.sweep import StudyResult, sweep
    from .traces.recording import LoadProfile, RoutingTrace
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
