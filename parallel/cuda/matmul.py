"""The main loop of matrix products with plain or quantised matrices: a tile of rows times a block of outputs.

R rows of a tile, O outputs of it, D input features at a time, B bytes of int4 numbers (two per byte), G groups that share a scale.
"""

import triton
import triton.language as tl

from parallel.cuda.zero_points import ZERO_POINT_GROUP, group_scale, group_zero

INT4_GROUP = tl.constexpr(32)
"""Input features that share a scale (`parallel.scale_groups.GROUP_SIZE`). For int4_zeros: features in the low nibbles of as many bytes."""
DEPTH = {"plain": 64, "int8": 128, "int4": 64, "int4_zeros": 64, "fp8": 128}
"""Input features per iteration (block K). int8: one scale group; int4: two; int4_zeros: half of one."""
FP8_ACCUMULATION = tl.constexpr(128)
"""FP8 products that Hopper's tensor cores may accumulate on their own, with 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). By
default Triton lets them accumulate all: with 30,000 input features the error is some hundredths of the result."""
GROUP = tl.constexpr(8)
"""Tiles of rows that are scheduled together over all outputs (grouped ordering, for L2 reuse)."""


@triton.jit
def tile_coordinates(program, num_tiles, num_column_tiles):
    """(tile of rows, tile of columns) of a program, in grouped order: programs that run at the same time share rows and columns, which are
    then found in the L2 cache."""
    of_group = GROUP * num_column_tiles
    first = program // of_group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % of_group
    return first + within % size, within // size


@triton.jit
def matmul_tile(
    x, x_scales, numbers, scales, row_R, real_R, columns_O, mask_O, in_size, padded_in_size,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, O) in float32: ``x[row] . numbers[column]`` times the scales. Only for fp8 do rows of ``x`` have scales, ``x_scales``."""
    sum_RO = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_R = x + row_R * in_size
    column_O = columns_O.to(tl.int64)
    if KIND == "int4":
        bytes_B = tl.arange(0, INT4_GROUP)
        numbers_O = numbers + column_O * (padded_in_size // 2)
        scales_O = scales + column_O * (padded_in_size // INT4_GROUP)
        for start in range(0, padded_in_size, 2 * INT4_GROUP):
            pairs_BO = tl.load(numbers_O[None, :] + start // 2 + bytes_B[:, None], mask=mask_O[None, :], other=0).to(tl.int32)
            for half in tl.static_range(2):
                dims_B = start + half * INT4_GROUP + bytes_B
                x_RB = tl.load(x_R[:, None] + dims_B[None, :], mask=real_R[:, None] & (dims_B < in_size)[None, :], other=0.0)
                number_BO = ((pairs_BO >> 4 * half) & 15) - 8
                scale_O = tl.load(scales_O + start // INT4_GROUP + half, mask=mask_O, other=0.0).to(tl.float32)
                sum_RO += tl.dot(x_RB, number_BO.to(x_RB.dtype), input_precision=PRECISION) * scale_O[None, :]
    elif KIND == "int4_zeros":
        bytes_B = tl.arange(0, INT4_GROUP)
        numbers_O = numbers + column_O * (padded_in_size // 2)
        words_O = scales + column_O * (padded_in_size // ZERO_POINT_GROUP)
        for start in range(0, padded_in_size, 2 * INT4_GROUP):
            word_O = tl.load(words_O + start // ZERO_POINT_GROUP, mask=mask_O, other=0)
            pairs_BO = tl.load(numbers_O[None, :] + start // 2 + bytes_B[:, None], mask=mask_O[None, :], other=0).to(tl.int32)
            for half in tl.static_range(2):
                dims_B = start + half * INT4_GROUP + bytes_B
                x_RB = tl.load(x_R[:, None] + dims_B[None, :], mask=real_R[:, None] & (dims_B < in_size)[None, :], other=0.0)
                number_BO = ((pairs_BO >> 4 * half) & 15) - group_zero(word_O)[None, :]
                sum_RO += tl.dot(x_RB, number_BO.to(x_RB.dtype), input_precision=PRECISION) * group_scale(word_O)[None, :]
    else:
        numbers_O = numbers + column_O * padded_in_size
        for start in range(0, padded_in_size, DEPTH):
            dims_D = start + tl.arange(0, DEPTH)
            x_RD = tl.load(x_R[:, None] + dims_D[None, :], mask=real_R[:, None] & (dims_D < in_size)[None, :], other=0.0)
            number_DO = tl.load(numbers_O[None, :] + dims_D[:, None], mask=(dims_D < padded_in_size)[:, None] & mask_O[None, :], other=0.0)
            if KIND == "int8":
                scale_O = tl.load(scales + column_O * (padded_in_size // DEPTH) + start // DEPTH, mask=mask_O, other=0.0).to(tl.float32)
                sum_RO += tl.dot(x_RD, number_DO.to(x_RD.dtype), input_precision=PRECISION) * scale_O[None, :]
            elif KIND == "fp8":
                sum_RO = tl.dot(x_RD, number_DO, acc=sum_RO, max_num_imprecise_acc=FP8_ACCUMULATION)
            else:
                sum_RO = tl.dot(x_RD, number_DO, acc=sum_RO, input_precision=PRECISION)
    if KIND == "fp8":
        row_scale_R = tl.load(x_scales + row_R, mask=real_R, other=0.0)
        sum_RO = sum_RO * row_scale_R[:, None] * tl.load(scales + columns_O, mask=mask_O, other=0.0)[None, :]
    return sum_RO
