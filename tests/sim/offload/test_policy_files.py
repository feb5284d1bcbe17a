"""Rules of one's own do what bundled ones do, alike in both simulators; what is wrong in a file is told with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.base.errors import InputError
from moeplan.sim.offload.simulators import Outcome, first_difference, run_compiled, run_simpy
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.policies.bundled import knows_future
from moeplan.sim.policies.policy_file import load_policy
from moeplan.specs.schedules.offload import OffloadSchedule, apply_settings
from strategies import capacities_of, config_of, make_costs, make_trace

HEAD = "from moeplan.api.policies import *\n"
OWN = Path(__file__).parent / "own_policy.py"
# What each of the file's rules says again: a bundled policy's settings.
SAME = {
    "own-lfu": {"cache.policy": "lfu"},
    "own-belady": {"cache.policy": "belady"},
    "own-least-stale": {"cache.policy": "least-stale"},
    "own-recency": {"cache.policy": "lru"},
    "own-cheaper": {"kernel.miss": "cheaper"},
    "own-balanced": {"kernel.miss": "balanced"},
    "own-threshold": {"predictor.threshold": 0.5},
}


def outcomes(settings: dict[str, object], seed: int) -> tuple[Outcome, Outcome]:
    """Return the SimPy and the compiled outcome of a run with slots for half of the experts and a staging buffer or two."""
    rng = np.random.default_rng(seed)
    trace = make_trace(rng, num_layers=3, num_experts=6, top_k=2, requests=[(3, 6), (2, 7)], guesses=3)
    base = {"cache.policy": "lru", "cache.pooled_experts": 8, "predictor.kind": "next-gate", "predictor.width": 3,
            "predictor.staging": seed % 3}  # fmt: skip
    schedule = apply_settings(OffloadSchedule(name="own"), base | settings)
    workload = build_workload(trace, schedule.workload, with_next_use=knows_future(schedule.cache.policy))
    costs = make_costs(rng, workload, schedule)
    # Cores that are sometimes sooner than the link.
    costs = costs._replace(cpu_ns=costs.cpu_ns // 3 + 1, chunk_ns=costs.chunk_ns * 3)
    run = (config_of(schedule, trace), workload, costs, capacities_of(schedule, trace))
    return run_simpy(*run, serial=False, rows=True), run_compiled(*run, serial=False, rows=True)


@pytest.mark.parametrize("name", SAME)
def test_a_bundled_policy_written_again_is_the_same_in_both_simulators(name: str) -> None:
    kinds = {rule.name: rule.kind for rule in load_policy(OWN).rules}
    key = {"victim": "cache.policy", "prefetch": "predictor.score", "miss": "kernel.miss"}[kinds[name]]
    differs = False
    for seed in range(6):
        slow, fast = outcomes({key: name}, seed)
        assert first_difference(slow, fast) is None
        assert first_difference(outcomes(SAME[name], seed)[1], fast) is None, seed
        differs |= first_difference(outcomes({}, seed)[1], fast) is not None
    assert differs or name == "own-recency"


def test_a_merit_is_kept_from_use_to_use() -> None:
    """Uses counted by a merit are the passes that used an expert; with one token a pass they are its tokens."""
    load_policy(OWN)
    for seed in range(6):
        counted, lfu = outcomes({"cache.policy": "own-uses"}, seed), outcomes({"cache.policy": "own-fewest-uses"}, seed)
        assert first_difference(counted[0], counted[1]) is None
        assert first_difference(counted[1], lfu[1]) is None


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(:\n", "line 2: invalid syntax"),
        ("import nowhere_to_be_found\n", "line 2: ModuleNotFoundError"),
        ("x = 1\n", "registers no rule"),
        ('@victim_score("lfu")\ndef f(expert, now):\n    return 1\n', "has that name already"),
        ('@merit("m")\ndef f(expert, now):\n    return 1\n', "no victim score of that name"),
        ('@victim_score("a b")\ndef f(expert, now):\n    return 1\n', "not letters, digits"),
        ('@victim_score("v")\ndef f(expert):\n    return 1\n', "TypeError"),
        ('@victim_score("v")\ndef f(expert, now):\n    return expert.heat\n', "line 4: AttributeError"),
        ('@victim_score("v")\ndef f(expert, now):\n    expert.tokens = 0\n    return 1\n', "line 4: AttributeError"),
        ('@victim_score("v")\ndef f(expert, now):\n    return 1 / (expert.tokens - 17)\n', "line 4: ZeroDivisionError"),
        ('@victim_score("v")\ndef f(expert, now):\n    return "much"\n', "line 2, f: returns str, not a number"),
        ('@victim_score("v")\ndef f(expert, now):\n    return None\n', "returns NoneType, not a number"),
        ('@victim_score("v")\ndef f(expert, now):\n    return float("nan")\n', "returns nan, no finite number"),
        ('@prefetch_score("p")\ndef f(guess):\n    return float("inf")\n', "returns inf, no finite number"),
        ('@miss_choice("m")\ndef f(miss):\n    return 2\n', "returns 2, neither FETCH nor CORES"),
    ],
)
def test_what_a_file_does_wrong_is_told_before_anything_runs(source: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.py"
    file.write_text(HEAD + source)
    with pytest.raises(InputError) as refused:
        load_policy(file)
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "settings", "told"),
    [
        ('@victim_score("late-{}")\ndef f(expert, now):\n    return 1 / (now.layer_step - 9)\n', "cache.policy",
         "line 4: ZeroDivisionError"),
        ('@victim_score("late-{}")\ndef f(expert, now):\n    return float("nan") if 8 < now.layer_step < 30 else 1\n', "cache.policy",
         "returns nan, no finite number"),
        ('@miss_choice("late-{}")\ndef f(miss):\n    return 3 if miss.layer == 1 else 0\n', "kernel.miss", "neither FETCH nor CORES"),
        ('@prefetch_score("late-{}")\ndef f(guess):\n    return 1 / (guess.layer - 2)\n', "predictor.score", "line 4: ZeroDivisionError"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("run", [run_simpy, run_compiled])
def test_a_rule_that_goes_wrong_in_a_run_ends_it_with_its_line(rule, settings, told, run, tmp_path: Path) -> None:
    file, name = tmp_path / "policy.py", f"{run.__name__.replace('_', '-')}-{settings.replace('.', '-')}-{len(rule)}"
    file.write_text(HEAD + rule.format(name))
    assert [each.name for each in load_policy(file).rules] == [f"late-{name}"]
    rng = np.random.default_rng(3)
    trace = make_trace(rng, num_layers=3, num_experts=6, top_k=2, requests=[(3, 6), (2, 7)], guesses=3)
    base = {"cache.policy": "lru", "cache.experts_per_layer": 3, "predictor.kind": "next-gate", "predictor.width": 3}
    schedule = apply_settings(OffloadSchedule(name="own"), base | {settings: f"late-{name}"})
    workload = build_workload(trace, schedule.workload)
    costs = make_costs(rng, workload, schedule)
    with pytest.raises(InputError, match=told):
        run(config_of(schedule, trace), workload, costs, capacities_of(schedule, trace), serial=False)


def test_a_rule_that_no_file_has_added_is_refused_with_where_it_would_come_from() -> None:
    with pytest.raises(InputError, match="--policy"):
        OffloadSchedule().with_options(predictor__kind="next-gate", predictor__score="nobodys")
    with pytest.raises(InputError, match="not one of"):
        OffloadSchedule().with_options(cache__policy="nobodys")
