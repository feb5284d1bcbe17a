"""How fast the two simulators are on the same cases: expert uses per second, and how many times faster the compiled one is.

Each case is a model's routing shape with made-up routing of real skew and costs of a usual size. The compiled one is timed several
times without rows, alternating between cases; SimPy once per case on a shorter window and scaled by layer steps, since one full
run takes minutes (its time per layer step does not depend on the window's length). Building the workload (once per recording,
shared by all schedules of a search) is reported apart, and so are guesses that depend on the recording alone. Then a policy file's
rules beside the bundled ones that say the same, and steps of 32 expert-parallel ranks in both simulators. Targets: at least 200
times SimPy and 30 million expert uses a second on one core on the largest case; with two cards at least 60 % of the same case with
one; a policy file at most 1.5 times the bundled rule's time; 32 ranks at least 100 times SimPy. Prints a table;
`--json FILE` keeps all samples.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.sim.offload.costs import CostTables, host_costs
from moeplan.sim.offload.simulators import run_compiled, run_simpy
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.sim.parallel.program import Shape, build_program
from moeplan.sim.parallel.simulators import run_ep_compiled, run_ep_simpy
from moeplan.sim.parallel.tables import EpTables
from moeplan.sim.policies.policy_file import load_policy
from moeplan.sim.policies.state import make_config
from moeplan.sim.timeline import NUM_RATED_LANES, RATE_ONE
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.parallel import load_ep_preset
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.format import RoutingTrace

NUM_REPEATS = 7
SIMPY_STEPS = 20
OWN_RULES = """
from moeplan.api.policies import merit, victim_score

@victim_score("own-lfu")
def fewest_tokens(expert, now):
    return expert.tokens

@victim_score("own-least-stale")
def least_stale(expert, now):
    turn = (expert.layer - now.layer - 1) % now.num_layers
    stale = expert.layer <= now.layer and expert.last_used < now.layer_step - now.layer
    return -(turn + now.num_layers * stale)

@merit("own-lfuda")
def aged_tokens(expert, now):
    return expert.stay_tokens + now.age

@victim_score("own-lfuda")
def least_merit(expert, now):
    return expert.merit
"""
"""Bundled policies, as anybody would write them (`lfu` keeps no queue where each layer has slots of its own)."""
RANKS, EP_LAYERS = 32, 58
EP_SCHEDULES = ("ep", "tbo", "eps-moe", "fsmoe")


@dataclass(frozen=True)
class Case:
    """One routing shape and one schedule."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    num_steps: int
    schedule: OffloadSchedule
    num_cards: int = 1
    """Layers lie on so many cards, the first ones on the first."""


def cases() -> list[Case]:
    """Return the benchmark's cases; the first is the one the targets speak of, with half of the experts cached."""
    lru = load_preset("mixtral-offloading-code").with_options(
        copy__overlap=True, copy__write_back=False, kernel__grouping="grouped"
    )
    large = (58, 256, 8, 1000)
    return [
        Case("resident", *large, load_preset("resident").with_options(cache__experts_per_layer=256)),
        Case("lru 1/2", *large, lru.with_options(cache__experts_per_layer=128)),
        Case("lru 1/2, two cards", *large, lru.with_options(cache__experts_per_layer=128), num_cards=2),
        Case("lru 1/4", *large, lru.with_options(cache__experts_per_layer=64)),
        Case("lru 1/4, two cards", *large, lru.with_options(cache__experts_per_layer=64), num_cards=2),
        Case("lru 1/4, one stream", *large, lru.with_options(cache__experts_per_layer=64, copy__overlap=False)),
        Case(
            "lru 1/4, launches per expert",
            *large,
            lru.with_options(cache__experts_per_layer=64, kernel__grouping="per-expert"),
        ),
        Case(
            "lru 1/4, recall 0.8",
            *large,
            lru.with_options(cache__experts_per_layer=64, predictor__kind="synthetic", predictor__staging=16),
        ),
        Case("pre-gated", *large, load_preset("pre-gated")),
        Case("mixtral-like lru", 32, 8, 2, 2000, lru.with_options(cache__experts_per_layer=4)),
    ]


