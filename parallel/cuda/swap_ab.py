"""Products of few rows with swapped operands (swap AB): the weight matrix is the left operand of the tensor cores.

A Hopper tensor core instruction multiplies at least 64 rows. With few rows of ``x`` most would be padding; outputs are always enough. And
the left operand may come from registers: int8 and int4 numbers are converted to bfloat16 there and need not go through shared memory again.

R rows of a tile, O outputs of it, D input features at a time, B 16-bit words of two int8 or four int4 numbers.
"""

import triton
import triton.language as tl

from parallel.cuda.matmul import FP8_ACCUMULATION, INT4_GROUP, tile_coordinates
from parallel.cuda.quick_launch import quick
from parallel.cuda.zero_points import group_scale, group_zero

INT8_GROUP = tl.constexpr(128)
SWAP_AB_DEPTH = 128
INT4_PAIRS = tl.constexpr(2)
"""Pairs of int4 groups per iteration."""


@triton.jit
def _of_int8(pairs_OB, FAST: tl.constexpr, dtype: tl.constexpr):
    """(O, 2 B): converts the two int8 numbers of each 16-bit word. FAST is exact: 0x4300 is 128 in bfloat16, and its seven bits of mantissa
    hold the low seven bits of a number; the sign bit decides whether 128 or 256 is subtracted again."""
    if FAST:
        first_OB, second_OB = tl.inline_asm_elementwise(
            """{
            .reg .b32 number, less, one;
            cvt.u32.u16 number, $2;
            mov.b32 one, 0x3F803F80;
            prmt.b32 number, number, 0x43434343, 0x4140;
            lop3.b32 less, number, 0xFF80FF80, 0x80008000, 0x6A;
            and.b32 number, number, 0xFF7FFF7F;
            fma.rn.bf16x2 number, number, one, less;
            mov.b32 {$0, $1}, number;
            }""",
            "=h,=h,h", [pairs_OB], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        first_OB, second_OB = ((pairs_OB << 8) >> 8).to(dtype), (pairs_OB >> 8).to(dtype)
    return _side_by_side(first_OB, second_OB)


@triton.jit
def _of_int4(pairs_OB, FAST: tl.constexpr, dtype: tl.constexpr):
    """The low (O, 2 B) and the high nibbles of the two bytes in each 16-bit word, minus 8. Exact like `_of_int8`: 0xC308 is -136."""
    if FAST:
        low0_OB, low1_OB, high0_OB, high1_OB = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, one, less;
            cvt.u32.u16 low, $4;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            prmt.b32 low, low, 0, 0x4140;
            shr.u32 high, low, 4;
            lop3.b32 low, low, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 low, low, one, less;
            fma.rn.bf16x2 high, high, one, less;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }""",
            "=h,=h,=h,=h,h", [pairs_OB], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low0_OB, high0_OB = ((pairs_OB & 15) - 8).to(dtype), ((pairs_OB >> 4 & 15) - 8).to(dtype)
        low1_OB, high1_OB = ((pairs_OB >> 8 & 15) - 8).to(dtype), ((pairs_OB >> 12 & 15) - 8).to(dtype)
    return _side_by_side(low0_OB, low1_OB), _side_by_side(high0_OB, high1_OB)


@triton.jit
def _of_int4_with_zeros(pairs_OB, word_O, FAST: tl.constexpr, dtype: tl.constexpr):
    """As `_of_int4`, but minus the zero point of the output: -128 - zero is 0xC300 + zero in bfloat16."""
    if FAST:
        less_OB = tl.broadcast_to(((0xC300 + group_zero(word_O)) * 0x00010001)[:, None], pairs_OB.shape)
        low0_OB, low1_OB, high0_OB, high1_OB = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, one;
            cvt.u32.u16 low, $4;
            mov.b32 one, 0x3F803F80;
            prmt.b32 low, low, 0, 0x4140;
            shr.u32 high, low, 4;
            lop3.b32 low, low, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 low, low, one, $5;
            fma.rn.bf16x2 high, high, one, $5;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }""",
            "=h,=h,=h,=h,h,r", [pairs_OB, less_OB], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        wide_OB, zero_O1 = pairs_OB.to(tl.int32), group_zero(word_O)[:, None]
        low0_OB, high0_OB = ((wide_OB & 15) - zero_O1).to(dtype), ((wide_OB >> 4 & 15) - zero_O1).to(dtype)
        low1_OB, high1_OB = ((wide_OB >> 8 & 15) - zero_O1).to(dtype), ((wide_OB >> 12 & 15) - zero_O1).to(dtype)
    return _side_by_side(low0_OB, low1_OB), _side_by_side(high0_OB, high1_OB)


@triton.jit
def _side_by_side(first_OB, second_OB):
    """(O, 2 B): interleaves two tensors; a thread holds both, so no data moves."""
    return tl.reshape(tl.join(first_OB, second_OB), (first_OB.shape[0], 2 * first_OB.shape[1]))


