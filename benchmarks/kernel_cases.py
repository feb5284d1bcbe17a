"""The cases of the kernel benchmark: shapes of real models, rows as prompts and decoding give them, and what is right for each.

Weights are random numbers in the formats themselves (any words and codes are valid packed weights). Cases that are bound by the
bytes of weights take turns over enough slots that no cache can help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeplan.kernels import reference
from moeplan.kernels.activation import Activation, activation
from moeplan.kernels.dequant_gemm import SplitWorkspace, dequant_down, dequant_gate_up
from moeplan.kernels.error_bounds import Arithmetic, expert_bound
from moeplan.kernels.expert_weights import DenseMatrix, to_float8
from moeplan.kernels.grouped_gemm import grouped_down, grouped_gate_up
from moeplan.kernels.packing import PackedMatrix
from moeplan.kernels.roofline import Work, gemm_work
from moeplan.kernels.row_groups import RowGroups, groups_from_counts
from moeplan.kernels.slot_layout import packed_format
from moeplan.kernels.tuning import Config, DequantConfig, GroupedConfig, TuningKey


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The experts of one layer of a model."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


MIXTRAL = Shape(name="mixtral-8x7b", hidden=4096, intermediate=14336, num_experts=8, top_k=2)
QWEN3 = Shape(name="qwen3-30b-a3b", hidden=2048, intermediate=768, num_experts=128, top_k=8)
TINY = Shape(name="tiny", hidden=64, intermediate=64, num_experts=4, top_k=2)


@dataclass(frozen=True, kw_only=True)
class CaseSpec:
    """What a case is, before any memory is taken for it."""

    shape: Shape
    kernel: str
    weights: str
    regime: str
    """compute, memory or mixed: which ceiling is meant to bind, and so which target applies."""
    rows_of_expert: tuple[int, ...]
    num_variants: int = 1
    """Sets of slots that repetitions rotate over."""
    note: str = ""

    @property
    def is_down(self) -> bool:
        """Whether it is the second matrix."""
        return self.kernel.endswith("down")

    @property
    def num_outputs(self) -> int:
        """Columns of the result."""
        return self.shape.hidden if self.is_down else self.shape.intermediate

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix."""
        return self.shape.intermediate if self.is_down else self.shape.hidden

    @property
    def halves(self) -> int:
        """Rows of the matrix for each output."""
        return 1 if self.is_down else 2

    @property
    def key(self) -> TuningKey:
        """What a configuration is chosen for."""
        return TuningKey(
            kernel=self.kernel, weights=self.weights, num_outputs=self.num_outputs, num_inputs=self.num_inputs
        )

    @property
    def work(self) -> Work:
        """Operations and fewest bytes."""
        return gemm_work(
            self.rows_of_expert, self.num_outputs, self.num_inputs, halves=self.halves, weights=self.weights
        )

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        rows, active = sum(self.rows_of_expert), sum(1 for count in self.rows_of_expert if count)
        note = f", {self.note}" if self.note else ""
        return f"{self.shape.name} {self.kernel} {self.weights}-bit, {rows} rows of {active} experts{note}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case with its memory: run it, and compare what comes out."""

    spec: CaseSpec
    groups: RowGroups
    run: Callable[[Config, int], torch.Tensor]
    """Run with a configuration on one variant."""
    expected: torch.Tensor
    """float64, for variant 0."""
    bound: Callable[[Config], torch.Tensor]
    """Largest allowed error of every element, for variant 0."""