def routing(case: Case, seed: int = 0) -> RoutingTrace:
    """Return made-up routing in which each token repeats half of the last token's experts, as recordings do."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(case.num_experts, 0.5), size=case.num_layers)
    experts = np.zeros((case.num_steps, case.num_layers, case.top_k), np.uint8)
    for layer in range(case.num_layers):
        bias = np.zeros(case.num_experts)
        for token in range(case.num_steps):
            score = np.log(popularity[layer] + 1e-9) + rng.gumbel(size=case.num_experts) + bias
            chosen = np.argpartition(-score, case.top_k)[: case.top_k]
            experts[token, layer] = chosen
            bias = np.zeros(case.num_experts)
            bias[chosen] = 2.5
    tokens = np.arange(case.num_steps, dtype=np.int32)
    return RoutingTrace(
        experts=experts, request=np.zeros(case.num_steps, np.int32), position=tokens, phase=np.ones(case.num_steps, np.uint8),
        num_experts=case.num_experts, model="made-up", layer_ids=tuple(range(case.num_layers)), source="benchmark", licence="none",
        metadata={},
    )  # fmt: skip


def costs(case: Case, workload: Workload) -> CostTables:
    """Return costs of a usual size: a copy of half a millisecond beside 60 µs of dense work and 20 µs an expert; on each further card
    twice as much.
    """
    cards = np.arange(1, case.num_cards + 1)
    layer_card = np.arange(case.num_layers) * case.num_cards // case.num_layers
    return CostTables(
        step_class=np.zeros(workload.num_steps, np.int64), dense_ns=np.full((1, case.num_layers), 60_000),
        head_ns=np.array([500_000]),
        kernel_ns=np.array([[0, *[20_000 * card] * workload.max_expert_tokens] for card in cards]), grouped_ns=np.array([5_000]),
        expert_format=np.repeat(layer_card, case.num_experts).astype(np.int64), expert_bytes=np.full(len(cards), 12_000_000),
        num_chunks=np.ones(len(cards), np.int64), chunk_bytes=np.full((len(cards), 2), 12_000_000),
        chunk_ns=np.repeat(500_000 * cards, 2).reshape(-1, 2), back_ns=500_000 * cards, cpu_ns=np.zeros((len(cards), 0), np.int64),
        disk_ns=np.zeros(len(cards), np.int64),
        host_ns=host_costs(step=100_000, layer=30_000, kernel=5_000, transfer=8_000),
        rate=np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE),
    )  # fmt: skip


def main() -> None:
    """Run the benchmark and print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="keep all samples here")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    traces: dict[tuple[int, ...], RoutingTrace] = {}
    print(f"{'case':32} {'hit rate':>8} {'compiled M layer steps/s':>24} {'SimPy k layer steps/s':>17} {'ratio':>7}")
    for case in cases():
        shape = (case.num_layers, case.num_experts, case.top_k, case.num_steps)
        trace = traces.setdefault(shape, routing(case))
        began = time.perf_counter()
        workload = build_workload(trace, case.schedule.workload)
        build_s = time.perf_counter() - began
        table = costs(case, workload)
        config = make_config(case.schedule, num_layers=case.num_layers, num_experts=case.num_experts, top_k=case.top_k,
                             guess_distances=0, guess_width=0)  # fmt: skip
        capacities = np.full(case.num_layers, case.schedule.cache.experts_per_layer or 0)
        serial = not case.schedule.copy.overlap
        weighed = table if case.num_cards > 1 else None
        began = time.perf_counter()
        next(iter(workload.pieces(config)))
        guesses_s = time.perf_counter() - began
        outcome = run_compiled(config, workload, table, capacities, serial=serial, weighed=weighed)  # compiles
        samples = []
        for _ in range(NUM_REPEATS):
            began = time.perf_counter()
            run_compiled(config, workload, table, capacities, serial=serial, weighed=weighed)
            samples.append(workload.num_expert_uses / (time.perf_counter() - began))
        short = build_workload(trace, case.schedule.workload, max_steps=SIMPY_STEPS)
        began = time.perf_counter()
        few = costs(case, short)
        run_simpy(
            config, short, few, capacities, serial=serial, rows=False, weighed=few if weighed is not None else None
        )
        slow = short.num_expert_uses / (time.perf_counter() - began)
        fast = statistics.median(samples)
        hits, misses = int(outcome.counts.hits), int(outcome.counts.misses)
        print(f"{case.name:32} {hits / (hits + misses):8.3f} {fast / 1e6:9.1f} "
              f"({min(samples) / 1e6:5.1f}–{max(samples) / 1e6:5.1f}) "
              f"{slow / 1e3:17.1f} {fast / slow:7.0f}")  # fmt: skip
        if guesses_s > 0.1 * build_s:
            print(f"{'':32} its guesses, once for all runs that guess alike: {1000 * guesses_s:.0f} ms")
        results.append({"case": case.name, "hit_rate": hits / (hits + misses), "compiled_layer_steps_per_s": samples,
                        "simpy_layer_steps_per_s": slow, "ratio": fast / slow, "workload_s": build_s, "guesses_s": guesses_s,
                        "num_expert_uses": workload.num_expert_uses})  # fmt: skip
    results += own_policies(traces[(58, 256, 8, 1000)])
    results += many_ranks()
    if arguments.json:
        machine = {
            "machine": platform.machine(),
            "processor": platform.processor(),
            "python": platform.python_version(),
        }
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def own_policies(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Time rules of a policy file in turn with the bundled rules that say the same; print and return what each takes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(OWN_RULES)
        load_policy(Path(folder) / "own.py")
    found: list[dict[str, Any]] = []
    for name in ("lfu", "lfuda", "least-stale"):
        runs, times = {}, {name: [], f"own-{name}": []}
        for policy in times:
            size = {"cache__pooled_experts": 4096} if name == "least-stale" else {"cache__experts_per_layer": 64}
            schedule = load_preset("mixtral-offloading-code").with_options(
                cache__policy=policy, copy__overlap=True, copy__write_back=False, kernel__grouping="grouped", **size
            )  # fmt: skip
            case = Case(policy, trace.num_layers, trace.num_experts, trace.top_k, 100, schedule)
            workload = build_workload(trace, schedule.workload, max_steps=case.num_steps)
            config = make_config(schedule, num_layers=case.num_layers, num_experts=case.num_experts, top_k=case.top_k,
                                 guess_distances=0, guess_width=0)  # fmt: skip
            each = next(iter(size.values()))
            capacities = np.array([each]) if config.pooled else np.full(case.num_layers, each)
            runs[policy] = functools.partial(
                run_compiled, config, workload, costs(case, workload), capacities, serial=False
            )
        ends = {policy: run().makespan_ns for policy, run in runs.items()}  # compiles
        # The bundled ageing one gives a merit on admission too, which a policy file cannot: it decides almost alike, not alike.
        if name != "lfuda" and len(set(ends.values())) != 1:
            raise SystemExit(f"the policies decide differently: {ends}")
        for _ in range(NUM_REPEATS):
            for policy, run in runs.items():
                began = time.perf_counter()
                run()
                times[policy].append(time.perf_counter() - began)
        ratio = statistics.median(times[f"own-{name}"]) / statistics.median(times[name])
        print(f"{name + ', of a policy file':32} {ratio:8.2f} times the bundled one's time (at most 1.5 asked)")
        found.append({"case": f"own {name}", "seconds": times, "ratio": ratio})
    return found


def many_ranks() -> list[dict[str, Any]]:
    """Time steps of expert-parallel ranks in both simulators; print and return how many times faster the compiled one is."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for name in EP_SCHEDULES:
        program = build_program(load_ep_preset(name), Shape(num_layers=EP_LAYERS, has_shared=True))
        ops, exchanges = len(program.op_kind), len(program.ex_kind)
        ex_ns = rng.integers(10_000, 200_000, (exchanges, 2, RANKS))
        tables = EpTables(work_ns=rng.integers(10_000, 200_000, (ops, RANKS)), op_tokens=np.ones((ops, RANKS), np.int64), ex_ns=ex_ns,
                          ex_bytes=ex_ns * 100, ex_tokens=ex_ns)  # fmt: skip
        compiled = run_ep_compiled(program, tables)
        samples = []
        for _ in range(NUM_REPEATS):
            began = time.perf_counter()
            run_ep_compiled(program, tables)
            samples.append(time.perf_counter() - began)
        began = time.perf_counter()
        slow = run_ep_simpy(program, tables)
        slow_s = time.perf_counter() - began
        if slow.makespan_ns != compiled.makespan_ns:
            raise SystemExit(f"the simulators disagree on {name}")
        ratio = slow_s / statistics.median(samples)
        print(f"{f'{name}, {RANKS} ranks':32} {1000 * statistics.median(samples):8.2f} ms a step, SimPy {1000 * slow_s:.0f} ms: "
              f"{ratio:.0f} times (100 asked)")  # fmt: skip
        found.append({"case": f"{name}, {RANKS} ranks", "compiled_s": samples, "simpy_s": slow_s, "ratio": ratio})
    return found


if __name__ == "__main__":
    main()
