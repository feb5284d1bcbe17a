"""The CPU path against float64: every format, both ways of running, from slots of an arena, within derived bounds."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from long_runs import examples  # noqa: E402
from moeplan.base.errors import InputError  # noqa: E402
from moeplan.kernels import cpu, cpu_packed, reference  # noqa: E402
from moeplan.kernels.activation import ACTIVATIONS, activation  # noqa: E402
from moeplan.kernels.error_bounds import Arithmetic, expert_bound, worst_ratio  # noqa: E402
from moeplan.kernels.expert_weights import ExpertWeights, dense_values, slot_views, write_slot  # noqa: E402
from moeplan.kernels.packing import pack, unpack  # noqa: E402
from moeplan.kernels.slot_layout import WEIGHT_NAMES, ExpertShape, slot_layout  # noqa: E402


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(
    weights: str, function: str, *, bias: bool, seed: int, num_slots: int = 5, hidden: int = 128, inter: int = 192
) -> ExpertWeights:
    """An arena of random experts, four of them in slots out of order."""
    shape = ExpertShape(hidden_size=hidden, intermediate_size=inter, gated=activation(function).gated, bias=bias)
    layout = slot_layout(shape, weights)
    arena = torch.zeros(num_slots * layout.slot_bytes, dtype=torch.uint8)
    views = slot_views(arena, layout, activation(function), torch.tensor([3, 0, 2, 4], dtype=torch.int32))
    for slot in range(num_slots):
        rows = shape.matrices["gate_up"][0]
        biases = (
            {"gate_up_bias": normal(seed + slot + 50, rows), "down_bias": normal(seed + slot + 60, hidden)}
            if bias
            else {}
        )
        write_slot(
            views,
            slot,
            normal(seed + slot, rows, hidden) / hidden**0.5,
            normal(seed + slot + 9, hidden, inter) / inter**0.5,
            **biases,
        )
    return views


def assert_right(result, rows, weights, offsets):
    """Both matrices, each within the bound of its own arithmetic; the error of the first goes through the second's |w|."""
    starts = torch.tensor(offsets)
    plain = (
        rows.dtype
        if weights.gate_up.__class__.__name__ == "PackedMatrix" or weights.gate_up.values.dtype != rows.dtype
        else None
    )
    arithmetic = Arithmetic(out_dtype=rows.dtype, weight_dtype=plain)
    more = {"slot_of_expert": weights.slot_of_expert}
    h = reference.expert_matmul(rows, weights.gate_up, starts, weights.activation, **more)
    # The product is rounded once before the activation and once after it.
    rounded = expert_bound(rows, weights.gate_up, starts, None, arithmetic, **more)
    first = expert_bound(rows, weights.gate_up, starts, weights.activation, arithmetic, **more)
    halves = weights.activation.halves
    product = reference.expert_matmul(rows, weights.gate_up, starts, None, **more)
    gate, up = (product, product) if halves == 1 else product.chunk(2, dim=-1)
    more_first = 1.13 * rounded.amax(-1, keepdim=True) * (1 + gate.abs() + up.abs())
    expected = reference.expert_matmul(h, weights.down, starts, **more)
    bound = expert_bound(h, weights.down, starts, None, arithmetic, **more)
    carried = torch.zeros_like(bound)
    for expert in range(len(offsets) - 1):
        span = slice(offsets[expert], offsets[expert + 1])
        values, _ = reference.matrix_of_expert(weights.down, expert, weights.slot_of_expert)
        carried[span] = (first + more_first)[span] @ values.abs().T
    assert worst_ratio(result, expected, bound + carried) <= 1
    # The bound is the worst case; the error really seen is far smaller, and no worse than the type's rounding a few times.
    error = ((result.double() - expected).norm() / expected.norm()).item()
    assert error < (2.0**-20 if rows.dtype == torch.float32 else 2.0**-7)


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(weights, dtype):
    views = experts(weights, "swiglu", bias=True, seed=1)
    offsets = [0, 3, 3, 8, 9]
    rows = normal(0, 9, 128).to(dtype)
    assert_right(cpu.run_rows(rows, views, offsets), rows, views, offsets)
    assert_right(cpu.run_rows_batched(rows, views, offsets), rows, views, offsets)


