"""Plans for ik_llama.cpp and KTransformers: their own settings, rivals and command lines, never worse than doing nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeplan.api.emit import emit
from moeplan.api.plan import plan
from moeplan.base.errors import InputError, UnknownName
from moeplan.planner.emit.engines import kt_commands
from moeplan.planner.emit.engines.llamacpp_commands import IK_BENCH, IK_SERVER, check_served
from moeplan.planner.emit.targets import render
from moeplan.planner.offload import baselines
from moeplan.specs.provenance import model_of

MACHINE = "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB"


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    """Return one plan for each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "CHECKED_STEPS", 3)
        found = {
            engine: plan("qwen3-30b-a3b", MACHINE, target=engine, quant="Q4_K_M", prompt_tokens=3000, reply_tokens=8).to_dict()
            for engine in ("ik_llama.cpp", "ktransformers")
        }  # fmt: skip
    return {engine: json.loads(json.dumps(one)) for engine, one in found.items()}


def test_each_engine_has_its_own_rival_and_is_not_beaten_by_it(plans: dict[str, dict[str, Any]]) -> None:
    for engine, document in plans.items():
        part = document["for"]
        assert part["engine"] == engine and document["best"]["request_s"] <= document["baselines"][0]["request_s"]
        assert all(document["best"]["request_s"] <= one["request_s"] for one in part["tried"])
    ik, kt = plans["ik_llama.cpp"], plans["ktransformers"]
    # Nothing set is everything on the card, which does not fit this one; it has neither llama.cpp's --fit nor --no-op-offload.
    assert (
        set(ik["baselines_that_do_not_fit"]) == {"-ngl 999 -ub 512"}
        and ik["for"]["default"]["name"] == "--cpu-moe -ub 512"
    )
    assert not any("--fit" in one["name"] or "--no-op-offload" in one["name"] for one in ik["for"]["tried"])
    assert kt["for"]["default"]["experts_per_layer"] == 0
    counts = {one["experts_per_layer"] for one in kt["for"]["tried"]}
    assert min(counts) == 0 and len(counts) > 4
    assert kt["best"]["schedule"]["cache"]["experts_per_layer"] == kt["for"]["setting"]["experts_per_layer"]


def test_ik_llama_commands_have_only_its_own_flags(plans: dict[str, dict[str, Any]]) -> None:
    document = plans["ik_llama.cpp"]
    emission = render(document, "llamacpp", model_of(document))
    assert list(emission.files) == ["ik-llama-server.sh", "ik-llama-bench.sh", "ik-llama-bench-default.sh"]
    for name, text in emission.files.items():
        known = IK_SERVER if "server" in name else IK_BENCH
        assert {word for word in text.split()[1:] if word.startswith("-")} <= set(known.flags)
    assert f"--n-cpu-moe {document['for']['setting']['told_layers']} " in emission.files["ik-llama-server.sh"]
    damaged = emission.files["ik-llama-bench.sh"].replace("--n-gen", "--n-depth")
    with pytest.raises(UnknownName):
        check_served(emission.files | {"ik-llama-bench.sh": damaged})


def test_ktransformers_command_is_what_was_planned(plans: dict[str, dict[str, Any]]) -> None:
    document = plans["ktransformers"]
    emission = render(document, "kt-kernel", model_of(document))
    (text,) = emission.files.values()
    chosen = document["for"]["setting"]
    words = text.replace("\\\n", " ").split()
    assert words[words.index("--kt-num-gpu-experts") + 1] == str(chosen["experts_per_layer"])
    assert words[words.index("--chunked-prefill-size") + 1] == str(chosen["ubatch"])
    assert {word for word in words if word.startswith("--")} <= set(kt_commands.SERVER.flags)
    assert ("--kt-gpu-prefill-token-threshold" in words) == (chosen["upload_tokens"] is not None)
    assert len(emission.measure) == 2 and "--kt-num-gpu-experts 0" in emission.measure[1]
    for old, new, error in (
        ("--kt-num-gpu-experts ", "--kt-num-gpu-experts 9", InputError), ("--max-running-requests", "--max-running", UnknownName),
    ):  # fmt: skip
        with pytest.raises(error):
            kt_commands.check_served({kt_commands.SERVER_FILE: text.replace(old, new)}, model_of(document))


@pytest.mark.parametrize(
    ("engine", "kind", "said"),
    [
        ("ik_llama.cpp", "q8_KV", None),
        ("ik_llama.cpp", "nvfp4", "ik_llama.cpp has"),
        ("ktransformers", "q8_0", "SGLang has"),
    ],
)
def test_cache_types_are_the_engines_own(
    plans: dict[str, dict[str, Any]], engine: str, kind: str, said: str | None, tmp_path: Any
) -> None:
    document = dict(plans[engine])
    document["asked"] = document["asked"] | {"kv_type": kind}
    target = {"ik_llama.cpp": "llamacpp", "ktransformers": "kt-kernel"}[engine]
    if said is None:
        written = emit(document, target, output=tmp_path / "out")
        assert "--cache-type-k q8_KV" in written[0].read_text(encoding="utf-8")
    else:
        with pytest.raises(InputError, match=said):
            emit(document, target, output=tmp_path / "out")
