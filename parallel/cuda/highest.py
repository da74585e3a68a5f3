"""The highest of a row in two launches, where plain torch takes a dozen. The twin is `engine.run.sampling.search.highest`.

R rows, V columns, N parts of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.aligned_rows import readable_columns
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2

BLOCK = 4096
"""Columns that one program looks at."""
NOBODY = tl.constexpr(2**31 - 1)


@triton.jit
def _highest_of(values, ids):
    """(the highest, the lowest id that has it); the highest is NaN where one of the values is."""
    sound = tl.where(values == values, values, float("-inf"))
    highest = tl.max(sound, axis=0)
    first = tl.min(tl.where(sound == highest, ids, NOBODY), axis=0)
    num_nan = tl.sum((values != values).to(tl.int32), axis=0)
    return tl.where(num_nan > 0, float("nan"), highest), first


@quick
@triton.jit
def _parts_kernel(x, part_highest, part_ids, width, readable, row_stride, num_parts, BLOCK: tl.constexpr):
    """One part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + ids, mask=ids < readable, other=float("-inf")).to(tl.float32)
    values = tl.where(ids < width, values, float("-inf"))
    highest, first = _highest_of(values, ids)
    tl.store(part_highest + row * num_parts + part, highest)
    tl.store(part_ids + row * num_parts + part, first)


@quick
@triton.jit
def _rows_kernel(part_highest, part_ids, highest_of, id_of, num_parts, PARTS: tl.constexpr):
    """The parts of one row."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    values = tl.load(part_highest + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    ids = tl.load(part_ids + row * num_parts + parts, mask=parts < num_parts, other=NOBODY)
    highest, first = _highest_of(values, ids)
    tl.store(highest_of + row, highest)
    tl.store(id_of + row, first.to(tl.int64))


def highest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (R) and int64 (R), of equal ones the lowest id. Rows may lie apart, a row's columns may not."""
    num_rows, width = x_RV.shape
    assert x_RV.stride(1) == 1
    num_parts = cdiv(width, BLOCK)
    part_highest = torch.empty(num_rows, num_parts, dtype=torch.float32, device=x_RV.device)
    part_ids = torch.empty(num_rows, num_parts, dtype=torch.int32, device=x_RV.device)
    highest_R = torch.empty(num_rows, dtype=torch.float32, device=x_RV.device)
    id_R = torch.empty(num_rows, dtype=torch.int64, device=x_RV.device)
    if num_rows:
        _parts_kernel[(num_rows, num_parts)](
            x_RV, part_highest, part_ids, width, readable_columns(x_RV), x_RV.stride(0), num_parts, BLOCK=BLOCK, num_warps=8
        )
        _rows_kernel[(num_rows,)](part_highest, part_ids, highest_R, id_R, num_parts, PARTS=max(2, next_power_of_2(num_parts)), num_warps=1)
    return highest_R, id_R
