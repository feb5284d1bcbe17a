"""Steps of whole servers and clusters, and what people publish of them.

    decoding      tokens of the step over its time
    prompts       the same, of a step of prompt tokens
    both mixed    a token waits for a decoding step and for its share of the prompts that come in meanwhile: batch / replies prompts a step

Modelled: steps one like another. Ignored: arrivals, queues and prefix caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....base.units import MS_PER_S
from ....planner.parallel.latency import chunk_of, mixed_s
from ....sim.parallel.simulate import EpPrediction
from ....specs.models import FLOPS_PER_WEIGHT, weight_format
from ..machine import NotExpressible
from .rows import Row
from .setup import Setup, set_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A figure of serving, predicted."""

    value: float
    relative_uncertainty: float
    bound: str
    roofline: float
    assumed: tuple[str, ...]


def predict_serving(row: Row) -> Served:
    """Return the prediction of a row of serving; raises NotExpressible with the reason, or a MoeplanError."""
    metric = row.metric.lower().replace("/", "_")
    if row.kind == "serving-mixed":
        return _mixed(row, metric)
    setup = set_up(row)
    step = predict_step(setup)
    value = _figure(metric, setup, step.step_s)
    return Served(value=value, relative_uncertainty=step.relative_uncertainty, bound=step.bound,
                  roofline=_figure(metric, setup, roofline_s(setup)), assumed=tuple(setup.assumed))  # fmt: skip


def predict_step(setup: Setup) -> EpPrediction:
    """Return the prediction of one step."""
    return setup.simulation().predict(setup.schedule, [setup.load()], check_memory=False)


def _figure(metric: str, setup: Setup, step_s: float) -> float:
    """Return a step's time as the row's metric counts it."""
    tokens = setup.step_tokens
    if metric.startswith(("step_ms", "tpot_ms", "ttft_ms", "itl_ms")):
        return step_s * MS_PER_S
    if metric.startswith(("tpot_s", "ttft_s")):
        return step_s
    if "node" in metric:
        return tokens / step_s / setup.nodes
    if "gpu" in metric:
        return tokens / step_s / setup.ranks
    if metric in ("tps", "tokens_per_s", "tps_total"):
        return tokens / step_s
    raise NotExpressible(f"an unknown metric: {metric[:60] or 'none'}")


def _mixed(row: Row, metric: str) -> Served:
    """Return the time between tokens, or the rate, of a server that takes prompts in while it decodes."""
    isl, osl = row.number("isl"), row.number("osl")
    decode = set_up(row, "decode")
    if isl is None or osl is None:
        raise NotExpressible("lengths of input and output are not stated")
    chunk = chunk_of(decode.profile, decode.schedule, decode.ranks_per_node)
    prompts = set_up(row, "prefill", max(1, int(min(chunk, 64 * isl))), max(1, round(isl)))
    step, chunk_step = predict_step(decode), predict_step(prompts)
    batch = decode.step_tokens
    per_token_s = isl / osl * batch / (prompts.tokens_per_rank * prompts.ranks)
    line = mixed_s(roofline_s(decode), roofline_s(prompts), per_token_s)
    seconds = mixed_s(step.step_s, chunk_step.step_s, per_token_s)
    wrong = (
        step.step_s * step.relative_uncertainty + chunk_step.step_s * per_token_s * chunk_step.relative_uncertainty
    ) / seconds
    assumed = tuple(dict.fromkeys((*decode.assumed, *prompts.assumed)))
    return Served(value=_figure(metric, decode, seconds), relative_uncertainty=wrong, bound=step.bound,
                  roofline=_figure(metric, decode, line), assumed=assumed)  # fmt: skip


def roofline_s(setup: Setup) -> float:
    """Return a step's seconds by one line of arithmetic: bytes of a rank over bandwidth, operations over the 16-bit peak for prompts."""
    model, device = setup.model, setup.profile.device
    if setup.prefill:
        active = model.num_moe_layers * model.top_k * model.expert_parameters
        active += sum(model.dense_parameters(layer) for layer in range(model.num_layers))
        return FLOPS_PER_WEIGHT * active * setup.tokens_per_rank / device.peak_flops_per_s["float16"].value
    dense = sum(model.dense_layer_bytes(layer, weight_format(setup.dense_bits)) for layer in range(model.num_layers))
    share = setup.schedule.parallel.group(setup.ranks_per_node)
    held = min(model.num_experts / setup.ranks, setup.tokens_per_rank * model.top_k)
    experts = model.num_moe_layers * held * model.expert_bytes(weight_format(setup.schedule.kernel.bits))
    cache = setup.tokens_per_rank * model.kv_bytes(setup.context, 2, 0)
    return float((dense / share + experts + cache) / device.memory_bytes_per_s.value)
