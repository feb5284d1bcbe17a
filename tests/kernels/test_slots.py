"""Slots of an arena: layouts byte by byte, views that are views, weights in and out, and what is refused."""

from __future__ import annotations

import pytest

from moeplan.base.errors import InputError, UnknownName
from moeplan.kernels.activation import activation
from moeplan.kernels.slot_layout import WEIGHT_NAMES, ExpertShape, slot_layout
from moeplan.specs.models import weight_format

SHAPE = ExpertShape(hidden_size=128, intermediate_size=192)


def test_a_whole_layout():
    layout = slot_layout(ExpertShape(hidden_size=128, intermediate_size=192, bias=True), "4")
    assert [(part.name, part.dtype, part.shape, part.offset_bytes, part.num_bytes) for part in layout.parts] == [
        ("gate_up.words", "int32", (384, 16), 0, 24576),
        ("gate_up.codes", "int16", (2, 384), 24576, 1536),
        ("gate_up.row_scale", "float32", (384,), 26112, 1536),
        ("gate_up.bias", "bfloat16", (384,), 27648, 768),
        ("down.words", "int32", (128, 32), 28416, 16384),
        ("down.codes", "int16", (3, 128), 44800, 768),
        ("down.row_scale", "float32", (128,), 45568, 512),
        ("down.bias", "bfloat16", (128,), 46080, 256),
    ]
    assert (layout.payload_bytes, layout.slot_bytes) == (46336, 46336)


def test_parts_start_at_multiples_of_256_bytes():
    layout = slot_layout(ExpertShape(hidden_size=48, intermediate_size=36, gated=False), "16")
    assert [(part.offset_bytes, part.num_bytes) for part in layout.parts] == [(0, 36 * 48 * 2), (3584, 48 * 36 * 2)]
    assert (layout.payload_bytes, layout.slot_bytes) == (2 * 36 * 48 * 2, 7168)


@pytest.mark.parametrize("weights", WEIGHT_NAMES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(4096, 14336), (2048, 768), (2048, 1408), (7168, 2048)])
def test_payload_against_the_planners_bytes(weights, hidden, intermediate):
    """Plain formats agree to the byte; packed ones with the padding of rows and the metadata, by a few percent."""
    planned = weight_format(weights).num_bytes(3 * hidden * intermediate)
    payload = slot_layout(ExpertShape(hidden_size=hidden, intermediate_size=intermediate), weights).payload_bytes
    if weights in ("32", "16"):
        assert payload == planned
    else:
        # Worst of these shapes: 3 bits at 768 columns (80 words of ten values for 768, 2.7 %), 2 bits at 1408 (1536 stored, 5 %).
        assert abs(payload / planned - 1) < (0.055 if weights == "2" else 0.03)


def test_layouts_refuse_nonsense():
    for call, error, field in (
        (lambda: slot_layout(SHAPE, "5"), UnknownName, "weights"),
        (lambda: slot_layout(SHAPE, "16", dtype="float64"), UnknownName, "dtype"),
        (lambda: slot_layout(ExpertShape(hidden_size=0, intermediate_size=8), "16"), InputError, "hidden_size"),
        (lambda: slot_layout(ExpertShape(hidden_size=100, intermediate_size=64), "4"), InputError, "num_columns"),
        (lambda: activation("tanh"), UnknownName, "activation"),
    ):
        with pytest.raises(error) as refusal:
            call()
        assert refusal.value.field == field


