"""Expert-parallel plans as engines' files: whole small files, notes, round trips, and what validators refuse."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from emit_plans import ROWS, SCHEDULE, SMALL, complaint, emitted, ep_plan, notes_of
from moeplan.base.errors import InputError
from moeplan.planner.emit.choices import Placement
from moeplan.planner.emit.targets import PARALLEL_TARGETS, READABLE_TARGETS, emit, read_back, render, validate
from moeplan.planner.parallel.maps import placement_from_dict
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ExpertParallelSchedule

KIND = "expert-parallel"
TRIVIAL = [0, 1, 2, 3, 0, 1]


def files_of(target: str, plan: dict[str, Any] | None = None) -> dict[str, str]:
    return dict(render(plan or ep_plan(), target, SMALL).files)


# --- whole files -----------------------------------------------------------------------------------------------------------


def test_sglang(tmp_path: Path) -> None:
    files = emitted(tmp_path, ep_plan(), "sglang")
    assert list(files) == ["expert_location.json", "flags.txt", "NOTES.txt"]
    assert json.loads(files["expert_location.json"]) == {"physical_to_logical_map": [TRIVIAL, *ROWS]}
    assert files["flags.txt"].splitlines() == [
        "--tp-size 2", "--ep-size 2", "--nnodes 1", "--attn-dp-size 2", "--moe-a2a-backend deepep",
        "--deepep-mode normal", "--init-expert-location expert_location.json", "--ep-num-redundant-experts 2",
        "--ep-dispatch-algorithm static",
    ]  # fmt: skip
    assert notes_of(files["NOTES.txt"]) == ["nothing: the files say all the plan says"]


def test_sglang_says_what_it_cannot() -> None:
    schedule = SCHEDULE.with_options(
        parallel__attention="tensor", replica__choice="capped", replica__load_cap=1.2, pipeline__micro_batches=3,
        pipeline__all_to_all_sm_fraction=0.125, kernel__bits="8",
    )  # fmt: skip
    emission = render(ep_plan(schedule, num_nodes=2), "sglang", SMALL)
    assert (
        "--attn-dp-size 2" in emission.files["flags.txt"]
        and "--enable-two-batch-overlap" in emission.files["flags.txt"]
    )
    assert emission.notes == (
        (
            "all_to_all.kind=per-rank: DeepEP sends a token once to every node and there once to every rank, which takes fewer bytes "
            "between nodes"
        ),
        "replica.choice=capped: SGLang's static choice is nearest first: own device, own node, then spread evenly",
        "pipeline.micro_batches=3: at most 2 here",
        "pipeline.all_to_all_sm_fraction=0.125: set num_sms in --deepep-config",
        "kernel.bits=8: the checkpoint decides: load one whose experts are stored so",
    )


def test_exchanges_and_replicas_that_sglang_knows() -> None:
    schedule = SCHEDULE.with_options(all_to_all__kind="all-choices", replica__choice="even")
    emission = render(ep_plan(schedule), "sglang", SMALL)
    assert "--deepep-mode low_latency\n" in emission.files["flags.txt"]
    assert "--ep-dispatch-algorithm dynamic\n" in emission.files["flags.txt"]
    assert emission.notes == ()


def test_trtllm(tmp_path: Path) -> None:
    files = emitted(tmp_path, ep_plan(), "trtllm")
    assert list(files) == ["moe_load_balancer.yaml", "extra_llm_api_options.yaml", "trtllm.env", "NOTES.txt"]
    assert files["trtllm.env"] == "TRTLLM_CAN_USE_DEEP_EP=1\nTRTLLM_FORCE_COMM_METHOD=DEEPEP\n"
    assert files["moe_load_balancer.yaml"] == (
        "num_slots: 6\ninitial_global_assignments:\n  1: [0, 1, 2, 3, 0, 1]\n  2: [3, 2, 1, 0, 3, 2]\nlayer_updates_per_iter: 0\n"
    )
    assert yaml.safe_load(files["extra_llm_api_options.yaml"]) == {
        "tensor_parallel_size": 2, "moe_expert_parallel_size": 2, "gpus_per_node": 2, "enable_attention_dp": True,
        "moe_config": {"backend": "CUTLASS", "load_balancer": "./moe_load_balancer.yaml"},
    }  # fmt: skip
    assert notes_of(files["NOTES.txt"]) == [
        "replica.choice=nearest: TensorRT-LLM spreads tokens evenly over an expert's copies",
    ]


def test_vllm_ascend(tmp_path: Path) -> None:
    files = emitted(tmp_path, ep_plan(), "vllm-ascend")
    layers = [
        {"layer_id": index, "device_count": 2,
         "device_list": [{"device_id": 0, "device_expert": row[:3]}, {"device_id": 1, "device_expert": row[3:]}]}
        for index, row in enumerate(ROWS)
    ]  # fmt: skip
    assert json.loads(files["expert_map.json"]) == {"moe_layer_count": 2, "layer_list": layers}
    config = '{"eplb_config": {"expert_map_path": "expert_map.json", "num_redundant_experts": 2}}'
    assert files["flags.txt"].splitlines() == [
        "--tensor-parallel-size 1", "--data-parallel-size 2", "--enable-expert-parallel", f"--additional-config '{config}'"
    ]  # fmt: skip


def test_vllm_flags_and_plugin(tmp_path: Path) -> None:
    files = emitted(tmp_path, ep_plan(), "vllm")
    pending = [name for name in files if "pending" in name]
    assert [name for name in files if name not in pending] == [
        "planned_placement.py",
        "pyproject.toml",
        "flags.txt",
        "NOTES.txt",
    ]
    assert files["flags.txt"].splitlines() == [
        "--tensor-parallel-size 1", "--data-parallel-size 2", "--enable-expert-parallel",
        "--all2all-backend deepep_high_throughput", "--enable-eplb",
        """--eplb-config '{"num_redundant_experts": 2, "policy": "default"}'""",
    ]  # fmt: skip
    entry = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]["vllm.general_plugins"]
    assert entry == {"planned_placement": "planned_placement:register"}
    notes = notes_of(files["NOTES.txt"])
    assert notes[0] == "replica.choice=nearest: vLLM spreads tokens evenly over an expert's copies"
    assert notes[1].startswith("placement: no file is loaded at the start.")


def test_the_policy_file_answers_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is run against stand-ins for torch and vLLM: its own code is what is tested."""
    default, policies = object(), {}
    policies["default"] = default
    abstract = type("AbstractEplbPolicy", (), {})
    own = SimpleNamespace(rebalance_experts=lambda *asked: ("vLLM's own", *asked[1:]))
    stand_ins: dict[str, dict[str, Any]] = {
        "torch": {"tensor": lambda rows, dtype, device: (rows, dtype, device), "int64": "int64"},
        "vllm": {}, "vllm.distributed": {}, "vllm.distributed.eplb": {},
        "vllm.distributed.eplb.policy": {"EPLB_POLICIES": policies},
        "vllm.distributed.eplb.policy.abstract": {"AbstractEplbPolicy": abstract},
        "vllm.distributed.eplb.policy.default": {"DefaultEplbPolicy": own},
    }  # fmt: skip
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    space: dict[str, Any] = {}
    exec(compile(files_of("vllm")["planned_placement.py"], "planned_placement.py", "exec"), space)
    space["register"]()
    policy: Any = policies["default"]
    assert issubclass(policy, abstract)
    weight = SimpleNamespace(shape=(2, 4), device="cpu")
    assert policy.rebalance_experts(weight, 6, 1, 1, 2, None) == (ROWS, "int64", "cpu")
    # A draft layer is a model of one layer; a server of another size is not the plan's.
    draft = SimpleNamespace(shape=(1, 4), device="cpu")
    for other, slots, ranks in ((draft, 6, 2), (weight, 8, 2), (weight, 6, 3)):
        assert policy.rebalance_experts(other, slots, 1, 1, ranks, None) == ("vLLM's own", slots, 1, 1, ranks, None)


