"""Rows sorted by expert, and the tiles that cover them.

    offsets [E + 1]:   expert e owns rows offsets[e] … offsets[e + 1] − 1
    tiles(block_m):    tile t covers up to block_m rows of one expert, from first_row[t] on

Modelled: offsets known to the host (a replayed recording) or only to the device (a real router). In the second case the host never
waits: it launches enough programs for the worst routing, R/block_m + min(E, R) tiles, and those beyond the real number return at
once. Ignored: choosing the tile size (`tuning`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from ..base.errors import InputError
from .checks import check_dtype, check_runnable, check_shape, described

_MAX_EXPERTS = 4096
_TILES_PER_PROGRAM = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TileMap:
    """Tiles of `block_m` rows: `expert` and `first_row` int32 [max_tiles], `num_tiles` int32 [1], all on the device."""

    expert: torch.Tensor
    first_row: torch.Tensor
    num_tiles: torch.Tensor
    max_tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroups:
    """Rows [num_rows] sorted by expert, with `offsets` int32 [num_experts + 1] on the device that computes."""

    offsets: torch.Tensor
    num_rows: int
    num_active: int
    """Experts with rows, where the host knows it, else the most there can be."""
    _tiles: dict[int, TileMap] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        """Experts, with rows or without."""
        return self.offsets.shape[0] - 1

    @property
    def rows_per_expert(self) -> int:
        """Mean rows of an expert that has any, rounded up: what launch configurations are chosen by."""
        return -(-self.num_rows // max(self.num_active, 1))

    def tiles(self, block_m: int) -> TileMap:
        """Return the tiles of `block_m` rows; made once for each size and kept."""
        if block_m not in self._tiles:
            self._tiles[block_m] = _map_tiles(self, block_m)
        return self._tiles[block_m]


def groups_from_counts(rows_of_expert: Sequence[int], device: torch.device | str) -> RowGroups:
    """Return the groups for row counts the host knows; raises InputError for negative counts or none at all."""
    counts = [int(count) for count in rows_of_expert]
    if not counts or min(counts) < 0:
        raise InputError("rows_of_expert", counts, "one count, not negative, for each expert", "count the rows again")
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int32)
    offsets[1:] = torch.tensor(counts).cumsum(0)
    groups = RowGroups(offsets=offsets.to(device), num_rows=sum(counts), num_active=sum(1 for count in counts if count))
    _check_num_experts(groups)
    return groups


def groups_from_offsets(offsets: torch.Tensor, num_rows: int) -> RowGroups:
    """Return the groups for `offsets` int32 [E + 1] on any device, of `num_rows` rows in all.

    Offsets on the CPU are checked (from 0 to num_rows, never falling); those on a GPU are the caller's promise, since looking at
    them would make the host wait.
    """
    check_dtype("offsets", offsets, (torch.int32,))
    check_shape("offsets", offsets, (None,), "[num_experts + 1]")
    if offsets.shape[0] < 2 or num_rows < 0:
        raise InputError(
            "offsets", described(offsets), "at least one expert and no negative number of rows", "check the caller"
        )
    num_active = min(offsets.shape[0] - 1, num_rows)
    if offsets.device.type == "cpu":
        counts = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != num_rows or int(counts.min()) < 0:
            raise InputError(
                "offsets", offsets.tolist(), f"they rise from 0 to the {num_rows} rows", "sort the rows by expert first"
            )
        num_active = int((counts > 0).sum())
    groups = RowGroups(offsets=offsets.contiguous(), num_rows=num_rows, num_active=num_active)
    _check_num_experts(groups)
    return groups


def _check_num_experts(groups: RowGroups) -> None:
    if groups.num_experts > _MAX_EXPERTS:
        raise InputError(
            "num_experts", groups.num_experts, f"at most {_MAX_EXPERTS} experts in one call", "split the layer"
        )


@triton.jit(do_not_specialize=["num_experts", "max_tiles"], do_not_specialize_on_alignment=["offsets_ptr"])
def _map_tiles_kernel(
    offsets_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    first_row_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    num_experts: tl.tensor,
    max_tiles: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Every program recounts all experts' tiles (they are few) and writes BLOCK_T entries of the map."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = tl.where(e < num_experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    ends = tl.cumsum(tiles, axis=0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Experts whose last tile lies before t; those beyond num_experts repeat the total, so valid tiles never count them.
    expert = tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), axis=1)
    first_tile = tl.sum(tl.where(e[None, :] < expert[:, None], tiles[None, :], 0), axis=1)
    total = tl.sum(tiles, axis=0)
    is_tile = t < total
    row = tl.load(offsets_ptr + expert, mask=is_tile, other=0) + (t - first_tile) * BLOCK_M
    tl.store(expert_ptr + t, tl.where(is_tile, expert, 0), mask=t < max_tiles)
    tl.store(first_row_ptr + t, tl.where(is_tile, row, 0), mask=t < max_tiles)
    if tl.program_id(0) == 0:
        tl.store(num_tiles_ptr, total)


def _map_tiles(groups: RowGroups, block_m: int) -> TileMap:
    device = groups.offsets.device
    check_runnable(_map_tiles_kernel, device)
    max_tiles = max(groups.num_rows // block_m + groups.num_active, 1)
    expert = torch.empty(max_tiles, dtype=torch.int32, device=device)
    first_row = torch.empty_like(expert)
    num_tiles = torch.empty(1, dtype=torch.int32, device=device)
    _map_tiles_kernel[(triton.cdiv(max_tiles, _TILES_PER_PROGRAM),)](
        groups.offsets,
        expert,
        first_row,
        num_tiles,
        groups.num_experts,
        max_tiles,
        BLOCK_M=block_m,
        BLOCK_E=max(triton.next_power_of_2(groups.num_experts), 16),
        BLOCK_T=_TILES_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return TileMap(expert=expert, first_row=first_row, num_tiles=num_tiles, max_tiles=max_tiles)
