"""Fits to AIConfigurator's tables, made here in the shape of the wheel's: constants come back, traps stay out, what judges is not read."""

from __future__ import annotations

import builtins
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmark_modules import benchmark_module
from moeplan.base.errors import InputError, MoeplanError, UnknownName
from moeplan.calibrate.costs.gpu.exchanges import exchange_s
from moeplan.calibrate.costs.gpu.experts import experts_s
from moeplan.calibrate.costs.gpu.products import product_s
from moeplan.calibrate.imports.aiconfigurator import tables as tables_module
from moeplan.calibrate.imports.aiconfigurator.kernels import fit_engine
from moeplan.calibrate.imports.aiconfigurator.loads import expert_work
from moeplan.calibrate.imports.aiconfigurator.profile import import_kernels
from moeplan.calibrate.imports.aiconfigurator.routing import balanced_counts, heaviest_rank, power_law_counts
from moeplan.calibrate.imports.aiconfigurator.tables import (
    counts_others,
    fair_attention,
    fair_experts,
    fair_products,
    open_tables,
)
from moeplan.specs.catalog import KERNELS_FOLDER
from moeplan.specs.machines.bundled_kernels import bundled_kernels
from moeplan.specs.machines.profile_file import load_hardware

BUNDLED = bundled_kernels("h200-sxm", "tensorrt-llm")
VERSIONS = """schema_version: 1
defaults:
  trtllm: {current: "1.3.0rc20", previous: null}
  sglang: {current: "0.5.14", previous: null}
  vllm: {current: "0.24.0", previous: null}
overrides: {}
"""


def moe_table() -> pd.DataFrame:
    models = ((4096, 1536, 8, 128), (2048, 768, 8, 128), (4096, 14336, 2, 8), (7168, 2048, 8, 256))
    keys = [(h, i, k, e, 1, ep, kind, t) for (h, i, k, e) in models
            for ep in (1, 8) for kind in ("balanced", "power_law_1.2") for t in (1, 4, 16, 64, 256, 1024)]  # fmt: skip
    names = [
        "hidden_size",
        "inter_size",
        "topk",
        "num_experts",
        "moe_tp_size",
        "moe_ep_size",
        "distribution",
        "num_tokens",
    ]
    rows = pd.DataFrame(keys, columns=names).assign(kernel_source="moe_torch_flow_cutlass", moe_dtype="bfloat16")
    shape, load = expert_work(rows, "bf16")
    return rows.assign(latency=experts_s(BUNDLED.experts["bf16"], shape, load, 132) * 1e3)


def gemm_table() -> pd.DataFrame:
    rows = pd.DataFrame(
        list(itertools.product((1, 16, 128, 1024, 4096), (1536, 4096, 8192), (2048, 7168))), columns=["m", "n", "k"]
    )
    seconds = product_s(BUNDLED.products["bf16"], rows["m"], rows["n"], rows["k"], 2.0, 132)
    return rows.assign(gemm_dtype="bfloat16", latency=seconds * 1e3)


