"""Every operation of the tables as a problem to fit: rows, the sizes that the form takes, and where its constants start.

Modelled: one problem for each kernel of an engine and number format; where an engine has several kernels for a format, the one with
most rows. Ignored: what no form covers (windows, 4-bit activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import (
    INSIDE,
    DecodeAttention,
    ExchangeKernel,
    LatentDecode,
    LatentLayer,
    ProductKernel,
    PromptAttention,
    exchange_key,
)
from ...costs.gpu.attention import decode_s, latent_decode_s, latent_layer_s, prompt_s
from ...costs.gpu.exchanges import exchange_s
from ...costs.gpu.products import product_s
from .expert_problems import expert_problems
from .fits import Problem, columns
from .loads import NUMBERS, WEIGHT_BYTES
from .named import Named, seconds_of, within
from .tables import (
    Tables,
    fair_attention,
    fair_latent_layers,
    fair_products,
    replayed,
)

if TYPE_CHECKING:
    import pandas as pd

Index = npt.NDArray[np.int64]
S = TypeVar("S")

CACHE_BYTES = {"bf16": 2, "fp8": 1}
_CACHES = {"bfloat16": "bf16", "fp8": "fp8"}
# DeepSeek-V3's latent attention, of which all tables are: widths of hidden state, compressed query and latent, of a head's parts.
_HIDDEN, _QUERY, _LATENT, _ROPE, _NOPE, _VALUE = 7168, 1536, 512, 64, 128, 128
_ENTRY = _LATENT + _ROPE
_COLLECTIVES = {
    "alltoall": "all-to-all",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
}
_DTYPE_BYTES = {"half": 2, "int8": 1, "bfloat16": 2}
_US, _TB, _TF, _PF = 1e-6, 1e12, 1e12, 1e15


def engine_problems(tables: Tables, engine: str, num_units: int, peak_bytes_per_s: float) -> Iterator[Named]:
    """Yield every problem of an engine's tables; nothing reads device memory faster than its data sheet says."""
    for problems in (expert_problems, product_problems, attention_problems, latent_problems):
        for named in problems(tables, engine, num_units):
            yield within(named, peak_bytes_per_s)
    yield from exchange_problems(tables, engine)


# --- products ------------------------------------------------------------------------------------------------------------


def product_problems(tables: Tables, engine: str, num_units: int) -> Iterator[Named]:
    """Yield a problem for each number format of an engine's products."""
    table = tables.read("gemm/gemm_perf", engine)
    if table is None:
        return
    rows = fair_products(table, engine)
    for dtype in ("bfloat16", "fp8", "fp8_block", "nvfp4"):
        mine = rows.loc[rows["gemm_dtype"] == dtype].sort_values(["m", "n", "k"]).reset_index(drop=True)
        if mine.empty:
            continue
        number = NUMBERS[dtype]
        yield Named(part="products", key=number, rows=len(mine), problems=tuple(
            product_problem(mine, number, num_units, waves=waves) for waves in ((False,) if number == "bf16" else (False, True))
        ))  # fmt: skip


def product_problem(rows: pd.DataFrame, number: str, num_units: int, *, waves: bool) -> Problem[ProductKernel]:
    """Return the problem of one number format; products of 8 and 4 bits quantise their activations first."""
    m, n, k = (rows[name].to_numpy(float) for name in "mnk")
    quantises = number != "bf16"

    def make(values: Any) -> ProductKernel:
        return ProductKernel(
            name="gemm", start_s=values[0], bytes_per_s=values[1], flops_per_s=values[2],
            quantised_values_per_s=values[3] if quantises else None, waves=waves, relative_uncertainty=0.0,
        )  # fmt: skip

    return Problem(
        seconds=seconds_of(rows), shapes=columns(n, k), start=[5 * _US, 3 * _TB, _PF, *([1 * _TF] if quantises else [])],
        make=make, predict=lambda kernel, at: product_s(kernel, m[at], n[at], k[at], WEIGHT_BYTES[number], num_units),
    )  # fmt: skip


