"""Experts of the tables as problems to fit.

Modelled: for each number format the kernel with most rows; how it chooses tiles, which rows its activations touch, and whether experts,
choices of all tokens or experts elsewhere cost something of their own, as alternatives. Ignored: kernels without gates.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import REFILLED, ExpertKernel
from ...costs.gpu.experts import ExpertLoad, ExpertShape, experts_s
from .fits import Problem, columns
from .loads import NUMBERS, expert_work
from .named import Named, seconds_of
from .tables import Tables, counts_others, fair_experts

if TYPE_CHECKING:
    import pandas as pd

Index = npt.NDArray[np.int64]
S = TypeVar("S")

_US, _NS, _TB, _PF = 1e-6, 1e-9, 1e12, 1e15
_BLOCKS_ON_HOPPER = "moe_torch_flow_cutlass"
"""As the tables call TensorRT-LLM's experts of 8-bit blocks on Hopper (DeepGEMM behind the CUTLASS runner)."""
_TRITON = re.compile("triton|vllm_fused_moe")
_OPENAI = "oaitriton"
"""In names of the Triton kernels that were published with gpt-oss."""


def expert_problems(tables: Tables, engine: str, num_units: int, *, least_experts: int = 1) -> Iterator[Named]:
    """Yield a problem for each number format of an engine's experts; least_experts: of the models whose rows are taken."""
    table = tables.read("moe/moe_perf", engine)
    if table is None:
        return
    version = tables.versions.get(engine, "")
    rows = fair_experts(table, engine, version)
    rows = rows.loc[rows["num_experts"] >= least_experts]
    for dtype, number in NUMBERS.items():
        mine = rows.loc[rows["moe_dtype"] == dtype]
        if mine.empty:
            continue
        kernel = str(mine["kernel_source"].value_counts().index[0])
        chosen = (
            mine.loc[mine["kernel_source"] == kernel].sort_values(["num_tokens", "num_experts"]).reset_index(drop=True)
        )
        work = expert_work(chosen, number, others=counts_others(engine, version))
        yield Named(part="experts", key=number, rows=len(chosen), problems=tuple(
            expert_problem(chosen, work, kernel, num_units, Form(all_rows=all_rows, each=each, heights=heights, choices=choices))
            for choices in (False, True) for heights in _heights(kernel, number) for all_rows in (False, True) for each in (False, True)
        ))  # fmt: skip


def _heights(kernel: str, number: str) -> tuple[str, ...]:
    """Return how a kernel may choose its tiles; the tables' names tell some kernels from others."""
    if number == "fp8-block" and kernel == _BLOCKS_ON_HOPPER:
        return ("transposed",)
    if _OPENAI in kernel:
        return "best", "powers"
    if number in ("int4", "mxfp4") and "triton" not in kernel:
        return "best", "choices"
    return ("best", "tokens") if _TRITON.search(kernel) else ("best",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which terms an expert kernel's form has, and how it chooses tiles."""

    all_rows: bool = False
    each: bool = False
    """Experts cost something of their own, with rows or without."""
    choices: bool = False
    """Choices of all tokens cost something of their own, and so does leaving out those of experts elsewhere."""
    heights: str = "best"

    def starts(self) -> dict[str, float]:
        """Return the constants that are fitted, each where it starts."""
        found = {
            "start_s": 20 * _US,
            "bytes_per_s": 3 * _TB,
            "activation_bytes_per_s": 3 * _TB,
            "flops_per_s": _PF,
            "tile_s": 1 * _US,
        }
        if self.each:
            found["expert_s"] = 0.1 * _US
        if self.choices:
            found |= {"choice_s": 0.2 * _NS, "elsewhere_s": 5 * _US}
        if self.heights in REFILLED:
            found["refill_bytes_per_s"] = 20 * _TB
        return found


def expert_problem(
    rows: pd.DataFrame, work: tuple[ExpertShape, ExpertLoad], kernel: str, num_units: int, form: Form
) -> Problem[ExpertKernel]:
    """Return the problem of one kernel; work: shape and load of every row."""
    shape, load = work
    starts = form.starts()

    def make(values: Any) -> ExpertKernel:
        constants = dict(zip(starts, values, strict=True))
        return ExpertKernel(
            name=kernel, all_rows=form.all_rows, heights=form.heights, relative_uncertainty=0.0, **constants
        )

    return Problem(
        seconds=seconds_of(rows), shapes=columns(rows["hidden_size"], rows["inter_size"], rows["topk"], rows["num_experts"]),
        start=list(starts.values()), make=make,
        predict=lambda kernel, at: experts_s(kernel, part(shape, at), part(load, at), num_units),
    )  # fmt: skip


def part(whole: S, at: Index) -> S:
    """Return a dataclass of arrays with chosen entries only."""

    def chosen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(chosen(each) for each in value)
        return value[at] if isinstance(value, np.ndarray) else value

    names = [each.name for each in dataclasses.fields(whole)]  # type: ignore[arg-type]
    return dataclasses.replace(whole, **{name: chosen(getattr(whole, name)) for name in names})  # type: ignore[type-var]