def test_vllm_needs_no_policy_where_a_flag_says_it() -> None:
    schedule = ExpertParallelSchedule().with_options(pipeline__micro_batches=2)
    in_order, in_turn = [0, 1, 2, 3], [0, 2, 1, 3]
    emission = render(ep_plan(schedule, physical_to_logical=[in_order] * 2), "vllm", SMALL)
    assert list(emission.files) == ["flags.txt"] and emission.notes == ()
    assert emission.files["flags.txt"].splitlines()[-2:] == ["--enable-dbo", "--expert-placement-strategy linear"]
    assert validate("vllm", KIND, emission.files, SMALL) is None
    # vLLM honours round_robin for models with several expert groups only, and takes linear otherwise.
    emission = render(ep_plan(schedule, physical_to_logical=[in_turn] * 2), "vllm", SMALL)
    assert "strategy" not in emission.files["flags.txt"] and "planned_placement.py" in emission.files


def test_layers_come_from_the_recording_and_the_schedule_from_the_best_where_the_plan_keeps_them_there() -> None:
    plan = ep_plan(layer_ids=None)
    plan["best"] = {"schedule": plan.pop("schedule")}
    assert files_of("sglang", plan) == files_of("sglang")


# --- round trips -----------------------------------------------------------------------------------------------------------


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    nodes, per_node = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    ranks = nodes * per_node
    width = draw(st.integers(-(-4 // ranks), 4))
    rows = []
    for _ in SMALL.moe_layers:
        dealt = np.array_split(draw(st.permutations(range(4))), ranks)
        more = [draw(st.permutations(sorted(set(range(4)).difference(held)))) for held in dealt]
        rows.append(
            [expert for held, extra in zip(dealt, more, strict=True) for expert in [*held.tolist(), *extra][:width]]
        )
    return rows, ranks, nodes


def test_a_plan_and_a_map_with_an_expert_twice_on_a_rank_are_refused(tmp_path: Path) -> None:
    case = Path(__file__).resolve().parents[4] / "shared" / "data" / "cases" / "ascend-duplicate-on-rank0"
    if not case.exists():
        pytest.skip("no stored cases beside the checkout")
    model, plan = load_model("deepseek-v3"), json.loads((case / "ep.json").read_text())
    files = {"expert_map.json": (case / "expert_map.json").read_text()}
    additional = {"eplb_config": {"expert_map_path": "expert_map.json", "num_redundant_experts": 32}}
    files["flags.txt"] = "\n".join(["--tensor-parallel-size 1", "--data-parallel-size 32", "--enable-expert-parallel",
                                    f"--additional-config '{json.dumps(additional)}'"])  # fmt: skip
    with pytest.raises(InputError, match="twice on rank"):
        validate("vllm-ascend", KIND, files, model)
    for target in PARALLEL_TARGETS:
        with pytest.raises(InputError, match="twice on rank"):
            emit(plan, target, model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="twice on rank"):
        placement_from_dict(plan["placement"])


@pytest.mark.parametrize("target", READABLE_TARGETS)
@given(drawn=placements())
def test_a_placement_read_back_is_the_one_written(target: str, drawn: tuple[list[list[int]], int, int]) -> None:
    rows, ranks, nodes = drawn
    plan = ep_plan(physical_to_logical=rows, num_ranks=ranks, num_nodes=nodes)
    written = Placement(physical_to_logical=np.array(rows), num_logical=4, num_ranks=ranks, num_nodes=nodes)
    if target == "trtllm" and ranks == 1:  # nothing to place: no balancer is set up
        assert validate(target, KIND, files_of(target, plan), SMALL) is None
    else:
        assert read_back(target, files_of(target, plan), SMALL).same_as(written)


@given(drawn=placements())
def test_engines_without_node_counts_load_the_same_slots(drawn: tuple[list[list[int]], int, int]) -> None:
    rows, ranks, nodes = drawn
    plan = ep_plan(physical_to_logical=rows, num_ranks=ranks, num_nodes=nodes)
    for target in sorted(set(PARALLEL_TARGETS) - set(READABLE_TARGETS)):
        files = files_of(target, plan)
        loaded = validate(target, KIND, files, SMALL)
        if loaded is None:
            assert list(files) == ["flags.txt"]
            assert target == "lmdeploy" or (target == "vllm" and all(row == [0, 1, 2, 3] for row in rows))
        else:
            assert loaded.physical_to_logical.tolist() == rows and loaded.num_ranks == ranks


def test_ranks_that_do_not_divide_the_experts_are_refused_where_copies_are_not_taken() -> None:
    said = complaint(lambda: render(ep_plan(num_ranks=3), "lmdeploy", SMALL))
    assert said.startswith("plan: placement.num_ranks = 3: LMDeploy spreads the 4 experts of a layer evenly")


def test_only_some_files_hold_a_whole_placement() -> None:
    assert "not one of: sglang, trtllm" in complaint(lambda: read_back("vllm", files_of("vllm"), SMALL))


# --- what validators refuse ------------------------------------------------------------------------------------------------

LOCATION = '{"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]}'


@pytest.mark.parametrize(
    ("target", "name", "old", "new", "rule"),
    [
        ("sglang", "expert_location.json", '{"phy', '{"logical_count": [], "phy', "not one of: physical_to_logical_map"),
        ("sglang", "expert_location.json", LOCATION, "{}", "a key is absent"),
        ("sglang", "expert_location.json", "[[0, 1, 2, 3, 0, 1], ", "[", "small has 3 hidden layers"),
        ("sglang", "expert_location.json", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 3, 3, 3]", "every expert needs a slot"),
        ("sglang", "expert_location.json", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3, 4]", "expert ids are 0 to 3"),
        ("sglang", "expert_location.json", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3]", "the first row has 6 slots"),
        ("sglang", "expert_location.json", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3, true]", "not an expert id"),
        ("sglang", "expert_location.json", "[[0, 1", "[[0.0, 1", "not an expert id"),
        ("sglang", "flags.txt", "--ep-size 2", "--ep-size 4", "not divisible by 4 ranks"),
        ("sglang", "flags.txt", "--ep-size 2", "", "the flag is needed"),
        ("sglang", "flags.txt", "--ep-size 2", "--ep-size two", "not of kind whole"),
        ("sglang", "flags.txt", "--ep-size 2", "--ep-size", "takes 1 values"),
        ("sglang", "flags.txt", "--ep-size 2", "--ep-size 2\n--ep-size 2", "given twice"),
        ("sglang", "flags.txt", "--ep-size 2", "--ep-size '2", "unbalanced quotes"),
        ("sglang", "flags.txt", "--ep-size", "--ep-sise", "did you mean '--ep-size'?"),
        ("sglang", "flags.txt", "backend deepep", "backend deep", "not one of: ascend_fuseep"),
        ("sglang", "flags.txt", "experts 2", "experts 4", "8 slots a layer"),
        ("sglang", "flags.txt", "location.json", "location.pt", "not the name of a JSON file"),
        ("sglang", "flags.txt", "expert_location.json", "other.json", "other.json is absent"),
        ("trtllm", "moe_load_balancer.yaml", "num_slots: 6", "num_slots: 8", "8 slots a layer"),
        ("trtllm", "moe_load_balancer.yaml", "num_slots: 6", "num_slots: six", "not of type int"),
        ("trtllm", "moe_load_balancer.yaml", "num_slots: 6", "slots: 6", "key = 'slots': not one of"),
        ("trtllm", "moe_load_balancer.yaml", "  2: [", "  3: [", "the MoE layers are [1, 2]"),
        ("trtllm", "moe_load_balancer.yaml", "  2: [3, 2, 1, 0, 3, 2]\n", "", "the MoE layers are [1, 2]"),
        ("trtllm", "moe_load_balancer.yaml", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 1, 3, 3]", "every expert needs a slot"),
        ("trtllm", "moe_load_balancer.yaml", "iter: 0", "iter: -1", "below 0"),
        ("trtllm", "moe_load_balancer.yaml", "num_slots", "[num_slots", "not YAML"),
        ("trtllm", "extra_llm_api_options.yaml", "CUTLASS", "WIDEEP", "not one of: AUTO"),
        ("trtllm", "trtllm.env", "=DEEPEP", "=PIGEONS", "not one of: ALLGATHER, DEEPEP"),
        ("trtllm", "trtllm.env", "FORCE_COMM_METHOD", "COMM_METHOD", "key = 'TRTLLM_COMM_METHOD': not one of"),
        ("trtllm", "trtllm.env", "=1", " 1", "not NAME=value"),
        ("trtllm", "extra_llm_api_options.yaml", "expert_parallel_size: 2", "expert_parallel_size: 4", "not divisible by 4"),
        ("trtllm", "extra_llm_api_options.yaml", "gpus_per_node: 2", "gpus_per_node: 3", "does not divide 2 ranks"),
        ("trtllm", "extra_llm_api_options.yaml", "_dp: true", "_dp: 1", "not of type bool"),
        ("vllm-ascend", "expert_map.json", '"layer_id": 1', '"layer_id": 2', "not layer 1 with devices 0 to 1"),
        ("vllm-ascend", "expert_map.json", '"moe_layer_count": 2', '"moe_layer_count": 3', "2 layers listed"),
        ("sglang", "expert_location.json", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3, 3]", "expert 3 twice on rank 1"),
        ("trtllm", "moe_load_balancer.yaml", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3, 3]", "expert 3 twice on rank 1"),
        ("vllm", "planned_placement.py", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 0, 3, 3]", "expert 3 twice on rank 1"),
        ("vllm-ascend", "expert_map.json", "[0, 3, 2]", "[0, 3, 3]", "expert 3 twice on rank 1"),
        ("vllm-ascend", "expert_map.json", "[0, 3, 2]", "[3, 3, 3]", "every expert needs a slot"),
        ("vllm-ascend", "expert_map.json", "[0, 3, 2]", "[0, 3]", "the first row has 3 slots"),
        ("vllm-ascend", "flags.txt", "expert_map_path", "map_path", "did you mean 'expert_map_path'?"),
        ("vllm-ascend", "flags.txt", "data-parallel-size 2", "data-parallel-size 3", "with devices 0 to 2"),
        ("vllm", "flags.txt", '"policy": "default"', '"policy": "planned"', "not one of: default"),
        ("vllm", "flags.txt", '"policy"', '"policies"', "did you mean 'policy'?"),
        ("vllm", "flags.txt", "experts\": 2", "experts\": true", "not of type int"),
        ("vllm", "flags.txt", "experts\": 2", "experts\": 4", "8 slots a layer"),
        ("vllm", "flags.txt", '"policy"', '"communicator": "pynccl", "policy"', "not with use_async"),
        ("vllm", "flags.txt", "data-parallel-size 2", "data-parallel-size 3", "the policy is for 2 ranks"),
        ("vllm", "flags.txt", "--enable-eplb\n", "", "--expert-placement-strategy = '(absent)'"),
        ("vllm", "planned_placement.py", "(AbstractEplbPolicy)", "", "not one subclass of AbstractEplbPolicy"),
        ("vllm", "planned_placement.py", "cls, weight,", "cls, load,", "vLLM calls it with"),
        ("vllm", "planned_placement.py", "    [3, 2, 1, 0, 3, 2],\n", "", "small has 2 MoE layers"),
        ("vllm", "planned_placement.py", "[3, 2, 1, 0, 3, 2]", "[3, 2, 1, 1, 3, 3]", "every expert needs a slot"),
        ("vllm", "planned_placement.py", "NUM_RANKS = 2", "NUM_RANKS = input()", "not a plain value"),
        ("vllm", "planned_placement.py", "def register():", "def register(:", "not Python"),
    ],
)  # fmt: skip
def test_validators_refuse(target: str, name: str, old: str, new: str, rule: str) -> None:
    files = files_of(target)
    assert old in files[name]
    files[name] = files[name].replace(old, new, 1)
    assert rule in complaint(lambda: validate(target, KIND, files, SMALL))
