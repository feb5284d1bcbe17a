"""The same prediction as everywhere, for one report, and the two lines of arithmetic that it must beat.

Modelled: `sim.offload.simulate` on the report's setup; the one-liner is the bytes a step reads over the bandwidth of where they lie
(for a prompt, operations over the card's peak), alone and at 0.6 of it. Ignored: how good predictions are (`scores`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...base.errors import Internal, MoeplanError
from ...base.units import NS_PER_S
from ...sim.offload.metrics import Metrics
from ...sim.offload.simulate import Simulation
from ...specs.card_split import TENSOR
from ...specs.models import FLOPS_PER_WEIGHT, weight_format
from .machine import UNLIMITED_BYTES, NotExpressible
from .rows import Report
from .setup import Setup, set_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One report beside its prediction."""

    report: Report
    value: float | None
    low: float | None
    high: float | None
    bound: str | None
    roofline: float | None
    reason: str | None
    assumed: tuple[str, ...]
    metrics: Metrics | None = field(default=None, repr=False)
    """All figures of the prediction."""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured, as speeds (a time's ratio is turned over)."""
        return None if self.value is None else self.value / self.report.measured


def predict_report(report: Report) -> Predicted:
    """Return the prediction of `report`, or why there is none."""
    try:
        setup = set_up(report)
        return predict_setup(setup)
    except NotExpressible as error:
        return _none(report, str(error))
    except MoeplanError as error:
        return _none(report, str(error))


def predict_setup(setup: Setup) -> Predicted:
    """Return the prediction of a report that is set up."""
    report = setup.report
    prediction = simulation_of(setup).predict(setup.schedule)
    metrics, line = prediction.metrics, roofline(setup)
    value, between = metrics.prefill_tokens_per_s, metrics.prefill_tokens_per_s_interval
    if report.decodes:
        value, between = metrics.decode_tokens_per_s, metrics.decode_tokens_per_s_interval
    if value is None or between is None:
        raise Internal(f"a prediction of {report.id} without its figure")
    low, high = between
    if report.metric == "ttft_s":
        value, low, high, line = (setup.prompt_tokens / each for each in (value, high, low, line))
    return Predicted(
        report=report,
        value=value,
        low=low,
        high=high,
        bound=metrics.bound,
        roofline=line,
        reason=None,
        assumed=tuple(setup.assumed),
        metrics=metrics,
    )


def speed(setup: Setup) -> float:
    """Return the tokens a second of a report's steps, without intervals: the figure that constants are fitted by."""
    simulation = simulation_of(setup)
    outcome = simulation.run(simulation.resolve(setup.schedule))
    return setup.trace.num_tokens * NS_PER_S / int(outcome.step_end[-1])


def simulation_of(setup: Setup) -> Simulation:
    """Return what predicts a report that is set up, with as much device memory as it needs."""
    return Simulation(
        model=setup.model, profile=setup.profile, trace=setup.trace, dense_format=setup.dense_format, memory_bytes=int(UNLIMITED_BYTES),
        kv_bytes_per_value=setup.kv_bytes_per_value, split=setup.split, likewise=setup.likewise,
        drafting=setup.drafting, layers_off=setup.layers_off,
    )  # fmt: skip


def roofline(setup: Setup) -> float:
    """Return tokens a second by one line of arithmetic: bytes over bandwidth for a step, operations over the peak for a prompt."""
    model, profile, report = setup.model, setup.profile, setup.report
    fmt = setup.schedule.experts.bits
    cards = (
        profile.num_cards if setup.split is not None and setup.split.mode == TENSOR else 1
    )  # layers are computed one by one
    experts = (
        model.num_moe_layers
        * model.top_k
        * model.expert_bytes(weight_format(model.native_bits if fmt == "native" else fmt))
    )
    dense = sum(model.dense_layer_bytes(layer, setup.dense_format) for layer in range(model.num_layers))
    if not report.decodes:
        active = model.num_moe_layers * model.top_k * model.expert_parameters
        active += sum(model.dense_parameters(layer) for layer in range(model.num_layers))
        return cards * profile.device.peak_flops_per_s["float16"].value / (FLOPS_PER_WEIGHT * active)
    fast = cards * profile.device.memory_bytes_per_s.value
    slow = fast
    if report.kind.startswith("cpu"):
        slow = setup.host_bytes_per_s or fast
    elif report.kind.startswith("cache"):
        slow = profile.host_to_device.pinned_bytes_per_s.value
    return setup.batch / (dense / fast + experts / slow)


def _none(report: Report, reason: str) -> Predicted:
    return Predicted(
        report=report, value=None, low=None, high=None, bound=None, roofline=None, reason=reason[:300], assumed=()
    )
