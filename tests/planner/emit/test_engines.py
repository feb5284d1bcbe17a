"""What engines really do with what is emitted: drawn plans through every engine's own table, and models, phases and drafts that differ."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emit_plans import ROWS, SCHEDULE, SMALL, complaint, emitted, ep_plan, offload_plan
from house import ROOT
from moeplan.base.errors import InputError
from moeplan.planner.emit.families import ARCHITECTURES
from moeplan.planner.emit.flags import OneOf
from moeplan.planner.emit.names import ENGINES
from moeplan.planner.emit.table import DEPRECATED, PENDING, RELEASED, STANDINGS, flags_of
from moeplan.planner.emit.targets import OFFLOAD_TARGETS, PARALLEL_TARGETS, TARGETS, render, validate
from moeplan.specs.drafting import DRAFTED
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.config.families import FAMILIES as FAMILIES_READ
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.parallel import ALL_TO_ALLS, REPLICA_CHOICES, ExpertParallelSchedule

TINY = load_model("tiny-moe")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def named(family: str) -> ModelSpec:
    return dataclasses.replace(SMALL, family=family)


# --- tables ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_a_table_is_dated_sourced_and_whole(name: str) -> None:
    table = TARGETS[name].table
    assert dt.date.fromisoformat(table.checked) and table.how and table.source
    rows = {**table.flags, **table.keys}
    assert rows or table.places
    for key, row in rows.items():
        assert row.meaning and row.standing in STANDINGS, key
        assert (row.standing == DEPRECATED) == bool(row.instead), key
        assert row.since or row.standing in (RELEASED, DEPRECATED), key
    assert all(FLAG.fullmatch(flag) for flag in table.flags)


def test_families_of_the_tables_are_families_that_are_read() -> None:
    unread = {"arctic", "grok1"}  # in MoE-Infinity's list
    for target in TARGETS.values():
        assert (target.table.places or frozenset()) - unread <= set(FAMILIES_READ)
    assert DRAFTED | set(ARCHITECTURES) <= set(FAMILIES_READ)


def test_the_page_of_engines_says_what_the_tables_say() -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for name, target in TARGETS.items():
        kinds = " and ".join(
            kind for kind, it in (("expert-parallel", target.parallel), ("offload", target.offload)) if it
        )
        table = target.table
        assert f"| `{name}` | {table.engine} | {kinds} | {table.checked} | {table.how} |" in page


@pytest.mark.parametrize("name", [name for name in ENGINES if TARGETS[name].table.flags])
def test_what_is_not_in_the_table_fails(name: str) -> None:
    table = TARGETS[name].table
    assert "--no-such-flag" in complaint(lambda: flags_of("--no-such-flag", table, "f"))
    for flag, row in table.flags.items():
        if isinstance(row.kind, OneOf):
            assert "not one of" in complaint(lambda flag=flag: flags_of(f"{flag} no-such-value", table, "f"))  # type: ignore[misc]
        if row.standing in (DEPRECATED, PENDING):
            text = flag if row.kind == "switch" else f"{flag} 1"
            said = complaint(lambda text=text: flags_of(text, table, "f"))  # type: ignore[misc]
            assert (f"write {row.instead}" if row.instead else row.since) in said


@st.composite
def schedules(draw: st.DrawFn) -> ExpertParallelSchedule:
    return ExpertParallelSchedule(name="search").with_options(
        placement__policy="search", placement__num_redundant=2,
        parallel__attention=draw(st.sampled_from(["data", "tensor"])), replica__choice=draw(st.sampled_from(REPLICA_CHOICES)),
        all_to_all__kind=draw(st.sampled_from(ALL_TO_ALLS)), pipeline__micro_batches=draw(st.integers(1, 3)),
    )  # fmt: skip


FAMILIES = ("deepseek_v3", "deepseek_v4", "mixtral", "olmoe", "gpt_oss", "qwen3_moe", "llama4", "minimax_m2")


@pytest.mark.parametrize("target", sorted(PARALLEL_TARGETS))
@given(schedule=schedules(), prefill=st.booleans(), family=st.sampled_from(FAMILIES), order=st.permutations(range(4)))
def test_drawn_parallel_plans_pass_the_engines_table(
    target: str, schedule: ExpertParallelSchedule, prefill: bool, family: str, order: list[int]
) -> None:
    row = [*order, order[2], order[0]] if target else []
    plan = ep_plan(schedule, physical_to_logical=[row, ROWS[0]], num_nodes=1) | {"request": {"prefill": prefill}}
    emission = render(plan, target, named(family))  # checks the files against the table and the engine's rules
    loaded = validate(target, "expert-parallel", emission.files, named(family))
    places = TARGETS[target].table.places
    if loaded is None:
        assert (places is not None and family not in places) or schedule.parallel.attention == "tensor"
        assert any(line.startswith("placement: ") for line in emission.notes)
    else:
        assert loaded.physical_to_logical.tolist() == [row, ROWS[0]]
    for text in (*emission.usage, *emission.facts, *emission.notes, *emission.files.values()):
        assert "--enable-dp-attention" not in text and "--disable-cuda-graph" not in text


@pytest.mark.parametrize("target", sorted(OFFLOAD_TARGETS))
@given(data=st.data())
def test_drawn_offload_plans_pass_the_engines_table(target: str, data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(["none", "static", "lru", "lfu"]))
    size: dict[str, Any] = {}
    if policy != "none":
        pooled = data.draw(st.booleans())
        size = {"cache__pooled_experts": data.draw(st.integers(1, 96))} if pooled else {
            "cache__experts_per_layer": data.draw(st.integers(1, 16))}  # fmt: skip
    guess = data.draw(st.sampled_from(["none", "next-gate"])) if policy != "none" else "none"
    options: dict[str, Any] = {"predictor__kind": guess, "predictor__staging": 2} if guess != "none" else {}
    if policy == "none":
        options["copy__fetch"] = data.draw(st.sampled_from(["routed", "layer", "layer-streamed"]))
    plan = offload_plan(TINY, cache__policy=policy, **options, **size)
    emission = render(plan, target, TINY)
    validate(target, "offload", emission.files, TINY)
    assert emission.runs is not None or emission.unlike


# --- models, phases, drafts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "family", "file"),
    [("sglang", "mixtral", "expert_location.json"), ("sglang", "olmoe", "expert_location.json"),
     ("trtllm", "deepseek_v2", "moe_load_balancer.yaml"), ("trtllm", "glm4_moe", "moe_load_balancer.yaml"),
     ("vllm", "gpt_oss", "planned_placement.py"), ("vllm", "minimax_m2", "planned_placement.py")],
)  # fmt: skip
def test_a_placement_that_is_ignored_is_not_written(target: str, family: str, file: str, tmp_path: Path) -> None:
    files = emitted(tmp_path, ep_plan(), target, named(family))
    assert file not in files and "redundant" not in "".join(text for name, text in files.items() if name != "NOTES.txt")
    notes = files["NOTES.txt"]
    assert "\n- placement: " in notes and "to serve it as planned, emit for" in notes
    assert file in emitted(tmp_path, ep_plan(), target, named("deepseek_v3"))


def test_files_that_an_engine_would_ignore_are_refused() -> None:
    for target, family in (("sglang", "mixtral"), ("trtllm", "glm4_moe"), ("vllm", "gpt_oss")):
        files = render(ep_plan(), target, SMALL).files
        assert family in complaint(lambda: validate(target, "expert-parallel", files, named(family)))  # noqa: B023


def test_trtllm_without_attention_data_parallelism_has_no_balancer() -> None:
    emission = render(ep_plan(SCHEDULE.with_options(parallel__attention="tensor")), "trtllm", SMALL)
    assert list(emission.files) == ["extra_llm_api_options.yaml"] and "load_balancer" not in "".join(
        emission.files.values()
    )
    assert "without attention data parallelism" in emission.notes[0]


@pytest.mark.parametrize(
    ("target", "prefill", "decode"),
    [("sglang", "--deepep-mode normal\n", "--deepep-mode auto\n"),
     ("vllm", "--all2all-backend deepep_high_throughput\n", "--all2all-backend deepep_low_latency\n")],
)  # fmt: skip
def test_decode_plans_get_modes_that_keep_cuda_graphs(target: str, prefill: str, decode: str) -> None:
    for is_prefill, flag, other in ((True, prefill, decode), (False, decode, prefill)):
        emission = render(ep_plan() | {"request": {"prefill": is_prefill}}, target, SMALL)
        assert flag in emission.files["flags.txt"] and other not in emission.files["flags.txt"]
        assert any("CUDA graphs" in fact for fact in emission.facts)


@pytest.mark.parametrize("target", ["sglang", "trtllm", "vllm", "vllm-ascend", "vllm-hygon"])
def test_draft_layers_are_spoken_of_where_a_model_has_them(target: str) -> None:
    assert set(ARCHITECTURES) & DRAFTED and SMALL.family in DRAFTED
    assert any("draft (MTP)" in fact for fact in render(ep_plan(), target, SMALL).facts)
    assert not any("draft (MTP)" in fact for fact in render(ep_plan(), target, named("qwen3_moe")).facts)


def test_moe_infinity_serves_the_models_of_its_list() -> None:
    said = complaint(
        lambda: render(offload_plan(named("qwen3_moe"), cache__experts_per_layer=2), "moe-infinity", named("qwen3_moe"))
    )
    assert "family for MoE-Infinity = 'qwen3_moe': not one of: arctic" in said


# --- what is predicted -------------------------------------------------------------------------------------------------------


def predicted(text: str) -> list[str]:
    return text.partition("Predicted:\n")[2].partition("\n\n")[0].splitlines()


def test_the_prediction_beside_the_files_is_that_of_the_files(tmp_path: Path) -> None:
    schedule = SCHEDULE.with_options(all_to_all__kind="all-choices")
    plan = ep_plan(schedule) | {"best": {"step_s": 0.002, "relative_uncertainty": 0.1, "tokens_per_s": 1000.0}}
    assert predicted(emitted(tmp_path, plan, "sglang")["NOTES.txt"]) == [
        "- 2.000 ms a step, within 10%, 1,000 tokens/s"
    ]
    more = schedule.with_options(pipeline__split="expert", pipeline__num_groups=3)
    [line] = predicted(emitted(tmp_path, plan | {"schedule": more.to_dict()}, "sglang")["NOTES.txt"])
    assert line.startswith(
        "- nothing for these files, which run pipeline.split=none (plan: expert), pipeline.num_groups=1 (plan: 3)"
    )
    assert line.endswith("the plan's best: 2.000 ms a step, within 10%, 1,000 tokens/s")
    rival = {"name": "plainer", "step_s": 0.003, "schedule": schedule.to_dict()}
    known = plan | {"schedule": more.to_dict(), "baselines": [rival]}
    [line] = predicted(emitted(tmp_path, known, "sglang")["NOTES.txt"])
    assert line.startswith("- 3.000 ms a step (the files run plainer, not the plan's best")


def test_engines_that_no_schedule_describes_have_no_prediction(tmp_path: Path) -> None:
    plan = offload_plan(cache__policy="lru", cache__experts_per_layer=2)
    plan["best"]["decode_tokens_per_s"] = 12.5
    for target in ("llamacpp", "kt-kernel", "moe-infinity", "vllm"):
        [line] = predicted(emitted(tmp_path, plan, target)["NOTES.txt"])
        assert line.startswith("- nothing for these files: ") and line.endswith(
            "the plan's best: decoding 12.5 tokens/s"
        ), target
    assert predicted(emitted(tmp_path, plan, "sglang")["NOTES.txt"]) == ["- decoding 12.5 tokens/s"]


# --- newer inputs ------------------------------------------------------------------------------------------------------------


def test_pending_inputs_of_vllm_are_written_and_marked() -> None:
    emission = render(ep_plan(), "vllm", SMALL)
    files = emission.files
    assert json.loads(files["pending_expert_map.json"]) == ROWS
    line = json.loads(files["pending_initial_mapping.jsonl"])
    assert line["record_type"] == "eplb_initial_mapping" and line["initial_global_assignments"] == {
        "0": ROWS[0],
        "1": ROWS[1],
    }
    for name, number in (("flags_pending_49572.txt", "49572"), ("flags_pending_41141.txt", "41141")):
        assert "pending" in next(fact for fact in emission.facts if number in fact)
        # The release refuses them: they are not in its configuration.
        broken = {**files, "flags.txt": files[name]}
        assert "pending" in complaint(lambda: validate("vllm", "expert-parallel", broken, SMALL))  # noqa: B023
    assert "pending_expert_ranks.json" not in files  # copies
    v4 = render(
        ep_plan(), "vllm", named("deepseek_v4")
    )  # the released class takes no placement, a proposal for it does
    assert sorted(v4.files) == ["flags.txt", "flags_pending_53022.txt", "pending_expert_map.json"]
    broken = {**v4.files, "pending_expert_map.json": "[[0, 1, 2, 2, 0, 1], [3, 2, 1, 0, 3, 2]]"}
    assert "every expert needs a slot" in complaint(
        lambda: validate("vllm", "expert-parallel", broken, named("deepseek_v4"))
    )


def test_ranks_of_experts_can_be_said_where_all_layers_agree() -> None:
    one = [3, 1, 0, 2]
    emission = render(ep_plan(physical_to_logical=[one, one]), "vllm", SMALL)
    assert json.loads(emission.files["pending_expert_ranks.json"]) == {"expert_to_ep_rank": [1, 0, 1, 0]}
    flags = emission.files["flags_pending_34811.txt"]
    assert "--expert-placement-file pending_expert_ranks.json" in flags and "--enable-eplb" not in flags
    other = render(ep_plan(physical_to_logical=[one, [0, 1, 2, 3]]), "vllm", SMALL)
    assert "pending_expert_ranks.json" not in other.files


def test_hygons_keyed_map() -> None:
    files = render(ep_plan(), "vllm-hygon", SMALL).files
    assert json.loads(files["expert_map.json"]) == {
        "model_maps": {"DeepseekV3ForCausalLM": {"physical_to_logical_map": ROWS}}
    }
    unknown = render(ep_plan(), "vllm-hygon", named("olmoe")).files
    assert json.loads(unknown["expert_map.json"]) == {"physical_to_logical_map": ROWS}
    both = {
        **files,
        "flags.txt": files["flags.txt"].replace(
            '"expert_map_path"', '"expert_map_record_path": "r.json", "expert_map_path"'
        ),
    }
    assert "keep one" in complaint(lambda: validate("vllm-hygon", "expert-parallel", both, SMALL))
    other = {**files, "expert_map.json": files["expert_map.json"].replace("DeepseekV3", "DeepseekV2")}
    assert "DeepseekV3ForCausalLM is absent" in complaint(
        lambda: validate("vllm-hygon", "expert-parallel", other, SMALL)
    )


# --- the engines themselves, where they are there ------------------------------------------------------------------------------

_OWN_CHECK = """
import json, sys
import torch
from accelerate.utils.modeling import check_device_map
from transformers import AutoConfig, AutoModelForCausalLM
if torch is None: sys.exit(3)
config = AutoConfig.for_model(**json.loads(sys.argv[2]))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
check_device_map(model, json.load(open(sys.argv[1])))
"""


def test_accelerates_own_check_takes_the_map(tmp_path: Path) -> None:
    """Run where accelerate and a transformers of version 4 are installed: MOEPLAN_TRANSFORMERS_4 names their Python."""
    python = os.environ.get("MOEPLAN_TRANSFORMERS_4", "")
    if not python:
        pytest.skip("MOEPLAN_TRANSFORMERS_4 is not set")
    files = emitted(tmp_path, offload_plan(TINY, cache__policy="static", cache__pooled_experts=33), "accelerate", TINY)
    assert files
    config = {"model_type": "mixtral", "num_hidden_layers": TINY.num_layers, "num_local_experts": TINY.num_experts,
              "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
    call = [python, "-c", _OWN_CHECK, str(tmp_path / "device_map.json"), json.dumps(config)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_groups_that_share_attention_become_the_engines_own_words() -> None:
    whole = render(ep_plan(), "vllm", SMALL).files["flags.txt"]
    ranks = int(whole.split("--data-parallel-size ")[1].split()[0])
    both = SCHEDULE.with_options(parallel__attention="tensor", parallel__attention_ranks=ranks)
    flags = render(ep_plan(both), "vllm", SMALL).files["flags.txt"]
    assert f"--tensor-parallel-size {ranks}\n" in flags and "--data-parallel-size 1\n" in flags
    more = SCHEDULE.with_options(parallel__attention="tensor", parallel__attention_ranks=2 * ranks)
    with pytest.raises(InputError, match="do not divide into groups"):
        render(ep_plan(more), "vllm", SMALL)