def nccl_table() -> pd.DataFrame:
    sizes = 2 ** np.arange(8, 28)
    port = sizes * 2 * 7 / 8
    seconds = exchange_s(BUNDLED.exchanges["all-to-all/node-8"], port)
    return pd.DataFrame(
        {"op_name": "alltoall", "nccl_dtype": "half", "num_gpus": 8, "message_size": sizes, "latency": seconds * 1e3}
    )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The folder `systems` of a wheel with tables that the bundled constants give exactly, and files that nobody may read."""
    (tmp_path / "query_versions.yaml").write_text(VERSIONS)
    (tmp_path / "silicon_sample.csv").write_text("never,read\n")
    data = tmp_path / "data" / "h200_sxm"
    for path, table in (("moe/trtllm/1.3.0rc20/moe_perf", moe_table()), ("gemm/trtllm/1.3.0rc20/gemm_perf", gemm_table()),
                        ("comm/nccl/2.29.2/nccl_perf", nccl_table())):  # fmt: skip
        file = data / f"{path}.parquet"
        file.parent.mkdir(parents=True)
        table.to_parquet(file)
    (data / "moe/trtllm/1.3.0rc20/wideep_moe_perf.parquet").write_bytes(b"no table")
    (tmp_path / "data" / "l4").mkdir()
    return tmp_path


def test_a_fit_finds_the_constants_that_made_the_tables(wheel):
    kernels, errors = fit_engine(open_tables("h200_sxm", wheel, "0"), "tensorrt-llm", 4.8e12)
    for part, key in (("experts", "bf16"), ("products", "bf16"), ("exchanges", "all-to-all/node-8")):
        found, true = getattr(kernels, part)[key], getattr(BUNDLED, part)[key]
        assert found.start_s == pytest.approx(true.start_s, rel=0.03)
        assert found.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.03)
        assert errors[f"{part}.{key}"].median < 0.02
    assert not kernels.experts["bf16"].all_rows


def test_a_profile_is_written_whole_and_never_from_what_judges_it(wheel, tmp_path, monkeypatch):
    opened: list[str] = []
    real_open, real_read = builtins.open, pd.read_parquet

    def spy(path: Any, *rest: Any, **more: Any) -> Any:
        opened.append(str(path))
        return real_open(path, *rest, **more)

    def read(path: Any, *rest: Any, **more: Any) -> Any:
        opened.append(str(path))
        return real_read(path, *rest, **more)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(pd, "read_parquet", read)
    out = tmp_path / "mine.json"
    document = import_kernels("h200_sxm", out, folder=wheel, version="0")
    assert any("moe_perf" in path for path in opened)
    assert not [path for path in opened if any(word in path for word in tables_module.LEFT_TO_JUDGE)]
    profile = load_hardware(out)
    assert profile.name == "mine" and profile.kernels.engine == "tensorrt-llm"
    assert document["fit"]["experts.bf16"]["median_error"] < 0.02
    assert "normal-dispatch/node-8" in document["kept"]  # DeepEP's tables judge


def test_what_judges_cannot_be_asked_for(wheel):
    tables = open_tables("h200_sxm", wheel, "0")
    with pytest.raises(InputError, match="kept to judge"):
        tables.read("moe/wideep_moe_perf", "tensorrt-llm")


@pytest.mark.parametrize("column", ["hidden_size", "latency", "distribution"])
def test_a_missing_column_is_named_and_nothing_written(wheel, tmp_path, column):
    path = wheel / "data/h200_sxm/moe/trtllm/1.3.0rc20/moe_perf.parquet"
    pd.read_parquet(path).drop(columns=column).to_parquet(path)
    out = tmp_path / "mine.json"
    with pytest.raises(InputError, match=f"no column {column}"):
        import_kernels("h200_sxm", out, folder=wheel, version="0")
    assert not out.exists()


def break_latency(wheel: Path) -> None:
    path = wheel / "data/h200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf.parquet"
    table = pd.read_parquet(path)
    table.loc[3, "latency"] = float("nan")
    table.to_parquet(path)


@pytest.mark.parametrize(
    ("damage", "system", "engine", "match"),
    [
        (break_latency, "h200_sxm", None, "no positive numbers"),
        (
            lambda w: (w / "data/h200_sxm/moe/trtllm/1.3.0rc20/moe_perf.parquet").write_bytes(b"PAR1"),
            "h200_sxm",
            None,
            "not a table",
        ),
        (lambda w: (w / "query_versions.yaml").write_text("schema_version: 7\n"), "h200_sxm", None, "schema_version 7"),
        (lambda w: (w / "query_versions.yaml").write_text("- 1\n"), "h200_sxm", None, "another form"),
        (lambda w: (w / "query_versions.yaml").unlink(), "h200_sxm", None, "lacks it"),
        (lambda w: None, "l4", None, "no table of experts"),
        (lambda w: None, "h20_sxm", None, "h200_sxm"),
        (lambda w: None, "h200_sxm", "vllm", "choose tensorrt-llm"),
        (lambda w: None, "h200_sxm", "llama.cpp", "not one of"),
        (lambda w: None, None, None, "name one"),
    ],
)
def test_tables_of_another_form_are_one_line(wheel, tmp_path, damage, system, engine, match):
    damage(wheel)
    with pytest.raises(MoeplanError, match=match) as refused:
        import_kernels(system, tmp_path / "mine.json", engine=engine, folder=wheel, version="0")
    assert isinstance(refused.value, (InputError, UnknownName)) and "\n" not in str(refused.value)
    assert not (tmp_path / "mine.json").exists()


def test_without_the_wheel_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tables_module, "installed_folder", lambda: None)
    with pytest.raises(InputError, match=r"moeplan\[aic\]"):
        import_kernels("h200_sxm", tmp_path / "mine.json")


def test_the_benchmark_says_why_it_skips(monkeypatch, capsys):
    module = benchmark_module("kernel_tables")
    monkeypatch.setattr(module, "installed_folder", lambda: None)
    assert module.main([]) == 0
    assert "skipped: the wheel aiconfigurator-core is not installed" in capsys.readouterr().out


def test_the_benchmark_prints_errors_of_what_the_tables_hold(wheel, monkeypatch, capsys):
    module = benchmark_module("kernel_tables")
    monkeypatch.setattr(module, "installed_folder", lambda: wheel)
    monkeypatch.setattr(module, "open_tables", lambda system: open_tables(system, wheel, "0"))
    monkeypatch.setattr(module, "layer_rows", lambda tables: iter(()))
    module._problems.cache_clear()
    assert module.main(["--system", "h200_sxm", "--engine", "tensorrt-llm", "--json"]) == 0
    module._problems.cache_clear()
    rows = {f"{row['part']}.{row['key']}": row for row in json.loads(capsys.readouterr().out)["kernels"]}
    assert set(rows) == {"experts.bf16", "products.bf16", "exchanges.all-to-all/node-8"}
    for row in rows.values():  # the tables are the bundled constants' own
        assert row["median"] < 0.02 and row["bundled_median"] < 1e-6 and row["held"] == 1.0


def test_routing_is_the_collectors():
    """Balanced: token t's i-th choice is t + i · stride; skewed: all choices, no expert more often than there are tokens."""
    assert balanced_counts(16, 16, 4).tolist() == [4] * 16
    assert np.flatnonzero(balanced_counts(1, 256, 8)).tolist() == list(range(0, 256, 32))
    rng = np.random.default_rng(0)
    for tokens, experts, top_k, ranks in ((1, 128, 8, 8), (64, 128, 8, 4), (1024, 8, 2, 1), (5, 256, 8, 32)):
        counts = power_law_counts(tokens, experts, top_k, ranks, 1.2, rng)
        assert counts.sum() == tokens * top_k and counts.min() >= 0 and counts.max() <= tokens
    active, rows, *tiles, enter = heaviest_rank(256, 128, 8, 8, "balanced")
    assert (active, rows, tiles[0], tiles[-1], enter) == (16, 256, 16, 16, 256)
    assert heaviest_rank(256, 128, 8, 8, "power_law_1.2")[1] > 256  # the fullest rank has more than its share