# --- attention -----------------------------------------------------------------------------------------------------------


def attention_problems(tables: Tables, engine: str, num_units: int) -> Iterator[Named]:
    """Yield a problem for each cache format of an engine's grouped attention, decoding and over prompts."""
    for table, key, problem in (
        ("attention/generation_attention_perf", "decode_attention", _decode),
        ("attention/context_attention_perf", "prompt_attention", _prompt),
    ):
        found = tables.read(table, engine)
        if found is None:
            continue
        rows = fair_attention(found)
        for dtype, cache in _CACHES.items():
            mine = rows.loc[rows["kv_cache_dtype"] == dtype]
            if "attn_dtype" in mine.columns and (mine["attn_dtype"] == dtype).any():
                mine = mine.loc[mine["attn_dtype"] == dtype]
            if mine.empty:
                continue
            kernel = str(mine["kernel_source"].value_counts().index[0])
            chosen = (
                mine.loc[mine["kernel_source"] == kernel]
                .sort_values(["batch_size", "step", "isl"])
                .reset_index(drop=True)
            )
            yield Named(part=key, key=cache, rows=len(chosen), problems=(problem(chosen, cache, kernel, num_units),))


def _decode(rows: pd.DataFrame, cache: str, name: str, num_units: int) -> Problem[DecodeAttention]:
    requests, kv_heads, head = (rows[key].to_numpy(float) for key in ("batch_size", "num_key_value_heads", "head_dim"))
    context = rows["step"].to_numpy(float) + 1
    num_bytes = requests * kv_heads * 2 * head * context * CACHE_BYTES[cache]
    return Problem(
        seconds=seconds_of(rows), shapes=columns(rows["num_heads"], kv_heads, head), start=[8 * _US, 3 * _TB, 2 * _US, 0.3 * _US],
        make=lambda v: DecodeAttention(name=name, start_s=v[0], bytes_per_s=v[1], wave_s=v[2], doubling_s=v[3], relative_uncertainty=0.0),
        predict=lambda kernel, at: decode_s(kernel, num_bytes[at], requests[at], kv_heads[at], context[at], num_units),
    )  # fmt: skip


def _prompt(rows: pd.DataFrame, cache: str, name: str, num_units: int) -> Problem[PromptAttention]:
    names = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
    requests, tokens, heads, kv_heads, head = (rows[key].to_numpy(float) for key in names)
    flops = 4 * requests * heads * head * tokens * (tokens + 1) / 2
    outer = (
        2 * 2 * heads + 2 * 2 * kv_heads + 2 * kv_heads * CACHE_BYTES[cache]
    )  # queries, outputs; keys, values; what is kept
    num_bytes = requests * tokens * head * outer
    pairs = requests * heads * tokens * (tokens + 1) / 2
    return Problem(
        seconds=seconds_of(rows), shapes=columns(heads, kv_heads, head), start=[15 * _US, 500 * _TF, 3 * _TB, 3 * _US, 30.0],
        make=lambda v: PromptAttention(name=name, start_s=v[0], flops_per_s=v[1], bytes_per_s=v[2], tile_s=v[3], softmax_width=v[4],
                                       relative_uncertainty=0.0),
        predict=lambda kernel, at: prompt_s(
            kernel, flops[at], num_bytes[at], requests[at], heads[at], tokens[at], num_units, pairs=pairs[at]
        ),
    )  # fmt: skip


# --- latent attention ----------------------------------------------------------------------------------------------------


