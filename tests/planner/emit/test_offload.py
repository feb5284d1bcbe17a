"""Offload plans as engines' files: whole small files, notes, and what validators refuse."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emit_plans import SMALL, complaint, emitted, notes_of, offload_plan
from moeplan.planner.emit.engines.kt_kernel import _ratio
from moeplan.planner.emit.engines.sglang_paging import grouping
from moeplan.planner.emit.targets import OFFLOAD_TARGETS, render, validate
from moeplan.specs.models import ModelSpec, weight_format
from moeplan.specs.models.load import load_model

TINY = load_model("tiny-moe")  # Mixtral's family: 6 layers of 16 experts, top 2
EXPERT_BYTES = SMALL.expert_bytes(weight_format(SMALL.native_bits))
EXPS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
NO_COPIES = "experts in host memory are computed by the processor, not copied: the plan's copy times do not apply"


def flags(target: str, model: ModelSpec = SMALL, name: str = "flags.txt", **options: Any) -> list[list[str]]:
    text = render(offload_plan(model, **options), target, model).files[name]
    return [shlex.split(line) for line in text.splitlines()]


def notes(target: str, model: ModelSpec = SMALL, **options: Any) -> list[str]:
    return list(render(offload_plan(model, **options), target, model).notes)


# --- engines ---------------------------------------------------------------------------------------------------------------


def test_llamacpp(tmp_path: Path) -> None:
    plan = offload_plan(TINY, cache__policy="static", cache__pooled_experts=40)
    files = emitted(tmp_path, plan, "llamacpp", TINY)
    assert list(files) == ["flags.txt", "flags_override_tensor.txt", "NOTES.txt"]
    assert files["flags.txt"] == "--n-gpu-layers 999\n--n-cpu-moe 4\n"
    override = r"--override-tensor 'blk\.(0|1|2|3)" + EXPS + "'"
    assert files["flags_override_tensor.txt"].splitlines() == ["--n-gpu-layers 999", override]
    assert notes_of(files["NOTES.txt"]) == [
        (
            "cache.policy=static: single experts cannot be placed, a layer's experts are one tensor; 2 whole layers are on the "
            "device, never changed, where the plan has 40 experts (8 unused)"
        ),
        NO_COPIES,
    ]


def test_llamacpp_counts_absolute_layers_and_offers_its_cache() -> None:
    options = {"cache__policy": "lru", "cache__experts_per_layer": 2}
    assert flags("llamacpp", **options) == [["--n-gpu-layers", "999"], ["--n-cpu-moe", "2"]]
    cached = [["--n-gpu-layers", "999"], ["--cpu-moe"], ["--moe-cache-mib", str(4 * EXPERT_BYTES // 2**20)]]
    assert flags("llamacpp", name="flags_expert_cache.txt", **options) == cached
    everything = {"cache__policy": "static", "cache__experts_per_layer": 4}
    assert flags("llamacpp", **everything) == [["--n-gpu-layers", "999"]]
    assert notes("llamacpp", **everything) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cache__policy": "static", "cache__experts_per_layer": 3},
         [["--kt-num-gpu-experts", "3"], ["--kt-expert-placement-strategy", "frequency"]]),
        ({"cache__policy": "lru", "cache__pooled_experts": 3},
         [["--kt-gpu-experts-ratio", "0.4"], ["--kt-expert-placement-strategy", "uniform"], ["--kt-enable-dynamic-expert-update"],
          ["--kt-gpu-prefill-token-threshold", "2048"]]),
        ({"cache__policy": "none"}, [["--kt-num-gpu-experts", "0"], ["--kt-expert-placement-strategy", "uniform"]]),
        ({"cache__policy": "static", "cache__pooled_experts": 8},
         [["--kt-gpu-experts-ratio", "1.0"], ["--kt-expert-placement-strategy", "uniform"]]),
    ],
)  # fmt: skip
def test_kt_kernel(options: dict[str, Any], expected: list[list[str]]) -> None:
    assert flags("kt-kernel", **options) == expected


def test_kt_kernel_says_what_it_cannot() -> None:
    assert notes("kt-kernel", cache__policy="lfu", cache__experts_per_layer=2, predictor__kind="next-gate") == [
        "cache.policy=lfu: experts on the device change after long prompts only, not at every miss",
        NO_COPIES,
        "predictor.kind=next-gate (depth 1, staging 0): nothing is fetched ahead",
    ]


@given(st.integers(1, 20_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_a_ratio_means_the_count_it_was_made_from(drawn: tuple[int, int]) -> None:
    cached, total = drawn
    ratio = _ratio(cached, total)
    assert int(total * ratio) == cached and 0.0 <= ratio <= 1.0


def test_moe_infinity(tmp_path: Path) -> None:
    files = emitted(tmp_path, offload_plan(cache__policy="lru", cache__pooled_experts=3), "moe-infinity")
    # Dense weights and resident experts: half of the budget.
    config = {"offload_path": "./offload", "device_memory_ratio": 0.5, "prefetch": False}
    assert json.loads(files["archer_config.json"]) == config
    assert notes_of(files["NOTES.txt"]) == [
        "cache.policy=lru: 3 experts share a pool of 500000 bytes with all other parameters; the engine's own traces choose victims"
    ]


def test_mixtral_offloading(tmp_path: Path) -> None:
    options = {
        "cache__policy": "lru",
        "cache__pooled_experts": 40,
        "predictor__kind": "next-gate",
        "predictor__staging": 3,
    }
    files = emitted(tmp_path, offload_plan(TINY, **options), "mixtral-offloading", TINY)
    config = {"main_size": 36, "offload_size": 60, "buffer_size": 3, "offload_per_layer": 10}
    assert json.loads(files["offload_config.json"]) == config
    assert notes_of(files["NOTES.txt"])[:2] == [
        "cache.pooled_experts=40: each layer gets its own 6, 4 are unused",
        "predictor.kind=next-gate (depth 1, staging 3): the published code fetches no guesses",
    ]


def test_mixtral_offloading_as_its_code_runs_has_little_to_add() -> None:
    options = {"cache__policy": "lru", "cache__experts_per_layer": 8, "copy__overlap": False, "copy__write_back": True}
    assert notes("mixtral-offloading", TINY, **options) == ["predictor.staging=0: swaps need buffers; 4, as published"]
    refused = complaint(lambda: render(offload_plan(cache__experts_per_layer=2), "mixtral-offloading", SMALL))
    assert "family for Mixtral-offloading = 'deepseek_v3': not one of: mixtral" in refused


def test_accelerate(tmp_path: Path) -> None:
    files = emitted(tmp_path, offload_plan(cache__policy="static", cache__pooled_experts=3), "accelerate")
    inside = {
        "self_attn": 0,
        "input_layernorm": 0,
        "post_attention_layernorm": 0,
        "mlp.gate": 0,
        "mlp.shared_experts": 0,
    }
    places: dict[str, int | str] = {"model.embed_tokens": 0, "model.layers.0": 0}
    for layer, kept in ((1, 2), (2, 1)):
        places |= {f"model.layers.{layer}.{name}": place for name, place in inside.items()}
        places |= {f"model.layers.{layer}.mlp.experts.{e}": 0 if e < kept else "cpu" for e in range(4)}
    assert json.loads(files["device_map.json"]) == places | {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    assert notes_of(files["NOTES.txt"]) == [
        (
            "cache.policy=static: 1 or 2 experts of each layer, the lowest indices, are on the device and never change; the others "
            "are copied at every use and not kept"
        ),
        "transformers 5: a layer's experts are one module of a block named mlp; name model.layers.N.mlp.experts as a whole there",
    ]


def test_accelerate_knows_families_with_module_lists_only() -> None:
    mixtral = render(offload_plan(TINY, cache__experts_per_layer=2), "accelerate", TINY).files["device_map.json"]
    assert json.loads(mixtral)["model.layers.5.block_sparse_moe.experts.15"] == "cpu"
    fused = load_model("gpt-oss-20b")
    refused = complaint(lambda: render(offload_plan(fused, cache__experts_per_layer=2), "accelerate", fused))
    assert "family with a module list of experts = 'gpt_oss'" in refused


def test_vllm_reads_routed_experts_over_the_bus() -> None:
    found = flags("vllm", TINY, cache__policy="lru", cache__experts_per_layer=4)
    away = 72 * TINY.expert_bytes(weight_format(TINY.native_bits))
    gib = float(found[1][1])
    assert found == [["--offload-backend", "uva"], ["--cpu-offload-gb", str(gib)], ["--cpu-offload-params", "experts"]]
    assert 0 <= gib * 2**30 - away < 2**30 / 100
    assert flags("vllm", cache__policy="static", cache__experts_per_layer=4) == []


def test_engines_that_fetch_whole_layers_ahead() -> None:
    whole = {"cache__policy": "none", "copy__fetch": "layer"}
    groups = [["--offload-group-size", "1"], ["--offload-num-in-group", "1"], ["--offload-prefetch-step", "1"]]
    assert flags("vllm", **whole) == [["--offload-backend", "prefetch"], *groups, ["--offload-params", "experts"]]
    assert flags("sglang", **whole) == groups


def test_sglang_pages_experts_into_a_cache_of_each_layer() -> None:
    found = flags("sglang", TINY, cache__policy="lru", cache__experts_per_layer=5)
    assert found == [
        ["--enable-paged-experts"],
        ["--paged-experts-num-resident", "5"],
        ["--cuda-graph-backend-prefill", "disabled"],
    ]
    assert notes("sglang", TINY, cache__policy="lru", cache__experts_per_layer=5) == []
    assert notes("sglang", TINY, cache__policy="static", cache__pooled_experts=33) == [
        "cache.pooled_experts=33: each layer gets its own 5, 3 are unused",
        "cache.policy=static: the least recently used expert of a layer makes room",
    ]
    assert flags("sglang", cache__policy="static", cache__experts_per_layer=4) == []


def test_groups_offload_the_fewest_layers_that_are_enough() -> None:
    assert grouping(SMALL, 2) == (1, 1)  # MoE layers 1 and 2 of three
    assert grouping(SMALL, 1) == (2, 1)
    for wanted in range(1, TINY.num_moe_layers + 1):
        group, inside = grouping(TINY, wanted)
        assert sum(layer % group >= group - inside for layer in TINY.moe_layers) == wanted


def test_the_checkpoints_own_format_needs_no_word() -> None:
    everything = {"cache__policy": "static", "cache__experts_per_layer": 4}
    assert notes("kt-kernel", experts__bits=SMALL.native_bits, **everything) == []
    assert notes("kt-kernel", experts__bits="4", **everything) == [
        "experts.bits=4: the checkpoint decides: load one whose experts are stored so"
    ]


def test_every_option_that_is_not_expressed_is_named() -> None:
    options = {
        "cache__experts_per_layer": 2, "experts__bits": "4", "predictor__kind": "synthetic", "predictor__depth": 2,
        "kernel__grouping": "per-expert", "copy__overlap": False, "copy__write_back": True, "copy__chunk_bytes": 8192,
        "copy__pinned": False, "host__per_layer_s": 0.001, "workload__concurrency": 3, "workload__prefill_chunk_tokens": 64,
    }  # fmt: skip
    for target in sorted(set(OFFLOAD_TARGETS) - {"mixtral-offloading"}):
        text = "\n".join(notes(target, **options))
        for key in ("experts.bits=4", "predictor.kind=synthetic (depth 2", "kernel.grouping=per-expert", "copy.overlap=False",
                    "copy.write_back=True", "copy.chunk_bytes=8192", "copy.pinned=False", "host.per_layer_s=0.001",
                    "workload.concurrency=3", "workload.prefill_chunk_tokens=64"):  # fmt: skip
            assert key in text, target


# --- what validators refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "old", "new", "rule"),
    [
        ("llamacpp", "flags.txt", "--n-cpu-moe 2", "--n-cpu-moe -1", "below 0"),
        ("llamacpp", "flags.txt", "--n-cpu-moe 2", "--n-cpu-moe 3", "divide the layers differently"),
        ("llamacpp", "flags.txt", "--n-cpu-moe", "--n-cpu-mo", "did you mean '--n-cpu-moe'?"),
        ("llamacpp", "flags_override_tensor.txt", "(1)", "(0)", "not MoE layers"),
        ("llamacpp", "flags_override_tensor.txt", "exps=", "exps.3=", "not whole layers' experts"),
        ("llamacpp", "flags_expert_cache.txt", "--cpu-moe\n", "", "the flag is needed"),
        ("kt-kernel", "flags.txt", "experts 2", "experts 5", "a layer has 4"),
        ("kt-kernel", "flags.txt", "--kt-num", "--kt-gpu-experts-ratio 0.5\n--kt-num", "the ratio overrides it"),
        ("kt-kernel", "flags.txt", "--kt-num-gpu-experts 2", "--kt-gpu-experts-ratio 1.5", "above 1"),
        ("kt-kernel", "flags.txt", "uniform", "even", "not one of: frequency"),
        ("moe-infinity", "archer_config.json", "0.5", "1.5", "above 1"),
        ("moe-infinity", "archer_config.json", "0.5", '"0.5"', "not of type float"),
        ("moe-infinity", "archer_config.json", "prefetch", "prefetsch", "did you mean 'prefetch'?"),
        ("moe-infinity", "archer_config.json", ' "offload_path": "./offload",', "", "a key is absent"),
        ("accelerate", "device_map.json", "experts.3", "experts.4", "did you mean"),
        ("accelerate", "device_map.json", '"cpu"', '"gpu"', "not a device"),
        ("accelerate", "device_map.json", '"model.layers.0": 0', '"model.layers.0": true', "not a device"),
        ("accelerate", "device_map.json", ' "model.norm": 0,', "", "a module has no device"),
        ("vllm", "flags.txt", "uva", "prefetch", "not an option of prefetch"),
        ("vllm", "flags.txt", "gb 0", "gb -0", "below 0"),
        ("sglang", "flags.txt", "resident 2", "resident 1", "not from 2 to 4"),
        ("sglang", "flags.txt", "--enable-paged-experts\n", "", "the flag is needed"),
        ("sglang", "flags.txt", "--enable", "--offload-group-size 2\n--offload-num-in-group 3\n--enable", "not from 1 to 2"),
    ],
)  # fmt: skip
def test_validators_refuse(target: str, name: str, old: str, new: str, rule: str) -> None:
    files = dict(render(offload_plan(cache__experts_per_layer=2), target, SMALL).files)
    validate(target, "offload", files, SMALL)
    assert old in files[name]
    files[name] = files[name].replace(old, new, 1)
    assert rule in complaint(lambda: validate(target, "offload", files, SMALL))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [("main_size", 13, "makes it 36"), ("offload_per_layer", 17, "a layer has 16 experts"), ("buffer_size", 0, "below 1"),
     ("buffer_size", 4.0, "not of type int"), ("more", 1, "not one of")],
)  # fmt: skip
def test_mixtral_offloading_numbers_must_agree(key: str, value: object, rule: str) -> None:
    text = render(offload_plan(TINY, cache__experts_per_layer=6), "mixtral-offloading", TINY).files[
        "offload_config.json"
    ]
    files = {"offload_config.json": json.dumps(json.loads(text) | {key: value})}
    assert rule in complaint(lambda: validate("mixtral-offloading", "offload", files, TINY))
