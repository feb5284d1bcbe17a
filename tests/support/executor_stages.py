"""Small models, recordings and runs that the executor's tests share."""

from __future__ import annotations

import numpy as np
import torch

from moeplan.base.errors import InputError
from moeplan.devices.dense_part import DensePart
from moeplan.devices.device import CpuDevice
from moeplan.devices.stores.host import make_store
from moeplan.executor.running.execute import forced_steps, largest_pass
from moeplan.executor.running.supported import check_runnable
from moeplan.kernels import reference
from moeplan.sim.offload.costs import CostTables, chunk_sizes
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.offload.simulators import fresh_state
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.sim.policies.offload import begin_step, decide_layer_step
from moeplan.sim.policies.state import make_decision, needs_prices
from moeplan.specs.models import AttentionSpec, ModelSpec
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import PRESETS
from moeplan.traces.format import RoutingTrace
from strategies import capacities_of, config_of, make_costs, make_trace


def small_model(
    *, num_layers: int = 3, num_experts: int = 8, top_k: int = 2, hidden: int = 64, inter: int = 64, **changes: object
) -> ModelSpec:
    """Return a model of a few hundred kilobytes whose every layer has experts."""
    attention = AttentionSpec(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16)
    fields: dict[str, object] = {
        "name": "small",
        "family": "mixtral",
        "hidden_size": hidden,
        "num_layers": num_layers,
        "moe_layers": tuple(range(num_layers)),
        "num_experts": num_experts,
        "top_k": top_k,
        "expert_intermediate_size": inter,
        "gated": True,
        "vocab_size": 96,
        "attention": attention,
    }
    return ModelSpec(**(fields | changes))  # type: ignore[arg-type]


def small_trace(
    seed: int = 0, *, num_layers: int = 3, num_experts: int = 8, top_k: int = 2, guesses: int = 2
) -> RoutingTrace:
    """Return a recording of three requests, the last of which decodes only."""
    return make_trace(np.random.default_rng(seed), num_layers=num_layers, num_experts=num_experts, top_k=top_k,
                      requests=[(5, 6), (3, 7), (0, 5)], guesses=guesses, skew=0.3)  # fmt: skip


def preset(name: str, **changes: object) -> OffloadSchedule:
    """Return a preset at 32 bits, with three cached experts a layer where it caches any."""
    schedule = PRESETS[name]()
    if schedule.cache.policy != "none":
        schedule = schedule.with_options(cache__experts_per_layer=8 if name == "resident" else 3)
    if schedule.copy.host_experts is not None:
        schedule = schedule.with_options(copy__host_experts=10)
    return schedule.with_options(**({"experts__bits": "32"} | changes))


def runs_for_real(schedule: OffloadSchedule) -> bool:
    """Return whether the executor runs the schedule, or says that it does not."""
    try:
        check_runnable(schedule)
    except InputError:
        return False
    return True


RUNNABLE = tuple(name for name in PRESETS if runs_for_real(preset(name)))
ONLY_SIMULATED = tuple(name for name in PRESETS if name not in RUNNABLE)


def run_input(schedule: OffloadSchedule, trace: RoutingTrace) -> RunInput:
    """Return what the executor takes."""
    workload = build_workload(trace, schedule.workload, reset_per_request=schedule.cache.reset == "request",
                              with_next_use=schedule.cache.policy == "belady")  # fmt: skip
    config = config_of(schedule, trace)
    return RunInput(
        schedule=schedule,
        config=config,
        workload=workload,
        capacities=capacities_of(schedule, trace),
        weighed=weighed(workload, schedule) if needs_prices(config) or schedule.experts.low_bits else None,
    )


def weighed(workload: Workload, schedule: OffloadSchedule) -> CostTables:
    """Return made-up costs among which the host's cores are sometimes the cheaper ones."""
    costs = make_costs(np.random.default_rng(1), workload, schedule)
    return costs._replace(cpu_ns=costs.cpu_ns // 4)


def tables_of(given: RunInput, *expert_bytes: int) -> CostTables:
    """Return made-up durations with the sizes that the executor really moves."""
    costs = make_costs(np.random.default_rng(0), given.workload, given.schedule)
    chunks = [chunk_sizes(size, given.schedule.copy.chunk_bytes) for size in expert_bytes]
    return costs._replace(
        expert_bytes=np.array(expert_bytes),
        num_chunks=np.array([count for count, _, _ in chunks]),
        chunk_bytes=np.array([[first, last] for _, first, last in chunks]),
    )


def formats_of(given: RunInput) -> list[torch.Tensor]:
    """Return, for each layer step, int64 [num_experts]: the weight format in which it computes each expert that it uses."""
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    out, found = make_decision(given.config), []
    for step in range(given.workload.num_steps):
        begin_step(given.config, given.workload.steps, state, step)
        for layer in range(given.config.num_layers):
            decide_layer_step(given.config, given.workload.steps, state, out, step, layer)
            formats = torch.zeros(given.config.num_experts, dtype=torch.int64)
            items, cores = int(out.size[0].items), int(out.size[0].cores)
            formats[out.items["expert"][:items].tolist()] = torch.from_numpy(
                out.items["format"][:items].astype(np.int64)
            )
            formats[out.cores["expert"][:cores].tolist()] = torch.from_numpy(
                out.cores["format"][:cores].astype(np.int64)
            )
            found.append(formats)
    return found


def expert_tokens(workload: Workload) -> int:
    """Return tokens times top-k over all layers."""
    return int(workload.steps.layer_step_tokens.sum())


def expected_outputs(model: ModelSpec, given: RunInput, *, bits: str = "32", seed: int = 0) -> list[torch.Tensor]:
    """Return each step's last layer [T, H], with every expert computed in float64 straight from where it is stored."""
    device = CpuDevice()
    dense = DensePart(model, device, dtype=torch.float32, largest=largest_pass([given.workload]), seed=seed)
    names = [bits] if given.schedule.experts.low_bits is None else [bits, given.schedule.experts.low_bits]
    keys = model.num_moe_layers * model.num_experts
    weights = [make_store(model, name, device, num_keys=keys, seed=seed).weights() for name in names]
    formats = iter(formats_of(given))
    outputs = []
    for step in forced_steps(given.workload, device):
        x = dense.embed(step.rows)
        for layer in range(model.num_moe_layers):
            x, h, logits = dense.group(layer, x, step.shape)
            chosen = step.experts[layer]
            share = torch.softmax(logits.gather(1, chosen), dim=-1)
            fmt = next(formats)[chosen]
            for number, mine in enumerate(weights):
                part = share * (fmt == number)
                x = x + reference.layer(h, chosen + layer * model.num_experts, part, mine).float()
        dense.head(x, step.shape)
        outputs.append(x)
    return outputs
