"""Sorts assignments by expert in one launch (plain torch takes about 24), and combines the results back in row order.

N rows, A experts per row, E experts, X tiles of assignments, D output features. Each expert begins a new tile. Tiles are determined on the
device, and their maximum number does not depend on the routing, so that launches can be captured.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2

TILE_ROWS, WIDE_TILE_ROWS, WIDEST_TILE_ROWS = 16, 64, 128
"""Rows of a tile: for few rows per expert, for more than `MANY_ROWS_PER_EXPERT`, and for more than `MAX_ROWS_PER_EXPERT`."""
MANY_ROWS_PER_EXPERT, MAX_ROWS_PER_EXPERT = 32, 384
"""Average rows per expert. Larger tiles read weights less often, but compute more padding."""
BLOCK = 1024
"""Assignments, or output features, that a program processes at a time."""


@dataclass(frozen=True)
class SortedAssignments:
    """Assignments sorted by expert and padded to whole tiles per expert."""

    assignment_Y: Tensor
    """int32, Y = X * rows of a tile: index (row * A + k) of each assignment; N * A for padding"""
    expert_X: Tensor
    """int32: the expert of each tile, as an index into the experts held; -1 for an unused tile"""
    tile_rows: int


@triton.jit
def _load_bins(held_ids, start, num_assigned, BLOCK: tl.constexpr):
    """Indices of assignments and their bins: 1 + expert, or 0 if computed elsewhere or past the end."""
    at = start + tl.arange(0, BLOCK)
    return at, tl.load(held_ids + at, mask=at < num_assigned, other=-1).to(tl.int32) + 1


@quick
@triton.jit(do_not_specialize=["num_assigned", "num_tiles"])  # else a step of another number of rows may wait for a compiler
def _sort_kernel(
    held_ids, assignments, experts, num_assigned, num_tiles, num_held, BINS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per expert writes its tiles. Each program counts all assignments itself, so programs do not depend on each other. One
    more program marks the remaining tiles as unused."""
    expert = tl.program_id(0)
    bins_B = tl.arange(0, BINS)
    counts_B = tl.zeros([BINS], tl.int32)
    for start in range(0, num_assigned, BLOCK):
        _at, bins = _load_bins(held_ids, start, num_assigned, BLOCK)
        counts_B += tl.histogram(bins, BINS)
    tiles_B = tl.where(bins_B > 0, (counts_B + TILE_ROWS - 1) // TILE_ROWS, 0)
    first = tl.sum(tl.where(bins_B <= expert, tiles_B, 0), axis=0)
    count = tl.sum(tl.where(bins_B == expert + 1, counts_B, 0), axis=0)
    last = tl.where(expert < num_held, first + tl.cdiv(count, TILE_ROWS), num_tiles)
    for start in range(first, last, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        tl.store(experts + tiles, tl.zeros([BLOCK], tl.int32) + tl.where(expert < num_held, expert, -1), mask=tiles < last)
    for start in range(first * TILE_ROWS + count, last * TILE_ROWS, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        tl.store(assignments + positions, tl.zeros([BLOCK], tl.int32) + num_assigned, mask=positions < last * TILE_ROWS)
    if count > 0:
        position = first * TILE_ROWS
        for start in range(0, num_assigned, BLOCK):
            at, bins = _load_bins(held_ids, start, num_assigned, BLOCK)
            is_mine = (bins == expert + 1).to(tl.int32)
            tl.store(assignments + position + tl.cumsum(is_mine, axis=0) - is_mine, at, mask=is_mine > 0)
            position += tl.sum(is_mine, axis=0)


def sort_by_expert(held_ids_NA: Tensor, num_held: int) -> SortedAssignments:
    """Sort assignments by expert without synchronising with the device. ``held_ids_NA`` (int64): index of the held expert, -1 if computed
    elsewhere. The reference is `sort_reference`.

    Tiles of 2 rows; assignments 0 .. 5 of experts 1 0 -1 1 1 0:   experts 0 1 1 -, assignments 1 5 | 0 3 | 4 . | . .
    """
    num_assigned, device = held_ids_NA.numel(), held_ids_NA.device
    tile_rows = tile_rows_for(num_assigned, num_held)
    num_tiles = max_tiles(num_assigned, num_held, tile_rows)
    assignment_Y = torch.empty(num_tiles * tile_rows, dtype=torch.int32, device=device)
    expert_X = torch.empty(num_tiles, dtype=torch.int32, device=device)
    if num_tiles:
        _sort_kernel[(num_held + 1,)](
            held_ids_NA.contiguous(), assignment_Y, expert_X, num_assigned, num_tiles, num_held,
            BINS=next_power_of_2(num_held + 1), TILE_ROWS=tile_rows, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return SortedAssignments(assignment_Y=assignment_Y, expert_X=expert_X, tile_rows=tile_rows)


def tile_rows_for(num_assigned: int, num_held: int) -> int:
    """Rows of a tile, chosen by the average number of rows per expert."""
    if num_assigned > MAX_ROWS_PER_EXPERT * num_held:
        return WIDEST_TILE_ROWS
    return WIDE_TILE_ROWS if num_assigned > MANY_ROWS_PER_EXPERT * num_held else TILE_ROWS


def max_tiles(num_assigned: int, num_held: int, tile_rows: int) -> int:
    """Upper bound on the number of tiles: each expert may leave its last tile partly empty."""
    return min(cdiv(num_assigned, tile_rows) + num_held, num_assigned)


def sort_reference(held_ids_NA: Tensor, num_held: int) -> SortedAssignments:
    """`sort_by_expert` in plain torch."""
    ids = held_ids_NA.flatten()
    num_assigned, device = len(ids), ids.device
    tile_rows = tile_rows_for(num_assigned, num_held)
    num_tiles = max_tiles(num_assigned, num_held, tile_rows)
    counts_E = ids.new_zeros(num_held + 1).scatter_add_(0, ids + 1, torch.ones_like(ids))
    tiles_E = (counts_E[1:] + tile_rows - 1) // tile_rows
    tiles_so_far_E = tiles_E.cumsum(0)
    order = ids.argsort(stable=True)  # assignments computed elsewhere come first
    expert = ids[order]
    index_in_expert = torch.arange(num_assigned, device=device) - (counts_E.cumsum(0) - counts_E)[expert + 1]
    nowhere = num_tiles * tile_rows
    position = (tiles_so_far_E - tiles_E)[expert.clamp(min=0)] * tile_rows + index_in_expert
    position = torch.where(expert >= 0, position, nowhere)
    assignment_Y = torch.full((nowhere + 1,), num_assigned, dtype=torch.int32, device=device)
    assignment_Y.scatter_(0, position, order.to(torch.int32))
    expert_X = torch.searchsorted(tiles_so_far_E, torch.arange(num_tiles, device=device), right=True)
    expert_X = torch.where(expert_X < num_held, expert_X, -1).to(torch.int32)
    return SortedAssignments(assignment_Y=assignment_Y[:nowhere], expert_X=expert_X, tile_rows=tile_rows)


@quick
@triton.jit
def _combine_kernel(y, held_ids, out, width, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Sums a block of features of one row."""
    row = tl.program_id(0).to(tl.int64)
    dims_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_D = tl.zeros([BLOCK], tl.float32)
    for position in tl.static_range(PER_ROW):
        assignment = row * PER_ROW + position
        is_here = tl.load(held_ids + assignment) >= 0  # results computed elsewhere are uninitialised here
        sum_D += tl.load(y + assignment * width + dims_D, mask=(dims_D < width) & is_here, other=0.0).to(tl.float32)
    tl.store(out + row * width + dims_D, sum_D.to(out.dtype.element_ty), mask=dims_D < width)


def combine_rows(y: Tensor, held_ids_NA: Tensor) -> Tensor:
    """(N, D): the sum over each row's assignments computed here, from (N * A, D). Accumulated in float32 and rounded once."""
    (num_rows, per_row), width = held_ids_NA.shape, y.shape[1]
    out_ND = y.new_empty((num_rows, width))
    if out_ND.numel():
        _combine_kernel[(num_rows, cdiv(width, BLOCK))](
            y, held_ids_NA.contiguous(), out_ND, width, PER_ROW=per_row, BLOCK=BLOCK, num_warps=4
        )
    return out_ND
