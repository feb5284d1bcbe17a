"""How well the forms of datacentre kernels give AIConfigurator's measured tables, shapes left out, and whole layers of two models.

    python -m benchmarks.kernel_tables [--system h200_sxm ...] [--engine tensorrt-llm ...] [--json]

Prints for every operation and card the median and the ninth tenth of |predicted / measured - 1| where half of the shapes was fitted
and the other half predicted, both ways; beside them the errors of the bundled constants on the same rows, and whether nine in ten
intervals hold. Then whole decode layers of DeepSeek-V3 (8-bit blocks) and Qwen3-235B-A22B (16 bits) at 4096 tokens of context: the
sum of measured kernels beside that of predicted ones, these models' shapes left out of every fit. DeepEP's
constants are a published study's, beside the tables that it fitted. Skips, saying so, without the wheel aiconfigurator-core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from moeplan.calibrate.costs.gpu.attention import decode_s, latent_layer_s
from moeplan.calibrate.costs.gpu.exchanges import exchange_s
from moeplan.calibrate.costs.gpu.experts import experts_s
from moeplan.calibrate.costs.gpu.products import product_s
from moeplan.calibrate.imports.aiconfigurator.fits import errors_of, fit, fit_without, relative
from moeplan.calibrate.imports.aiconfigurator.kernels import UNITS, best
from moeplan.calibrate.imports.aiconfigurator.loads import WEIGHT_BYTES, expert_work
from moeplan.calibrate.imports.aiconfigurator.named import Named
from moeplan.calibrate.imports.aiconfigurator.problems import engine_problems, latent_layer_work
from moeplan.calibrate.imports.aiconfigurator.tables import MACHINES, Tables, installed_folder, open_tables
from moeplan.specs.machines.bundled_kernels import bundled_kernels
from moeplan.specs.machines.gpu_kernels import INSIDE, exchange_key
from moeplan.specs.machines.profile_file import load_hardware

SYSTEMS = tuple(MACHINES)
TARGETS = {"experts": 0.09, "exchanges": 0.10}
"""Largest median error that is wanted; others below."""
OTHER_TARGET, LAYER_TARGET = 0.10, 0.05
_US, _CONTEXT, _RANKS = 1e-6, 4096, 8
_LAYER_SYSTEMS = ("h100_sxm", "h200_sxm", "b200_sxm")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    system: str
    engine: str
    part: str
    key: str
    rows: int
    median: float
    nine_in_ten: float
    bundled_median: float | None
    """Of the bundled constants on all rows."""
    held: float | None
    """Share of rows within the bundled interval."""
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is."""
        return self.median <= self.target


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; returns 0, also where the wheel is absent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_tables", description=__doc__.splitlines()[0])
    parser.add_argument("--system", action="append", choices=SYSTEMS)
    parser.add_argument("--engine", action="append", choices=("tensorrt-llm", "vllm", "sglang"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if installed_folder() is None:
        print("skipped: the wheel aiconfigurator-core is not installed (pip install 'moeplan[aic]')")
        return 0
    rows: list[Row] = []
    for system in given.system or SYSTEMS:
        tables = open_tables(system)
        for engine in given.engine or tables.engines:
            for row in (*kernel_rows(tables, engine), *(deepep_rows(tables) if engine == tables.engines[0] else ())):
                rows.append(row)
                if not given.json:
                    print(_line(row), flush=True)
    layers = [
        layer
        for system in given.system or _LAYER_SYSTEMS
        if system in _LAYER_SYSTEMS
        for layer in layer_rows(open_tables(system))
    ]
    summary = _summary(rows, layers)
    if given.json:
        print(
            json.dumps(
                {"kernels": [dataclasses.asdict(row) for row in rows], "layers": layers, "summary": summary}, indent=1
            )
        )
    else:
        print(f"\nwhole decode layers, {_CONTEXT} tokens of context: predicted / measured")
        for layer in layers:
            print(_layer_line(layer))
        print(json.dumps(summary, indent=1))
    return 0


def _layer_line(layer: dict[str, Any]) -> str:
    which = f"{layer['system']:9} {layer['engine']:13} {layer['model']:16} EP{layer['ranks']} {layer['routing']:15}"
    times = f"{layer['predicted_us']:8.1f} / {layer['measured_us']:8.1f} us = {layer['ratio']:.3f}"
    return f"  {which} batch {layer['batch']:4}: {times}"


def _line(row: Row) -> str:
    bundled = "" if row.bundled_median is None else f"  bundled {row.bundled_median:6.1%}, holds {row.held:4.0%}"
    mark = "" if row.met else "  <- above target"
    return (f"{row.system:9} {row.engine:13} {row.part + '.' + row.key:42} {row.rows:6} rows  median {row.median:6.1%}  "
            f"p90 {row.nine_in_ten:6.1%}{bundled}{mark}")  # fmt: skip


def _summary(rows: Sequence[Row], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"kernels within target": f"{sum(row.met for row in rows)} of {len(rows)}"}
    for part in sorted({row.part for row in rows}):
        found[f"{part}: median over cards and formats"] = float(
            np.median([row.median for row in rows if row.part == part])
        )
    held = [row.held for row in rows if row.held is not None]
    if held:
        found["intervals hold, mean over kernels"] = float(np.mean(held))
    if layers:
        errors = errors_of(np.abs(np.array([layer["ratio"] for layer in layers]) - 1))
        found["layers"] = {
            **dataclasses.asdict(errors),
            "target": LAYER_TARGET,
            "bias": float(np.median([layer["ratio"] for layer in layers]) - 1),
        }
    return found


# --- kernels -------------------------------------------------------------------------------------------------------------


def kernel_rows(tables: Tables, engine: str) -> Iterator[Row]:
    """Yield a line for each kernel of an engine; NCCL's with the first engine only."""
    bundled = bundled_kernels(MACHINES[tables.system], engine)
    for named in _problems(tables.system, engine):
        if named.part == "exchanges" and not named.key.startswith("engine") and engine != tables.engines[0]:
            continue
        _, errors = best(named)
        there = getattr(bundled, named.part).get(named.key) if bundled is not None else None
        median = held = None
        if there is not None:
            problem = named.problems[0]  # alternatives have the same rows, and a kernel says which it is
            off = problem.predict(there, np.arange(len(problem.seconds))) / problem.seconds
            median = float(np.median(np.abs(off - 1)))
            wide = 1 + there.relative_uncertainty
            held = float(((off <= wide) & (off >= 1 / wide)).mean())
        yield Row(
            system=tables.system, engine=engine, part=named.part, key=named.key, rows=errors.rows, median=errors.median,
            nine_in_ten=errors.nine_in_ten, bundled_median=median, held=held, target=TARGETS.get(named.part, OTHER_TARGET),
        )  # fmt: skip


@cache
def _problems(system: str, engine: str) -> tuple[Named, ...]:
    tables = open_tables(system)
    peak = load_hardware(MACHINES[system]).device.memory_bytes_per_s.value
    return tuple(engine_problems(tables, engine, UNITS[system], peak))


def deepep_rows(tables: Tables) -> Iterator[Row]:
    """Yield a line for each of DeepEP's kernels in one node: errors of the bundled constants, which a published study fitted to these
    tables; no fit of ours reads them.
    """
    bundled = bundled_kernels(MACHINES[tables.system], tables.engines[0])
    folder = tables.folder / "data" / tables.system / "comm" / "sglang"
    for mode, name in (("low-latency", "ll"), ("normal", "normal")):
        paths = sorted(folder.glob(f"*/wideep_deepep_{name}_perf.parquet"))
        if not paths or bundled is None:
            continue
        rows = pd.read_parquet(paths[0])  # 0.5.12 sorts first
        rows = rows.loc[rows["node_num"] == 1]
        if name == "normal":
            rows = rows.loc[(rows["dispatch_sms"] == 20) & (rows["combine_sms"] == 20)]
        tokens, hidden, chosen = (rows[key].to_numpy(float) for key in ("num_token", "hidden_size", "num_topk"))
        copies = chosen if name == "ll" else _RANKS * (1 - (1 - 1 / _RANKS) ** chosen)
        port = tokens * hidden * copies * (_RANKS - 1) / _RANKS
        for way, size in (("dispatch", 1 + 4 / 128), ("combine", 2.0)):
            kernel = bundled.exchanges[exchange_key(f"{mode}-{way}", INSIDE, _RANKS)]
            measured = rows[f"{way}_avg_t_us" if name == "ll" else f"{way}_transmit_us"].to_numpy(float) * _US
            predicted = exchange_s(kernel, port * size)
            errors = errors_of(relative(predicted, measured))
            wide = 1 + kernel.relative_uncertainty
            ratio = predicted / measured
            yield Row(system=tables.system, engine="deepep", part="exchanges", key=f"{mode}-{way}", rows=errors.rows, median=errors.median,
                      nine_in_ten=errors.nine_in_ten, bundled_median=errors.median,
                      held=float(((ratio <= wide) & (ratio >= 1 / wide)).mean()), target=TARGETS["exchanges"])  # fmt: skip


# --- whole layers --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerModel:
    """What a decode layer of a model is made of, in the tables' terms."""

    name: str
    hidden: int
    intermediate: int
    choices: int
    experts: int
    number: str
    dtype: str
    products: tuple[tuple[int, int, str], ...]
    """(width, depth, format) of what is no part of attention's measured layer."""
    heads: tuple[int, int, int] | None
    """(heads, key–value heads, width); None: DeepSeek-V3's latent layer."""
    engines: tuple[str, ...]
    batches: tuple[int, ...]


LAYER_MODELS = (
    LayerModel(name="deepseek-v3", hidden=7168, intermediate=2048, choices=8, experts=256, number="fp8-block", dtype="fp8_block",
               products=((4096, 7168, "fp8-block"), (7168, 2048, "fp8-block"), (256, 7168, "bf16")), heads=None,
               engines=("tensorrt-llm",), batches=(1, 8, 64, 128)),
    LayerModel(name="qwen3-235b-a22b", hidden=4096, intermediate=1536, choices=8, experts=128, number="bf16", dtype="bfloat16",
               products=((9216, 4096, "bf16"), (4096, 8192, "bf16"), (128, 4096, "bf16")), heads=(64, 4, 128),
               engines=("tensorrt-llm", "vllm", "sglang"), batches=(1, 8, 64)),
)  # fmt: skip


def layer_rows(tables: Tables) -> Iterator[dict[str, Any]]:
    """Yield every layer of both models that the tables hold all kernels of."""
    for model in LAYER_MODELS:
        for engine in model.engines:
            parts = _LayerParts(tables, engine, model)
            for ranks in (1, _RANKS):
                for routing in ("balanced", "power_law_1.2"):
                    for batch in model.batches:
                        found = parts.layer(batch, ranks, routing)
                        if found is not None:
                            predicted, measured = found
                            yield {
                                "system": tables.system, "engine": engine, "model": model.name, "ranks": ranks, "routing": routing,
                                "batch": batch, "predicted_us": predicted, "measured_us": measured, "ratio": predicted / measured,
                            }  # fmt: skip


class _LayerParts:
    """Kernels of one engine fitted without a model's shapes, and the measured rows of just these shapes."""

    def __init__(self, tables: Tables, engine: str, model: LayerModel) -> None:
        self.tables, self.engine, self.model = tables, engine, model
        self.units = UNITS[tables.system]
        self.named = {(each.part, each.key): each for each in _problems(tables.system, engine)}
        self.kernels = {key: self._without(*key) for key in self._needed()}
        self.products = tables.read("gemm/gemm_perf", engine)
        self.experts = tables.read("moe/moe_perf", engine)
        self.attention = tables.read(
            "mla/mla_generation_module_perf" if model.heads is None else "attention/generation_attention_perf", engine
        )

    def _needed(self) -> list[tuple[str, str]]:
        model = self.model
        mixer = ("latent_layer", f"decode/{model.number}") if model.heads is None else ("decode_attention", "bf16")
        return [("experts", model.number), mixer, *{("products", number) for _, _, number in model.products}]

    def _without(self, part: str, key: str) -> Any:
        model, named = self.model, self.named[part, key]
        shapes: dict[str, list[tuple[float, ...]]] = {
            "experts": [(model.hidden, model.intermediate, model.choices, model.experts)],
            "products": [(width, depth) for width, depth, _ in model.products],
            "latent_layer": [(128,)], "decode_attention": [model.heads or ()],
        }  # fmt: skip
        chosen = min(named.problems, key=lambda problem: fit(problem)[1].median)
        return fit_without(chosen, shapes[part])

    def layer(self, batch: int, ranks: int, routing: str) -> tuple[float, float] | None:
        """Return (predicted, measured) microseconds; None where a row is missing."""
        pieces = [self._experts(batch * ranks, ranks, routing), self._attention(batch)]
        pieces += [self._product(batch, *product) for product in self.model.products]
        found = [piece for piece in pieces if piece is not None]
        if len(found) < len(pieces):
            return None
        return sum(piece[0] for piece in found), sum(piece[1] for piece in found)

    def _experts(self, tokens: int, ranks: int, routing: str) -> tuple[float, float] | None:
        model, rows, kernel = self.model, self.experts, self.kernels["experts", self.model.number]
        assert rows is not None
        mine = rows.loc[
            (rows["moe_dtype"] == model.dtype) & (rows["hidden_size"] == model.hidden) & (rows["inter_size"] == model.intermediate)
            & (rows["topk"] == model.choices) & (rows["num_experts"] == model.experts) & (rows["moe_tp_size"] == 1)
            & (rows["moe_ep_size"] == ranks) & (rows["num_tokens"] == tokens) & (rows["distribution"] == routing)
            & (rows["kernel_source"] == kernel.name)
        ]  # fmt: skip
        if mine.empty:
            return None
        shape, load = expert_work(mine, model.number)
        return float(experts_s(kernel, shape, load, self.units)[0]) / _US, float(mine["us"].iloc[0])

    def _attention(self, batch: int) -> tuple[float, float] | None:
        model, rows = self.model, self.attention
        assert rows is not None
        if model.heads is None:
            mine = rows.loc[(rows["gemm_type"] == model.dtype) & (rows["kv_cache_dtype"] == "bfloat16") & (rows["num_heads"] == 128)
                            & (rows["batch_size"] == batch) & (rows["step"] == _CONTEXT)]  # fmt: skip
            if mine.empty:
                return None
            num_bytes, flops = latent_layer_work(mine.iloc[:1], model.number, "decode")
            seconds = latent_layer_s(self.kernels["latent_layer", f"decode/{model.number}"], num_bytes, flops)
            return float(seconds[0]) / _US, float(mine["us"].iloc[0])
        heads, kv_heads, width = model.heads
        kernel = self.kernels["decode_attention", "bf16"]
        mine = rows.loc[(rows["kv_cache_dtype"] == "bfloat16") & (rows["num_heads"] == heads) & (rows["num_key_value_heads"] == kv_heads)
                        & (rows["head_dim"] == width) & (rows["window_size"] == 0) & (rows["batch_size"] == batch)
                        & (rows["step"] == _CONTEXT - 1) & (rows["kernel_source"] == kernel.name)]  # fmt: skip
        if mine.empty:
            return None
        num_bytes = batch * kv_heads * 2 * width * _CONTEXT * 2
        return float(decode_s(kernel, num_bytes, batch, kv_heads, _CONTEXT, self.units)) / _US, float(
            mine["us"].iloc[0]
        )

    def _product(self, batch: int, width: int, depth: int, number: str) -> tuple[float, float] | None:
        """Return a product; measured ones of widths between two others lie on a straight line between them."""
        rows = self.products
        assert rows is not None
        dtype = {"bf16": "bfloat16", "fp8-block": "fp8_block"}[number]
        mine = rows.loc[(rows["gemm_dtype"] == dtype) & (rows["m"] == batch) & (rows["k"] == depth)].sort_values("n")
        if mine.empty or not mine["n"].min() <= width <= mine["n"].max():
            return None
        measured = float(np.interp(width, mine["n"].to_numpy(float), mine["us"].to_numpy(float)))
        predicted = product_s(self.kernels["products", number], batch, width, depth, WEIGHT_BYTES[number], self.units)
        return float(predicted) / _US, measured


if __name__ == "__main__":
    sys.exit(main())
