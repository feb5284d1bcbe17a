"""Every kernel with every shipped configuration, compiled for the GPUs it is meant for: it fits and uses the matrix units.

Needs no GPU. By default one configuration in a few is compiled; MOEPLAN_LONG compiles all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kernels_cases import LONG
from kernels_offline import SHARED_BYTES, Compiled, account, compiled_for
from moeplan.kernels import dequant_gemm, grouped_gemm, permute, row_groups, tuning
from moeplan.kernels.activation import activation
from moeplan.kernels.expert_weights import DenseMatrix
from moeplan.kernels.packing import PackedMatrix
from moeplan.kernels.row_groups import groups_from_counts
from moeplan.kernels.slot_layout import packed_format
from moeplan.kernels.tuning import Config, DequantConfig, GroupedConfig

NUM_OUTPUTS, NUM_INPUTS = 512, 1024
# A register or two may go to memory once per tile; more would be felt in every iteration.
MOST_SPILLS = 8


def shipped() -> list[tuple[int, str, str, int, Config]]:
    """Compute capability, kernel, weights, rows and configuration of everything in the files."""
    found: list[tuple[int, str, str, int, Config]] = []
    for capability, name in ((90, "sm_90.json"), (80, "default.json"), (89, "default.json")):
        for entry in json.loads((Path(tuning.__file__).parent / "tuned" / name).read_text())["entries"]:
            kind = GroupedConfig if entry["kernel"].startswith("grouped") else DequantConfig
            for rows, config in entry["rows"].items():
                if capability > 80 or entry["weights"] != "8":  # compute capability 8.0 has no float8
                    found.append((capability, entry["kernel"], entry["weights"], int(rows), kind(**config)))
    return found


def compile_one(capability: int, kernel: str, weights: str, rows: int, config: Config) -> Compiled:
    """Call the public function with tensors nobody computes on; the GEMM is the last kernel it would launch."""
    function = activation("swiglu") if kernel.endswith("gate_up") else None
    num_rows = (2 if function else 1) * NUM_OUTPUTS
    groups = groups_from_counts([rows, rows], "cpu")
    x = torch.empty(2 * rows, NUM_INPUTS, dtype=torch.bfloat16)
    with compiled_for(capability, dequant_gemm, grouped_gemm, row_groups) as compiled:
        if isinstance(config, GroupedConfig):
            is_float8 = weights == "8"
            dtype = torch.float8_e4m3fn if is_float8 else torch.bfloat16
            dense = DenseMatrix(
                values=torch.empty(2, num_rows, NUM_INPUTS, dtype=dtype),
                row_scale=torch.empty(2, num_rows) if is_float8 else None,
            )
            scale = torch.empty(2 * rows) if is_float8 else None
            if function:
                grouped_gemm.grouped_gate_up(x.to(dtype), dense, groups, function, config=config, x_scale=scale)
            else:
                grouped_gemm.grouped_down(x.to(dtype), dense, groups, config=config, x_scale=scale)
        else:
            fmt = packed_format(int(weights))
            packed = PackedMatrix(
                words=torch.empty(2, num_rows, fmt.num_words(NUM_INPUTS), dtype=torch.int32),
                codes=torch.empty(2, NUM_INPUTS // fmt.group, num_rows, dtype=torch.int16),
                row_scale=torch.empty(2, num_rows),
                bits=fmt.bits,
                num_columns=NUM_INPUTS,
            )
            if function:
                dequant_gemm.dequant_gate_up(x, packed, groups, function, config=config)
            else:
                dequant_gemm.dequant_down(x, packed, groups, config=config)
    return account(compiled[-1])


BRIEF = (
    (90, "grouped_gate_up", "16", 128),
    (90, "grouped_down", "16", 1),
    (90, "dequant_gate_up", "4", 1),
    (90, "dequant_down", "4", 128),
)
CASES = [case for case in shipped() if LONG or case[:4] in BRIEF]


@pytest.mark.parametrize(("capability", "kernel", "weights", "rows", "config"), CASES)
def test_shipped_configurations_compile_and_fit(capability, kernel, weights, rows, config):
    found = compile_one(capability, kernel, weights, rows, config)
    assert found.shared_bytes <= SHARED_BYTES[capability]
    assert found.spilled <= MOST_SPILLS
    if capability == 90 and rows >= 64:
        assert "wgmma.mma_async" in found.ptx
    else:
        assert "mma.sync" in found.ptx or "wgmma.mma_async" in found.ptx
    if isinstance(config, GroupedConfig) and config.descriptors:
        assert "cp.async.bulk.tensor" in found.ptx
    if kernel.startswith("dequant"):
        # Weights become floats by shifts and masks: no conversion of whole numbers to floats anywhere.
        assert not re.search(r"cvt\.rn\.(f32|bf16|f16)\.[su]\d", found.ptx)


def test_few_row_decoding_costs_few_instructions_a_weight():
    """The decoding loop of 4-bit weights must keep up with memory: 4.3 TB/s of 0.53 bytes a weight leave 3.6 instructions each.

    132 multiprocessors issue 4 × 32 lane instructions a cycle at 1.75 GHz; counted here is the whole kernel but its start and end.
    """
    small, large = (
        sum(compile_one(90, "dequant_down", "4", 1, DequantConfig(
            block_m=8, block_n=block_n, split_k=1, num_warps=2, num_stages=3, scale_first=False)).sass.values())
        for block_n in (32, 64)
    )  # fmt: skip
    # Twice the outputs double only the loop's work for weights (and some addresses): 32 more rows of 256 weights over 64 threads.
    assert (large - small) / (32 * 256 / 64) < 3.6


def test_the_other_kernels_compile():
    with compiled_for(90, permute, dequant_gemm) as compiled:
        permutation = permute.sort_by_expert(torch.zeros(4, 2, dtype=torch.int32), 8)
        rows = permute.permute(torch.empty(4, 64, dtype=torch.bfloat16), permutation)
        permute.combine(rows, permutation, torch.empty(4, 2))
        dequant_gemm.group_sums(rows, 64)
    assert [account(kernel).spilled for kernel in compiled] == [0, 0, 0, 0]
