"""The cost model tabulated once per run into whole nanoseconds.

Modelled: every duration is rounded up to a nanosecond here and nowhere else. A host that itself computes (a CPU device)
pays its launches inside the kernels. Ignored: uncertainty, which travels beside the tables in `CostSources`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..calibrate.cost_model import CostModel, Estimate
from ..schedule import OffloadSchedule
from ..specs import ModelSpec, WeightFormat
from ..units import seconds_to_ns
from .costs import CostTables, chunk_sizes, rate_table
from .policies.state import Array
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSources:
    """Where a run's costs come from: one estimate for each kind of activity, and the largest of each."""

    estimates: dict[str, Estimate]

    def relative_uncertainty(self, kind: str) -> float:
        """Return the relative uncertainty of one kind of activity, 0 where the run has none of it."""
        found = self.estimates.get(kind)
        return found.relative_uncertainty if found is not None else 0.0


def tabulate(costs: CostModel, model: ModelSpec, schedule: OffloadSchedule, workload: Workload,
             fmt: WeightFormat, low: WeightFormat | None = None) -> tuple[CostTables, CostSources]:  # fmt: skip
    """Return the run's cost tables, with experts stored as `fmt` or, some, as `low`, and where they come from.

    Raises MissingCalibration where the profile has no cost for what the schedule does.
    """
    host = {
        "host_step": _override(schedule.host.per_step_s, costs.host_per_step()),
        "host_layer": _override(schedule.host.per_layer_s, costs.host_per_layer()),
        "host_kernel": _override(schedule.host.per_kernel_s, costs.host_per_kernel()),
        "host_transfer": _override(schedule.host.per_transfer_s, costs.host_per_transfer()),
    }
    launch_ns = seconds_to_ns(host["host_kernel"].seconds)
    inside_ns = launch_ns if costs.host_shares_compute else 0
    # A prefill pass computes tokens of one request; a decode pass one token of each of its requests.
    requests = np.where(workload.step_phase == 0, 1, workload.step_tokens)
    kinds = np.stack([workload.step_tokens, workload.step_context, requests], 1)
    classes, step_class = np.unique(kinds, axis=0, return_inverse=True)
    dense_ns, head_ns, dense, head = _dense_tables(costs, model, classes)
    grouped = schedule.kernel.grouping == "grouped"
    formats = (fmt,) if low is None else (fmt, low)
    kernel_ns, shares = _expert_table(costs, formats, workload, grouped=grouped, inside_ns=inside_ns)
    base = costs.grouped_base() if grouped else None
    sizes = [model.expert_bytes(each) for each in formats]
    chunks = [chunk_sizes(size, schedule.copy.chunk_bytes) for size in sizes]
    pinned = schedule.copy.pinned
    copies = [[costs.host_to_device(size, pinned=pinned) for size in (first, last)] for _, first, last in chunks]
    backs = [costs.device_to_host(size, pinned=pinned) for size in sizes]
    cpu_ns, cpu = np.zeros((len(formats), 0), np.int64), None
    if schedule.kernel.miss != "fetch":
        runs = [[costs.cpu_expert(n, each) for n in range(1, workload.max_expert_tokens + 1)] for each in formats]
        cpu_ns, cpu = np.array([[0] + [_at_least_one(run) for run in row] for row in runs], np.int64), runs[0][0]
    reads = [costs.disk_to_host(size) for size in sizes] if schedule.copy.host_experts is not None else []
    tables = CostTables(
        step_class=step_class.astype(np.int64).ravel(),
        dense_ns=dense_ns + inside_ns,
        head_ns=head_ns + inside_ns,
        kernel_ns=kernel_ns,
        grouped_ns=np.array([seconds_to_ns(base.seconds) + inside_ns if base is not None else 0], np.int64),
        expert_format=_formats(schedule, workload),
        expert_bytes=np.array(sizes, np.int64),
        num_chunks=np.array([count for count, _, _ in chunks], np.int64),
        chunk_bytes=np.array([[first, last] for _, first, last in chunks], np.int64),
        chunk_ns=np.array([[_at_least_one(copy) for copy in row] for row in copies], np.int64)
        + np.array([0, seconds_to_ns(costs.transfer_wait_s())], np.int64),
        back_ns=np.array([_at_least_one(back) for back in backs], np.int64),
        cpu_ns=cpu_ns,
        disk_ns=np.array([_at_least_one(read) for read in reads] or [0] * len(formats), np.int64),
        host_ns=np.array(
            [seconds_to_ns(host["host_step"].seconds), seconds_to_ns(host["host_layer"].seconds), launch_ns - inside_ns,
             seconds_to_ns(host["host_transfer"].seconds)], np.int64),
        rate=rate_table(costs.rate_fraction),
    )  # fmt: skip
    estimates = {
        "dense": dense,
        "head": head,
        "expert": shares[-1],
        "copy": copies[0][0],
        "write_back": backs[0],
    } | host
    if cpu is not None:
        estimates["cpu"] = cpu
    if reads:
        estimates["disk"] = reads[0]
    return tables, CostSources(estimates=estimates)