@pytest.mark.parametrize("distribution", ["balanced", "power_law_1.01", "power_law_1.2"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ranks"), [(256, 128, 8, 8), (64, 256, 8, 64), (7, 64, 6, 1), (1000, 16, 2, 4)]
)
def test_choices_of_other_gpus_are_rows_of_the_first_expert_where_a_collector_made_them_so(
    distribution, tokens, experts, top_k, ranks
):
    plain, others = (heaviest_rank(tokens, experts, top_k, ranks, distribution, flag) for flag in (False, True))
    assert others[-1] <= plain[-1] == tokens
    assert others[1] == pytest.approx(others[-1] * top_k)  # every choice of a token that enters
    assert others[1] >= plain[1] and (others == plain if ranks == 1 else others[0] >= plain[0])


def test_traps_stay_out():
    rows = moe_table()
    for number in ("fp8_block", "nvfp4"):
        grouped = rows.assign(moe_dtype=number)
        for engine, version in (("vllm", "0.24.0"), ("sglang", "0.5.14"), ("sglang", "0.6.0")):
            assert 7168 not in set(fair_experts(grouped, engine, version)["hidden_size"])
        for engine, version in (("sglang", "0.5.10"), ("tensorrt-llm", "1.3.0rc20")):
            assert len(fair_experts(grouped, engine, version)) == len(grouped)
    assert (
        counts_others("sglang", "0.5.10")
        and not counts_others("sglang", "0.5.14")
        and not counts_others("vllm", "0.5.10")
    )
    assert fair_experts(rows.assign(kernel_source="moe_torch_flow_nongated"), "tensorrt-llm").empty
    blocks = gemm_table().assign(gemm_dtype="fp8_block")
    assert fair_products(blocks, "vllm").empty and len(fair_products(blocks, "tensorrt-llm")) == len(blocks)
    heads = pd.DataFrame(
        {
            "num_heads": [64, 64, 64, 32],
            "num_key_value_heads": [1, 8, 8, 8],
            "head_dim": [128, 128, 128, 256],
            "window_size": [0, 0, 128, 0],
        }
    )
    assert fair_attention(heads).index.tolist() == [1]


def test_the_bundled_constants_say_where_they_come_from():
    path = KERNELS_FOLDER / "h200-sxm.json"
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert entry["source"] == "published" and "DeepEP" in entry["exchanges_citation"]
    assert all("aiconfigurator-core" in engine["citation"] for engine in entry["engines"].values())