@triton.jit
def _rows_at(x_R, real_R, dims_D, in_size):
    """(D, R)"""
    return tl.load(x_R[None, :] + dims_D[:, None], mask=real_R[None, :] & (dims_D < in_size)[:, None], other=0.0)


@triton.jit
def _scales_at(scales_O, mask_O, group, num_groups):
    return tl.load(scales_O + group, mask=mask_O & (group < num_groups), other=0.0)


@triton.jit
def _sum_with_zeros(
    x_R, numbers_O, words_O, real_R, mask_O, in_size, num_groups, part, num_parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(O, R) in float32: the sum over one part of the groups of 128, each with a zero point."""
    sum_OR = tl.zeros([COLUMNS, ROWS], tl.float32)
    places_B, dims_B = tl.arange(0, INT4_GROUP // 2), tl.arange(0, INT4_GROUP)
    per_part = tl.cdiv(num_groups, num_parts)
    first = part * per_part
    for group in range(first, tl.minimum(first + per_part, num_groups)):
        word_O = tl.load(words_O + group, mask=mask_O, other=0)  # four bytes: Triton pipelines such loads
        pairs0_OB = tl.load(numbers_O[:, None] + (group * 32 + places_B)[None, :], mask=mask_O[:, None], other=0)
        pairs1_OB = tl.load(numbers_O[:, None] + (group * 32 + 16 + places_B)[None, :], mask=mask_O[:, None], other=0)
        x0_BR = _rows_at(x_R, real_R, group * 128 + dims_B, in_size)
        x1_BR = _rows_at(x_R, real_R, group * 128 + 32 + dims_B, in_size)
        x2_BR = _rows_at(x_R, real_R, group * 128 + 64 + dims_B, in_size)
        x3_BR = _rows_at(x_R, real_R, group * 128 + 96 + dims_B, in_size)
        number0_OB, number1_OB = _of_int4_with_zeros(pairs0_OB, word_O, FAST, x_R.dtype.element_ty)
        number2_OB, number3_OB = _of_int4_with_zeros(pairs1_OB, word_O, FAST, x_R.dtype.element_ty)
        product_OR = tl.dot(number0_OB, x0_BR, input_precision=PRECISION)
        product_OR = tl.dot(number1_OB, x1_BR, acc=product_OR, input_precision=PRECISION)
        product_OR = tl.dot(number2_OB, x2_BR, acc=product_OR, input_precision=PRECISION)
        product_OR = tl.dot(number3_OB, x3_BR, acc=product_OR, input_precision=PRECISION)
        sum_OR += product_OR * group_scale(word_O)[:, None]
    return sum_OR


@quick
@triton.jit(do_not_specialize=["num_rows", "num_groups", "has_bias", "num_parts"])  # else a step of other rows may wait for a compiler
def swap_ab_kernel(
    x, x_scales, numbers, scales, bias, out, num_rows, in_size, row_size, num_groups, out_size, has_bias, num_parts, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of outputs, a tile of rows, and a part of the input features (split-K; then partial sums in float32 are written)."""
    tile, column_tile = tile_coordinates(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(out_size, COLUMNS))
    part = tl.program_id(1)
    row_R = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_O = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_R, mask_O = row_R < num_rows, columns_O < out_size
    x_R, numbers_O = x + row_R * in_size, numbers + columns_O.to(tl.int64) * row_size
    sum_OR = tl.zeros([COLUMNS, ROWS], tl.float32)
    if KIND == "int4_zeros":
        words_O = scales + columns_O.to(tl.int64) * num_groups
        sum_OR = _sum_with_zeros(
            x_R, numbers_O, words_O, real_R, mask_O, in_size, num_groups, part, num_parts, ROWS, COLUMNS, FAST, PRECISION
        )
    elif KIND == "int4":
        words_B, bytes_B = tl.arange(0, INT4_GROUP // 2), tl.arange(0, INT4_GROUP)
        scales_O = scales + columns_O.to(tl.int64) * num_groups
        num_steps = tl.cdiv(row_size, INT4_PAIRS * INT4_GROUP // 2)
        per_part = tl.cdiv(num_steps, num_parts)
        first = part * per_part
        group = first * 4
        next0_O, next1_O = _scales_at(scales_O, mask_O, group, num_groups), _scales_at(scales_O, mask_O, group + 1, num_groups)
        next2_O, next3_O = _scales_at(scales_O, mask_O, group + 2, num_groups), _scales_at(scales_O, mask_O, group + 3, num_groups)
        for step in range(first, tl.minimum(first + per_part, num_steps)):
            scale0_O, scale1_O, scale2_O, scale3_O = next0_O, next1_O, next2_O, next3_O
            group = step * 4 + 4  # prefetched by hand: Triton does not pipeline loads of two bytes
            next0_O, next1_O = _scales_at(scales_O, mask_O, group, num_groups), _scales_at(scales_O, mask_O, group + 1, num_groups)
            next2_O, next3_O = _scales_at(scales_O, mask_O, group + 2, num_groups), _scales_at(scales_O, mask_O, group + 3, num_groups)
            first_B, second_B = step * 32 + words_B, step * 32 + 16 + words_B
            pairs0_OB = tl.load(numbers_O[:, None] + first_B[None, :], mask=mask_O[:, None], other=0)
            pairs1_OB = tl.load(numbers_O[:, None] + second_B[None, :], mask=mask_O[:, None] & (second_B < row_size)[None, :], other=0)
            x0_BR = _rows_at(x_R, real_R, step * 128 + bytes_B, in_size)
            x1_BR = _rows_at(x_R, real_R, step * 128 + 32 + bytes_B, in_size)
            x2_BR = _rows_at(x_R, real_R, step * 128 + 64 + bytes_B, in_size)
            x3_BR = _rows_at(x_R, real_R, step * 128 + 96 + bytes_B, in_size)
            number0_OB, number1_OB = _of_int4(pairs0_OB, FAST, x.dtype.element_ty)
            number2_OB, number3_OB = _of_int4(pairs1_OB, FAST, x.dtype.element_ty)
            product0_OR = tl.dot(number0_OB, x0_BR, input_precision=PRECISION)
            product1_OR = tl.dot(number1_OB, x1_BR, input_precision=PRECISION)
            product2_OR = tl.dot(number2_OB, x2_BR, input_precision=PRECISION)
            product3_OR = tl.dot(number3_OB, x3_BR, input_precision=PRECISION)
            sum_OR += product0_OR * scale0_O.to(tl.float32)[:, None]
            sum_OR += product1_OR * scale1_O.to(tl.float32)[:, None]
            sum_OR += product2_OR * scale2_O.to(tl.float32)[:, None]
            sum_OR += product3_OR * scale3_O.to(tl.float32)[:, None]
    else:
        dims_D = tl.arange(0, DEPTH)
        num_steps = tl.cdiv(row_size, DEPTH // 2 if KIND == "int8" else DEPTH)
        per_part = tl.cdiv(num_steps, num_parts)
        first = part * per_part
        last = tl.minimum(first + per_part, num_steps)
        if KIND == "int8":
            scales_O = scales + columns_O.to(tl.int64) * num_groups
            next_O, pairs_B = _scales_at(scales_O, mask_O, first, num_groups), tl.arange(0, DEPTH // 2)
            for step in range(first, last):
                scale_O = next_O
                next_O = _scales_at(scales_O, mask_O, step + 1, num_groups)
                pairs_OB = tl.load(numbers_O[:, None] + (step * (DEPTH // 2) + pairs_B)[None, :], mask=mask_O[:, None], other=0)
                x_DR = _rows_at(x_R, real_R, step * DEPTH + dims_D, in_size)
                product_OR = tl.dot(_of_int8(pairs_OB, FAST, x.dtype.element_ty), x_DR, input_precision=PRECISION)
                sum_OR += product_OR * scale_O.to(tl.float32)[:, None]
        else:
            for step in range(first, last):
                at_D = step * DEPTH + dims_D
                number_OD = tl.load(numbers_O[:, None] + at_D[None, :], mask=mask_O[:, None] & (at_D < row_size)[None, :], other=0.0)
                x_DR = _rows_at(x_R, real_R, at_D, in_size)
                if KIND == "fp8":
                    sum_OR = tl.dot(number_OD, x_DR, acc=sum_OR, max_num_imprecise_acc=FP8_ACCUMULATION)
                else:
                    sum_OR = tl.dot(number_OD, x_DR, acc=sum_OR, input_precision=PRECISION)
    if KIND == "fp8":
        row_scale_R = tl.load(x_scales + row_R, mask=real_R, other=0.0)
        sum_OR = sum_OR * tl.load(scales + columns_O, mask=mask_O, other=0.0)[:, None] * row_scale_R[None, :]
    place_OR = row_R[None, :] * out_size + columns_O[:, None]
    if WHOLE:
        sum_OR += tl.load(bias + columns_O, mask=mask_O & (has_bias > 0), other=0.0).to(tl.float32)[:, None]
    else:
        place_OR += part.to(tl.int64) * num_rows * out_size
    tl.store(out + place_OR, sum_OR.to(out.dtype.element_ty), mask=real_R[None, :] & mask_O[:, None])


@quick
@triton.jit(do_not_specialize=["num_rows", "has_bias"])
def split_k_sum_kernel(parts, bias, out, num_rows, out_size, has_bias, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the partial results of split-K, always in the same order."""
    row = tl.program_id(1).to(tl.int64)
    columns_O = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_O = columns_O < out_size
    sum_O = tl.load(bias + columns_O, mask=mask_O & (has_bias > 0), other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        sum_O += tl.load(parts + (part * num_rows.to(tl.int64) + row) * out_size + columns_O, mask=mask_O, other=0.0)
    tl.store(out + row * out_size + columns_O, sum_O.to(out.dtype.element_ty), mask=mask_O)
