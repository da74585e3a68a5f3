"""Products with matrices that were rounded to 8 or 4 bits (`parallel.scaled_format`). T rows, K input features, N outputs."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.products import DEPTH, product_tile, tile_of
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2
from parallel.cuda.tiles import Tile, candidates_for, rows_in_words, tiles_of
from parallel.rounding import FP8, FP8_MOST
from parallel.scaled_format import kind_of

FP8_BLOCK = 32768
"""Features of a row that a program takes at a time at most: of a single row nearly all that rounding takes is waiting for it."""
PER_WARP = 1024


@quick
@triton.jit
def _round_kernel(x, numbers, scales, width, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """One row to FP8, its largest number becoming the largest that there is. The row is read twice, the second time from cache."""
    row = tl.program_id(0).to(tl.int64)
    largest_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        dims_K = start + tl.arange(0, BLOCK)
        x_K = tl.load(x + row * width + dims_K, mask=dims_K < width, other=0.0).to(tl.float32)
        largest_K = tl.maximum(largest_K, tl.abs(x_K))
    scale = tl.max(largest_K, axis=0) * (1 / MOST)
    inverse = tl.where(
        scale == 0, 0.0, tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    )  # to the bit, as torch: it decides between neighbours
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        dims_K = start + tl.arange(0, BLOCK)
        x_K = tl.load(x + row * width + dims_K, mask=dims_K < width, other=0.0).to(tl.float32)
        rounded_K = tl.minimum(tl.maximum(x_K * inverse, -MOST), MOST).to(numbers.dtype.element_ty)
        tl.store(numbers + row * width + dims_K, rounded_K, mask=dims_K < width)


@quick
@triton.jit(do_not_specialize=["num_rows", "has_bias"])  # else a step of another number of rows may wait for a compiler
def _linear_kernel(
    x, x_scales, numbers, scales, bias, out, num_rows, in_size, filled_size, out_size, has_bias, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows, a stretch of outputs."""
    tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(out_size, COLUMNS))
    row_R = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_O = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_R, mask_O = row_R < num_rows, columns_O < out_size
    sum_RO = product_tile(
        x, x_scales, numbers, scales, row_R, real_R, columns_O, mask_O, in_size, filled_size, KIND, ROWS, COLUMNS, DEPTH, PRECISION
    )
    sum_RO += tl.load(bias + columns_O, mask=mask_O & (has_bias > 0), other=0.0).to(tl.float32)[None, :]
    place_RO = row_R[:, None] * out_size + columns_O[None, :]
    tl.store(out + place_RO, sum_RO.to(out.dtype.element_ty), mask=real_R[:, None] & mask_O[None, :])


def round_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (T, K) and their scales (T, float32); the twin is `parallel.rounding.round_to_fp8`."""
    x_TK = x_TK.contiguous()
    numbers_TK = torch.empty_like(x_TK, dtype=FP8)
    scales_T = x_TK.new_empty(x_TK.shape[0], dtype=torch.float32)
    if x_TK.shape[0]:
        block = min(next_power_of_2(x_TK.shape[1]), FP8_BLOCK)
        _round_kernel[(x_TK.shape[0],)](
            x_TK, numbers_TK, scales_T, x_TK.shape[1], MOST=FP8_MOST, BLOCK=block, num_warps=max(4, block // PER_WARP)
        )
    return numbers_TK, scales_T


def multiply(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None) -> Tensor:
    """(T, N) in the dtype of ``x``; the twin is `parallel.scaled_format.multiply_slowly`."""
    kind, numbers, scales = kind_of(tensors), tensors["numbers"], tensors["scales"]
    num_rows, in_size = x_TK.shape
    out_TN = x_TK.new_empty((num_rows, numbers.shape[0]))
    if out_TN.numel() == 0:
        return out_TN
    x, row_scales = round_rows(x_TK) if kind == "fp8" else (x_TK.contiguous(), scales)

    def launch(tile: Tile) -> None:
        _linear_kernel[(cdiv(num_rows, tile.rows) * cdiv(numbers.shape[0], tile.columns),)](
            x, row_scales, numbers, scales, out_TN if bias_N is None else bias_N, out_TN,
            num_rows, in_size, filled_size(tensors), numbers.shape[0], int(bias_N is not None),
            KIND=kind, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH[kind],
            PRECISION="ieee" if x_TK.dtype == torch.float32 else "tf32", num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    key = f"{kind} by {x_TK.dtype}, {in_size} to {numbers.shape[0]}, {rows_in_words(num_rows)}"
    launch(tiles_of(x.device).best(key, candidates_for(num_rows), launch))
    return out_TN


def filled_size(tensors: Mapping[str, Tensor]) -> int:
    """Input features of the matrix with the zeros at their end."""
    width = tensors["numbers"].shape[1]
    return 2 * width if kind_of(tensors) == "int4" else width