@settings(max_examples=examples(12), deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    function=st.sampled_from(sorted(ACTIVATIONS)),
    weights=st.sampled_from(WEIGHT_NAMES),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
def test_ragged_groups(counts, function, weights, bias, dtype, seed):
    views = experts(weights, function, bias=bias, seed=seed)
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    rows = normal(seed, offsets[-1], 128).to(dtype)
    if offsets[-1]:
        assert_right(cpu.run_rows(rows, views, offsets), rows, views, offsets)
        assert_right(cpu.run_rows_batched(rows, views, offsets), rows, views, offsets)
    else:
        assert cpu.run_rows(rows, views, offsets).shape == cpu.run_rows_batched(rows, views, offsets).shape == (0, 128)


@pytest.mark.parametrize("weights", ["8", "4", "3", "2"])
@pytest.mark.parametrize(("hidden", "inter"), [(64, 128), (320, 448), (576, 640), (768, 1408)])
def test_expanding_is_unpacking(weights, hidden, inter):
    """Blocks, tails and padded last blocks, in float32 to the last bit but one (zero is taken off before or after scaling)."""
    views = experts(weights, "swiglu", bias=False, seed=3, num_slots=5, hidden=hidden, inter=inter)
    for matrix in (views.gate_up, views.down):
        out = torch.full((matrix.num_rows, matrix.num_columns), float("nan"))
        expected = dense_values(matrix, 2, torch.float32)
        assert torch.allclose(cpu.expand(matrix, 2, out, cpu.Scratch()), expected, rtol=2**-22, atol=0)


def test_an_expert_alone_is_the_expert_in_its_group():
    views = experts("4", "swiglu", bias=True, seed=5)
    rows = normal(1, 6, 128)
    together = cpu.run_rows(rows, views, [0, 2, 2, 2, 6])
    assert torch.allclose(cpu.run_expert(rows[:2], views, 3), together[:2], rtol=1e-5, atol=1e-6)
    assert torch.allclose(cpu.run_expert(rows[2:], views, 4), together[2:], rtol=1e-5, atol=1e-6)


def test_experts_may_come_one_by_one_in_any_order():
    views = experts("16", "swiglu", bias=False, seed=6)
    rows, offsets = normal(2, 7, 128), [0, 2, 3, 3, 7]
    whole = cpu.run_rows(rows, views, offsets)
    out = torch.full_like(whole, float("nan"))
    cpu.run_rows(rows, views, offsets, order=[3], out=out)
    assert torch.isnan(out[:3]).all() and torch.equal(out[3:], whole[3:])
    cpu.run_rows(rows, views, offsets, order=[1, 2, 0], out=out)
    assert torch.equal(out, whole)


def test_scratch_is_reused():
    scratch = cpu.Scratch()
    first = scratch.take("matrix", (4, 8), torch.float32)
    assert scratch.take("matrix", (3, 5), torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take("matrix", (9, 9), torch.float32).data_ptr() != first.data_ptr()
    assert scratch.take("other", (2,), torch.float32).data_ptr() != first.data_ptr()


def test_no_thread_is_made_or_taken():
    before = torch.get_num_threads()
    cpu.run_rows(normal(0, 2, 128), experts("4", "swiglu", bias=False, seed=0), [0, 1, 1, 1, 2])
    assert torch.get_num_threads() == before


def test_refusals_name_the_argument():
    views = experts("16", "swiglu", bias=False, seed=0)
    rows = normal(0, 4, 128)
    for call, field in (
        (lambda: cpu.run_rows(rows.half(), views, [0, 4, 4, 4, 4]), "rows"),
        (lambda: cpu.run_rows(rows[:, :64], views, [0, 4, 4, 4, 4]), "rows"),
        (lambda: cpu.run_rows(rows, views, [0, 3]), "offsets"),
        (lambda: cpu.run_rows_batched(rows, views, [0, 5, 4]), "offsets"),
        (lambda: cpu.run_expert(rows, views, 5), "slot"),
        (lambda: cpu.run_expert(rows, views, 0, out=torch.zeros(4, 64)), "out"),
        (lambda: cpu.run_rows(rows.to("meta"), views, [0, 4, 4, 4, 4]), "rows"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert refusal.value.field == field


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (33, 192), (7, 448), (16, 1024)])
def test_compiled_loops_are_unpacking(bits, rows, columns):
    matrix = pack(torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(columns)), bits)
    exact = unpack(matrix)[1]
    single = torch.empty(columns)
    assert torch.equal(cpu_packed.decode(matrix, 1, torch.empty(rows, columns), single), exact)
    halves = cpu_packed.decode(matrix, 1, torch.empty(rows, columns, dtype=torch.bfloat16), single)
    assert torch.equal(halves, exact.to(torch.bfloat16))
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(rows))
    found = cpu_packed.product(x, matrix, 1, torch.empty(2, rows))
    assert torch.allclose(found, x @ exact.T, atol=1e-4, rtol=1e-5)


def test_without_compiled_loops_torch_expands(monkeypatch):
    matrix = pack(torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(1)), 3)
    fast = cpu.expand(matrix, 0, torch.empty(16, 192), cpu.Scratch())
    monkeypatch.setattr(cpu_packed, "usable", lambda: False)
    slow = cpu.expand(matrix, 0, torch.empty(16, 192), cpu.Scratch())
    assert torch.allclose(fast, slow, atol=1e-6)