def latent_problems(tables: Tables, engine: str, num_units: int) -> Iterator[Named]:
    """Yield a problem for each format of an engine's latent attention: kernels by cache, whole layers by weights."""
    for table, key, problem in (
        ("mla/generation_mla_perf", "latent_decode", _latent_decode),
        ("mla/context_mla_perf", "latent_prompt", _latent_prompt),
    ):
        found = tables.read(table, engine)
        for dtype, cache in _CACHES.items() if found is not None else ():
            mine = found.loc[found["kv_cache_dtype"] == dtype] if found is not None else None
            if mine is not None and len(mine):
                chosen = mine.sort_values(["batch_size", "step", "isl"]).reset_index(drop=True)
                yield Named(part=key, key=cache, rows=len(chosen), problems=problem(chosen, cache, num_units))
    if not fair_latent_layers(engine, tables.system):
        return
    for table, phase in (("mla/mla_generation_module_perf", "decode"), ("mla/mla_context_module_perf", "prefill")):
        found = tables.read(table, engine)
        if found is None:
            continue
        for dtype in ("bfloat16", "fp8_block"):
            mine = found.loc[(found["gemm_type"] == dtype) & found["model"].str.contains("DeepSeek-V3")]
            if len(mine):
                chosen = mine.sort_values(["batch_size", "step", "isl"]).reset_index(drop=True)
                number = NUMBERS[dtype]
                yield Named(part="latent_layer", key=f"{phase}/{number}", rows=len(chosen),
                            problems=(latent_layer_problem(chosen, number, phase),))  # fmt: skip


def _latent_decode(rows: pd.DataFrame, cache: str, num_units: int) -> tuple[Problem[LatentDecode], ...]:
    """Return the problems of a kernel that divides contexts over units, and of one that does not."""
    requests, heads = rows["batch_size"].to_numpy(float), rows["num_heads"].to_numpy(float)
    context = rows["step"].to_numpy(float) + 1
    num_bytes = requests * context * _ENTRY * CACHE_BYTES[cache]
    flops = 2 * requests * context * (_LATENT + _ENTRY)
    outer = requests * heads * (_LATENT + _ENTRY) * 2

    def predict(kernel: LatentDecode, at: Index) -> Any:
        return latent_decode_s(kernel, num_bytes[at], flops[at], heads[at], outer[at], context[at], requests=requests[at],
                               num_units=num_units)  # fmt: skip

    def make(values: Any) -> LatentDecode:
        return LatentDecode(name="mla", start_s=values[0], bytes_per_s=values[1], flops_per_s=values[2], head_bytes_per_s=values[3],
                            doubling_s=values[4], page_s=values[5] if len(values) > 5 else 0.0, relative_uncertainty=0.0)  # fmt: skip

    start = [12 * _US, 3 * _TB, 800 * _TF, 2 * _TB, 0.7 * _US]
    return tuple(
        Problem(seconds=seconds_of(rows), shapes=columns(heads), start=[*start, *more], make=make, predict=predict)
        for more in ((), (1 * _US,))
    )


def _latent_prompt(rows: pd.DataFrame, cache: str, num_units: int) -> tuple[Problem[PromptAttention], ...]:
    requests, tokens, heads = (rows[key].to_numpy(float) for key in ("batch_size", "isl", "num_heads"))
    flops = 2 * requests * heads * (_NOPE + _ROPE + _VALUE) * tokens * (tokens + 1) / 2
    num_bytes = requests * tokens * heads * (_NOPE + _ROPE + _VALUE) * 2
    problem: Problem[PromptAttention] = Problem(
        seconds=seconds_of(rows), shapes=columns(heads), start=[15 * _US, 500 * _TF, 3 * _TB, 3 * _US],
        make=lambda v: PromptAttention(name="mla", start_s=v[0], flops_per_s=v[1], bytes_per_s=v[2], tile_s=v[3], relative_uncertainty=0.0),
        predict=lambda kernel, at: prompt_s(
            kernel, flops[at], num_bytes[at], requests[at], heads[at], tokens[at], num_units, full_waves=True
        ),
    )  # fmt: skip
    return (problem,)


def latent_layer_problem(rows: pd.DataFrame, number: str, phase: str) -> Problem[LatentLayer]:
    """Return the problem of whole layers with weights of one format, whatever the cache's."""
    num_bytes, flops = latent_layer_work(rows, number, phase)
    return Problem(
        seconds=seconds_of(rows), shapes=columns(rows["num_heads"]), start=[40 * _US, 3 * _TB, 800 * _TF],
        make=lambda v: LatentLayer(name="mla module", start_s=v[0], bytes_per_s=v[1], flops_per_s=v[2], relative_uncertainty=0.0),
        predict=lambda kernel, at: latent_layer_s(kernel, num_bytes[at], flops[at]),
    )  # fmt: skip