class TestViews:
    torch = pytest.importorskip("torch")

    def arena(self, layout, num_slots=3):
        return self.torch.zeros(num_slots * layout.slot_bytes, dtype=self.torch.uint8)

    @pytest.mark.parametrize("weights", WEIGHT_NAMES)
    def test_writing_touches_one_slot_only(self, weights):
        from moeplan.kernels.expert_weights import dense_values, slot_views, write_slot

        torch = self.torch
        layout = slot_layout(SHAPE, weights)
        arena = self.arena(layout)
        views = slot_views(arena, layout, activation("swiglu"))
        gate_up, down = (
            torch.randn(*size, generator=torch.Generator().manual_seed(7)) for size in ((384, 128), (128, 192))
        )
        write_slot(views, 1, gate_up, down)
        assert not arena[: layout.slot_bytes].any() and not arena[2 * layout.slot_bytes :].any()
        rough = {"32": 0.0, "16": 2.0**-8, "8": 0.04, "4": 0.12, "3": 0.25, "2": 0.45}[weights]
        for matrix, values in ((views.gate_up, gate_up), (views.down, down)):
            error = (dense_values(matrix, 1, torch.float32) - values).norm() / values.norm()
            assert error.item() <= rough
        # The bytes are the expert: a copied slot is a copied expert.
        arena[2 * layout.slot_bytes :] = arena[layout.slot_bytes : 2 * layout.slot_bytes]
        assert torch.equal(dense_values(views.down, 2, torch.float32), dense_values(views.down, 1, torch.float32))

    def test_biases_are_written_exactly_when_there_are_any(self):
        from moeplan.kernels.expert_weights import slot_views, write_slot

        torch = self.torch
        layout = slot_layout(ExpertShape(hidden_size=128, intermediate_size=192, bias=True), "16")
        views = slot_views(self.arena(layout), layout, activation("swiglu"))
        gate_up, down = torch.ones(384, 128), torch.ones(128, 192)
        write_slot(views, 0, gate_up, down, gate_up_bias=torch.full((384,), 2.0), down_bias=torch.full((128,), 3.0))
        assert (views.gate_up.bias[0] == 2).all() and (views.down.bias[0] == 3).all()
        with pytest.raises(InputError, match="gate_up_bias"):
            write_slot(views, 0, gate_up, down)
        biases = {"gate_up_bias": torch.zeros(384), "down_bias": torch.zeros(128), "up_bias": torch.zeros(1)}
        with pytest.raises(InputError, match="up_bias"):
            write_slot(views, 0, gate_up, down, **biases)

    def test_arenas_that_do_not_fit_are_refused(self):
        from moeplan.kernels.expert_weights import slot_views

        torch, layout = self.torch, slot_layout(SHAPE, "16")
        swiglu = activation("swiglu")
        for arena in (
            self.arena(layout)[:-1],
            self.arena(layout).to(torch.int8),
            self.arena(layout)[:0],
            self.arena(layout, 6)[::2],
        ):
            with pytest.raises(InputError) as refusal:
                slot_views(arena, layout, swiglu)
            assert refusal.value.field == "arena"
        with pytest.raises(InputError, match="multiple of 16"):
            slot_views(self.arena(layout, 4)[4 : 4 + layout.slot_bytes], layout, swiglu)
        with pytest.raises(InputError, match="gated"):
            slot_views(self.arena(layout), layout, activation("relu"))

    def test_matrices_that_do_not_fit_together_are_refused(self):
        from moeplan.kernels.expert_weights import DenseMatrix, ExpertWeights, check_experts

        zeros = self.torch.zeros
        for gate_up, down, scale in (
            ((2, 8, 4), (2, 4, 5), None),
            ((2, 8, 4), (2, 5, 4), None),
            ((2, 8, 4), (2, 4, 4), zeros(2, 8)),
        ):
            first, second = DenseMatrix(values=zeros(gate_up), row_scale=scale), DenseMatrix(values=zeros(down))
            weights = ExpertWeights(gate_up=first, down=second, activation=activation("swiglu"))
            with pytest.raises(InputError):
                check_experts(weights)

    def test_gates_and_ups_that_alternate_are_parted(self):
        from moeplan.kernels.expert_weights import deinterleave_gate_up

        rows = self.torch.arange(6).view(6, 1)
        assert deinterleave_gate_up(rows).flatten().tolist() == [0, 2, 4, 1, 3, 5]

    def test_float8_rows_reach_the_largest_number(self):
        from moeplan.kernels.expert_weights import to_float8

        torch = self.torch
        values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        values[3] = 0
        narrow, scale = to_float8(values)
        assert narrow.float().abs().amax(-1).tolist() == [448.0, 448.0, 448.0, 0.0, 448.0]
        assert scale[3] == 1
        # Three mantissa bits: half of 2**-3 relative, plus half the smallest step (2**-9) of the row's scale.
        error = (narrow.float() * scale.unsqueeze(-1) - values).abs()
        assert (error <= 2.0**-4 * values.abs() + 2.0**-10 * scale.unsqueeze(-1)).all()