def balanced(shape: Shape, num_rows: int) -> tuple[int, ...]:
    """Return equal rows for every expert."""
    return tuple(num_rows // shape.num_experts for _ in range(shape.num_experts))


def routed(shape: Shape, num_tokens: int, seed: int) -> tuple[int, ...]:
    """Return rows of each expert when `num_tokens` tokens each choose top_k different experts at random."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(shape.num_experts, dtype=torch.int64)
    for _ in range(num_tokens):
        counts[torch.randperm(shape.num_experts, generator=generator)[: shape.top_k]] += 1
    return tuple(counts.tolist())


def skewed(shape: Shape, num_rows: int) -> tuple[int, ...]:
    """Return rows that fall off as 1/rank, the first experts the busiest."""
    shares = torch.tensor([1 / (rank + 1) for rank in range(shape.num_experts)])
    counts = (shares / shares.sum() * num_rows).long()
    counts[0] += num_rows - int(counts.sum())
    return tuple(counts.tolist())


def alone(num_rows: int) -> tuple[int, ...]:
    """Return the rows of a single expert."""
    return (num_rows,)


def prepare(spec: CaseSpec, device: torch.device) -> Case:
    """Return the case with weights, rows, and what is right for them."""
    function = None if spec.is_down else activation("swiglu")
    num_experts = len(spec.rows_of_expert)
    num_slots = num_experts * spec.num_variants
    groups = groups_from_counts(spec.rows_of_expert, device)
    generator = torch.Generator(device=device).manual_seed(num_slots)
    x = torch.randn(groups.num_rows, spec.num_inputs, generator=generator, device=device).to(torch.bfloat16)
    tables = [
        torch.arange(variant * num_experts, (variant + 1) * num_experts, dtype=torch.int32, device=device)
        for variant in range(spec.num_variants)
    ]
    if spec.kernel.startswith("grouped"):
        return _grouped(spec, function, groups, x, tables, num_slots, generator)
    return _dequant(spec, function, groups, x, tables, num_slots, generator)


def _grouped(
    spec: CaseSpec,
    function: Activation | None,
    groups: RowGroups,
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    num_slots: int,
    generator: torch.Generator,
) -> Case:
    values = torch.empty(
        num_slots, spec.halves * spec.num_outputs, spec.num_inputs, dtype=torch.bfloat16, device=x.device
    )
    for slot in range(num_slots):
        fresh = torch.randn(values.shape[1:], generator=generator, device=x.device)
        values[slot] = fresh / spec.num_inputs**0.5
    matrix, scale = DenseMatrix(values=values), None
    if spec.weights == "8":
        narrow, row_scale = to_float8(values)
        matrix = DenseMatrix(values=narrow, row_scale=row_scale)
        x, scale = to_float8(x)

    def run(config: Config, variant: int) -> torch.Tensor:
        assert isinstance(config, GroupedConfig)
        if function is None:
            return grouped_down(x, matrix, groups, slot_of_expert=tables[variant], x_scale=scale, config=config)
        return grouped_gate_up(
            x, matrix, groups, function, slot_of_expert=tables[variant], x_scale=scale, config=config
        )

    return _with_reference(spec, function, groups, x, scale, matrix, tables[0], run)


def _dequant(
    spec: CaseSpec,
    function: Activation | None,
    groups: RowGroups,
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    num_slots: int,
    generator: torch.Generator,
) -> Case:
    fmt = packed_format(int(spec.weights))
    rows, columns, device = spec.halves * spec.num_outputs, spec.num_inputs, x.device
    words = torch.randint(
        -(2**31),
        2**31,
        (num_slots, rows, fmt.num_words(columns)),
        generator=generator,
        device=device,
        dtype=torch.int64,
    ).to(torch.int32)
    shape = (num_slots, columns // fmt.group, rows)
    scales = torch.randint(160, 256, shape, generator=generator, device=device)
    zeros = torch.randint(96, 160, shape, generator=generator, device=device)  # about the middle of the range
    codes = (scales + (zeros << 8)).to(torch.int32)
    codes = torch.where(codes >= 2**15, codes - 2**16, codes).to(torch.int16)
    row_scale = torch.full((num_slots, rows), 1 / (2**fmt.bits * columns**0.5), device=device)
    matrix = PackedMatrix(words=words, codes=codes, row_scale=row_scale, bits=fmt.bits, num_columns=columns)
    workspace = SplitWorkspace(device)

    def run(config: Config, variant: int) -> torch.Tensor:
        assert isinstance(config, DequantConfig)
        if function is None:
            return dequant_down(x, matrix, groups, slot_of_expert=tables[variant], config=config, workspace=workspace)
        return dequant_gate_up(
            x, matrix, groups, function, slot_of_expert=tables[variant], config=config, workspace=workspace
        )

    return _with_reference(spec, function, groups, x, None, matrix, tables[0], run)


def _with_reference(
    spec: CaseSpec,
    function: Activation | None,
    groups: RowGroups,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    matrix: DenseMatrix | PackedMatrix,
    table: torch.Tensor,
    run: Callable[[Config, int], torch.Tensor],
) -> Case:
    offsets = groups.offsets.cpu()
    slots = table.cpu()
    more = {"slot_of_expert": slots, "x_scale": scale}
    arithmetic = Arithmetic(out_dtype=torch.bfloat16, float8=scale is not None, cuts_bfloat16=x.device.type != "cuda")
    known: dict[bool | None, torch.Tensor] = {}

    def bound(config: Config) -> torch.Tensor:
        first = config.scale_first if isinstance(config, DequantConfig) else None
        if first not in known:
            how = dataclasses.replace(arithmetic, scale_first=first)
            known[first] = expert_bound(x, matrix, offsets, function, how, **more)
        return known[first]

    expected = reference.expert_matmul(x, matrix, offsets, function, **more)
    return Case(spec=spec, groups=groups, run=run, expected=expected, bound=bound)


def all_specs(*, dry: bool) -> list[CaseSpec]:
    """Return every case, those that targets speak of first."""
    if dry:
        return _tiny_specs()
    found: list[CaseSpec] = []

    def add(
        shape: Shape, kind: str, weights: str, regime: str, rows: tuple[int, ...], *, variants: int = 1, note: str = ""
    ) -> None:
        for matrix in ("gate_up", "down"):
            found.append(
                CaseSpec(
                    shape=shape,
                    kernel=f"{kind}_{matrix}",
                    weights=weights,
                    regime=regime,
                    rows_of_expert=rows,
                    num_variants=variants,
                    note=note,
                )
            )

    add(MIXTRAL, "grouped", "16", "compute", balanced(MIXTRAL, 4096))
    add(QWEN3, "grouped", "16", "compute", balanced(QWEN3, 65536))
    add(MIXTRAL, "grouped", "16", "memory", routed(MIXTRAL, 16, 1))
    add(QWEN3, "grouped", "16", "memory", routed(QWEN3, 16, 1))
    for rows in (1, 4, 16):
        add(MIXTRAL, "dequant", "4", "memory", alone(rows), variants=8)
    add(MIXTRAL, "dequant", "4", "memory", routed(MIXTRAL, 1, 1), variants=2, note="one token")
    add(QWEN3, "dequant", "4", "memory", routed(QWEN3, 16, 1))
    add(MIXTRAL, "grouped", "16", "compute", balanced(MIXTRAL, 16384))
    add(QWEN3, "grouped", "16", "mixed", balanced(QWEN3, 4096))
    add(MIXTRAL, "grouped", "16", "mixed", skewed(MIXTRAL, 4096), note="skewed")
    add(MIXTRAL, "grouped", "16", "memory", routed(MIXTRAL, 1, 1), note="one token")
    add(MIXTRAL, "grouped", "8", "mixed", balanced(MIXTRAL, 4096))
    add(MIXTRAL, "dequant", "4", "mixed", balanced(MIXTRAL, 4096))
    for weights in ("3", "2"):
        add(MIXTRAL, "dequant", weights, "mixed", alone(1), variants=8)
    return found


def _tiny_specs() -> list[CaseSpec]:
    found = []
    for kind, weights, regime, rows in (
        ("grouped", "16", "compute", (20, 0, 12, 1)),
        ("grouped", "16", "memory", (1, 0, 2, 0)),
        ("grouped", "8", "mixed", (3, 0, 2, 0)),
        ("dequant", "4", "memory", (2,)),
        ("dequant", "3", "mixed", (2,)),
        ("dequant", "2", "mixed", (2,)),
        ("dequant", "4", "mixed", (33, 0)),
    ):
        for matrix in ("gate_up", "down"):
            found.append(
                CaseSpec(
                    shape=TINY,
                    kernel=f"{kind}_{matrix}",
                    weights=weights,
                    regime=regime,
                    rows_of_expert=rows,
                    num_variants=2,
                )
            )
    return found


@triton.jit
def _count(out_ptr: tl.tensor, n_ptr: tl.tensor) -> None:
    """A loop whose bound is known only when it runs: what every kernel here has."""
    for i in range(tl.load(n_ptr)):
        tl.store(out_ptr + i, 1)


def interpreter_trouble() -> str | None:
    """Return None where Triton's interpreter works with this numpy, else what it says."""
    try:
        _count[(1,)](torch.zeros(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    except Exception as error:  # noqa: BLE001 - whatever it says is what is reported
        return " ".join(str(error).split())
    return None