def _expert_table(costs: CostModel, formats: tuple[WeightFormat, ...], workload: Workload, *, grouped: bool,
                  inside_ns: int) -> tuple[Array, list[Estimate]]:  # fmt: skip
    """Return (kernel_ns [num_formats, max_expert_tokens + 1], the estimates of the first format from one token on)."""
    counts = range(1, workload.max_expert_tokens + 1)
    table = [
        [costs.grouped_item(n, fmt) if grouped else costs.expert_kernel(n, fmt) for n in counts] for fmt in formats
    ]
    extra = 0 if grouped else inside_ns
    rows = [[0] + [_at_least_one(share) + extra for share in row] for row in table]
    return np.array(rows, np.int64), table[0]


def _formats(schedule: OffloadSchedule, workload: Workload) -> Array:
    """Return int64 [num_layers * num_experts]: the format each expert is stored in, 1 for each layer's least popular ones."""
    formats = np.zeros((workload.num_layers, workload.num_experts), np.int64)
    few = round(schedule.experts.low_fraction * workload.num_experts)
    least = np.argsort(workload.popularity, axis=1, kind="stable")[:, :few]
    np.put_along_axis(formats, least, 1, axis=1)
    return formats.ravel()


def _dense_tables(costs: CostModel, model: ModelSpec, classes: Array) -> tuple[Array, Array, Estimate, Estimate]:
    """Return (dense_ns [num_classes, num_layers], head_ns [num_classes]) and one estimate of each.

    Layers without experts run before the MoE layer that follows them; those after the last one belong to the head.
    """
    groups: list[list[int]] = []
    begin = 0
    for layer in model.moe_layers:
        groups.append(list(range(begin, layer + 1)))
        begin = layer + 1
    tail = range(begin, model.num_layers)
    dense_ns = np.zeros((len(classes), len(groups)), np.int64)
    head_ns = np.zeros(len(classes), np.int64)
    dense = head = costs.head(1)
    for row, (tokens, context, requests) in enumerate(classes.tolist()):
        for column, group in enumerate(groups):
            parts = [costs.dense_layer(layer, tokens, context, requests) for layer in group]
            dense = parts[-1]
            dense_ns[row, column] = sum(_at_least_one(part) for part in parts)
        head = costs.head(requests)  # logits are wanted of each request's last token only
        head_ns[row] = _at_least_one(head)
        head_ns[row] += sum(_at_least_one(costs.dense_layer(layer, tokens, context, requests)) for layer in tail)
    return dense_ns, head_ns, dense, head


def typical_tokens(workload: Workload) -> float:
    """Return the tokens that an expert gets when it is used, on average over decoding where there is any."""
    decode = np.repeat(workload.steps.step_phase == 1, workload.num_layers)
    counts = np.diff(workload.steps.visit_start)
    mine = np.repeat(decode, counts) if decode.any() else np.ones(workload.num_expert_visits, bool)
    return float(workload.steps.visit_tokens[mine].mean())


def _override(seconds: float | None, estimate: Estimate) -> Estimate:
    """Return the profile's estimate, or the user's own number in its place (then without uncertainty)."""
    if seconds is None:
        return estimate
    return Estimate(seconds=seconds, source="user", bound="host", relative_uncertainty=0.0)


def _at_least_one(estimate: Estimate) -> int:
    """Return an activity's nanoseconds; nothing that runs takes none."""
    return max(1, seconds_to_ns(estimate.seconds))
