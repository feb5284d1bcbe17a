"""One run of a study: its fields in, its figures or the reason why there are none out.

Modelled: the question asked through the functions that commands call, with nouns that a process loads once; figures as flat plain
values; what cannot be answered told apart: it does not fit, it is refused, it failed. Ignored: where a run is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..api.plan import plan
from ..api.simulate import simulate
from ..base.errors import DoesNotFit, InputError, OutOfReach, one_line
from ..planner.offload.plan import OffloadPlan
from ..sim.offload.simulate import Prediction
from .fields import PLAN
from .keys import as_text, engine_of, machine_of, model_of, recording_of, rules_sha256

DONE, NO_ROOM, REFUSED, FAILED = "done", "does not fit", "refused", "failed"
STATES = (DONE, NO_ROOM, REFUSED, FAILED)
_NOUNS = ("model", "hardware", "trace", "engine")
_REASON_CHARS = 600


class Asked(NamedTuple):
    """A run that is to be made."""

    key: str
    fields: Mapping[str, Any]


class Answer(NamedTuple):
    """A run that was made."""

    key: str
    state: str
    reason: str | None
    figures: str
    """JSON text of the flat figures, sorted by name."""


def answer_all(predict: str, runs: Sequence[Asked], rules: str) -> list[Answer]:
    """Return the answers of runs; raises InputError where this process has other rules than the study began with."""
    if rules != rules_sha256():
        rule = "a worker has another version of moeplan than the one that started the study"
        raise InputError("--backend", rules_sha256()[:12], rule, "install the same one everywhere")
    return [answer(predict, run) for run in runs]


def answer(predict: str, run: Asked) -> Answer:
    """Return the answer of one run; whatever goes wrong in it is its answer."""
    try:
        found = _figures(predict, run.fields)
    except (DoesNotFit, OutOfReach) as error:
        missing = getattr(error, "missing_bytes", None)
        return Answer(run.key, NO_ROOM, str(error), as_text({} if missing is None else {"missing_bytes": missing}))
    except InputError as error:
        return Answer(run.key, REFUSED, str(error), "{}")
    except Exception as error:  # noqa: BLE001 (a mistake in one run is that run's answer, and the others are still made)
        return failed(run.key, f"{type(error).__name__}: {error}")
    wrong = [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        return failed(run.key, f"{wrong[0]} is {found[wrong[0]]}, no number")
    return Answer(run.key, DONE, None, as_text(found))


def failed(key: str, reason: str) -> Answer:
    """Return the answer of a run that came to nothing."""
    return Answer(key, FAILED, one_line(reason, _REASON_CHARS), "{}")


def _figures(predict: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {name: value for name, value in fields.items() if "." not in name and name not in _NOUNS}
    settings = {name: value for name, value in fields.items() if "." in name}
    model, trace = model_of(fields["model"]), recording_of(fields["trace"]) if "trace" in fields else None
    if predict == PLAN:  # which engine a machine is loaded with may follow from the target
        engine = fields.get("engine")
        found = plan(model, fields["hardware"], trace=trace, engine=engine, settings=settings, **options)
        if not isinstance(found, OffloadPlan):
            raise TypeError("a study plans for one device")
        drafts = (
            {}
            if found.drafting is None
            else {"draft_length": found.drafting["length"], "draft_gain": found.drafting["gain"]}
        )
        return (
            figures_of(found.best) | {"verdict": found.verdict, "num_candidates": found.tally.num_candidates} | drafts
        )
    machine = machine_of(fields["hardware"], engine_of(fields))
    return figures_of(simulate(model, machine, trace=trace, settings=settings, **options).prediction)


def figures_of(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction's figures as flat plain values: `x_low` and `x_high` of an interval, `x.y` of a table."""
    found: dict[str, Any] = {
        "schedule": prediction.schedule.name,
        "device_bytes": prediction.memory_breakdown.device_bytes,
        "host_bytes": prediction.memory_breakdown.host_bytes,
    }
    for each in dataclasses.fields(prediction.metrics):
        name, value = each.name, getattr(prediction.metrics, each.name)
        if name.endswith("_interval"):
            if value is not None:
                stem = name.removesuffix("_interval")
                found[f"{stem}_low"], found[f"{stem}_high"] = map(_plain, value)
        elif isinstance(value, Mapping):
            found |= {f"{name}.{part}": _plain(one) for part, one in value.items()}
        else:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