def latent_layer_work(rows: pd.DataFrame, number: str, phase: str) -> tuple[Any, Any]:
    """Return (bytes, operations) of whole layers."""
    requests, heads = rows["batch_size"].to_numpy(float), rows["num_heads"].to_numpy(float)
    cache = rows["kv_cache_dtype"].map(lambda name: CACHE_BYTES[_CACHES[name]]).to_numpy(float)
    new = np.ones_like(requests) if phase == "decode" else rows["isl"].to_numpy(float)
    context = rows["step"].to_numpy(float) + new
    parameters = (
        _HIDDEN * _QUERY
        + _QUERY * heads * (_NOPE + _ROPE)
        + _HIDDEN * _ENTRY
        + _LATENT * heads * (_NOPE + _VALUE)
        + heads * _VALUE * _HIDDEN
    )
    pairs = requests * context if phase == "decode" else requests * new * (new + 1) / 2
    latent = 2 * heads * (_LATENT + _ENTRY) * pairs
    expanded = (
        2 * heads * (_NOPE + _ROPE + _VALUE) * pairs + 2 * _LATENT * heads * (_NOPE + _VALUE) * requests * context
    )
    flops = 2 * parameters * requests * new + np.minimum(latent, expanded)
    outer = requests * new * (2 * _HIDDEN + 2 * heads * (_NOPE + _ROPE + _VALUE)) * 2
    return parameters * WEIGHT_BYTES[number] + requests * context * _ENTRY * cache + outer, flops


# --- exchanges -----------------------------------------------------------------------------------------------------------


def exchange_problems(tables: Tables, engine: str) -> Iterator[Named]:
    """Yield a problem for each collective of NCCL and each number of GPUs, and for the engine's own reduction."""
    found = tables.read("comm/nccl_perf", "nccl")
    if found is not None:
        for name, operation in _COLLECTIVES.items():
            mine = found.loc[(found["op_name"] == name) & (found["nccl_dtype"] == "half")]
            yield from _by_ranks(mine, operation, "nccl_dtype", 2 if operation == "all-reduce" else 1)
    own = tables.read("comm/custom_allreduce_perf", engine)
    if own is not None:
        yield from _by_ranks(replayed(own), "engine-all-reduce", "allreduce_dtype", 2)


def _by_ranks(rows: pd.DataFrame, operation: str, dtype: str, times: int) -> Iterator[Named]:
    for ranks in sorted(int(number) for number in rows["num_gpus"].unique()):
        mine = rows.loc[rows["num_gpus"] == ranks].sort_values("message_size").reset_index(drop=True)
        size = mine["message_size"].to_numpy(float) * mine[dtype].map(_DTYPE_BYTES).to_numpy(float)
        yield Named(part="exchanges", key=exchange_key(operation, INSIDE, ranks), rows=len(mine),
                    problems=(exchange_problem(mine, operation, size * times * (ranks - 1) / ranks),))  # fmt: skip


def exchange_problem(rows: pd.DataFrame, name: str, port: Any) -> Problem[ExchangeKernel]:
    """Return the problem of one exchange whose busiest port moves `port` bytes; sizes are left out in turn."""
    predict: Callable[[ExchangeKernel, Index], Any] = lambda kernel, at: exchange_s(kernel, port[at])  # noqa: E731
    return Problem(
        seconds=seconds_of(rows), shapes=columns(port), start=[10 * _US, 0.3 * _TB, 1e6], predict=predict,
        make=lambda v: ExchangeKernel(name=name, start_s=v[0], bytes_per_s=v[1], half_bytes=v[2], relative_uncertainty=0.0),
    )  # fmt: skip
