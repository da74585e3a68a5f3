"""GEMV: products of one or two rows, which are bound by reading the matrix. Computed in float32 without tensor cores.

T rows, K input features, N outputs; in a program R rows, C outputs, and V lanes of I neighbouring input features each. The order of
summation depends on the tile, so results of two tiles may differ by float32 rounding.
"""

from collections.abc import Callable, Mapping

import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.autotune import LIBRARY, Tile, autotuner_for
from parallel.cuda.dependent_launch import launch_dependents, pdl_options, wait_for_previous
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv
from parallel.cuda.zero_points import group_scale, group_zero
from parallel.quantised_format import kind_of

GEMV_ROWS = (1, 2)
"""Supported numbers of rows. With more rows a product is no longer memory-bound, and tensor cores are faster."""
CANDIDATES = {
    rows: tuple(Tile(rows, *cut, way="few") for cut in cuts)
    for rows, cuts in {1: ((2, 2, 1), (4, 4, 1), (2, 4, 1), (4, 1, 2)), 2: ((2, 2, 1), (2, 4, 1), (4, 1, 2))}.items()
}
"""Candidate tiles by rows: columns, warps, and loads per thread and column at a time. Never used without measuring."""
IN_LANE = tl.constexpr(8)
"""Neighbouring input features that a thread loads at once and sums first."""


@triton.jit
def _nibble(pairs, nibble: tl.constexpr):
    """int4 numbers from the low or high nibbles of bytes."""
    return (((pairs >> 4 * nibble) & 15).to(tl.int8) - 8).to(tl.float32)


@triton.jit
def _nibble_minus_zero(pairs, nibble: tl.constexpr, zero):
    """The same, minus a zero point."""
    return (((pairs >> 4 * nibble) & 15).to(tl.int8) - zero.to(tl.int8)).to(tl.float32)


@quick
@triton.jit(do_not_specialize=["has_bias"])
def _gemv_kernel(
    x, numbers, scales, bias, out, in_size, stride, out_size, has_bias,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows. ``stride``: elements (int4: bytes) of one output, with padding. The first weights are loaded before the
    input is ready (PDL), and later ones one iteration ahead of their use."""
    launch_dependents(PDL)
    column_11C1 = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :, None]
    row_1R11 = tl.arange(0, ROWS)[None, :, None, None]
    lane_V111 = tl.arange(0, LANES)[:, None, None, None] * IN_LANE
    offset_V11I = lane_V111 + tl.arange(0, IN_LANE)[None, None, None, :]
    is_output_11C1 = column_11C1 < out_size
    at_V1CI = numbers + column_11C1.to(tl.int64) * stride + offset_V11I
    ahead_V1CI = tl.load(at_V1CI, mask=is_output_11C1 & (offset_V11I < stride), other=0.0)
    if KIND == "int8":
        scales_11C1 = scales + column_11C1.to(tl.int64) * (stride // 128)
        scale_ahead_V1C1 = tl.load(scales_11C1 + lane_V111 // 128, mask=is_output_11C1 & (lane_V111 < stride), other=0.0)
    elif KIND == "int4_zeros":
        scales_11C1 = scales + column_11C1.to(tl.int64) * (stride // 64)
        scale_ahead_V1C1 = tl.load(scales_11C1 + lane_V111 // 64, mask=is_output_11C1 & (lane_V111 < stride), other=0)
    elif KIND == "int4":
        scales_11C1 = scales + column_11C1.to(tl.int64) * (stride // 16)
        scale_ahead_V1C1 = tl.load(scales_11C1 + lane_V111 // 32 * 2, mask=is_output_11C1 & (lane_V111 < stride), other=0.0)
        upper_ahead_V1C1 = tl.load(scales_11C1 + lane_V111 // 32 * 2 + 1, mask=is_output_11C1 & (lane_V111 < stride), other=0.0)
    wait_for_previous(PDL)
    x_1R11 = x + row_1R11 * in_size
    sum_VRC1 = tl.zeros([LANES, ROWS, COLUMNS, 1], tl.float32)
    for start in range(0, stride, LANES * IN_LANE):
        next_start = start + LANES * IN_LANE
        now_V1CI = ahead_V1CI
        ahead_V1CI = tl.load(at_V1CI + next_start, mask=is_output_11C1 & (next_start + offset_V11I < stride), other=0.0)
        if KIND == "int4":  # the low nibble of a byte belongs to one group and the high nibble to the next
            scale_V1C1, upper_V1C1, groups_V111 = scale_ahead_V1C1, upper_ahead_V1C1, (next_start + lane_V111) // 32 * 2
            is_scale_V1C1 = is_output_11C1 & (next_start + lane_V111 < stride)
            scale_ahead_V1C1 = tl.load(scales_11C1 + groups_V111, mask=is_scale_V1C1, other=0.0)
            upper_ahead_V1C1 = tl.load(scales_11C1 + groups_V111 + 1, mask=is_scale_V1C1, other=0.0)
            dim_V11I = (start + offset_V11I) // 32 * 64 + (start + offset_V11I) % 32
            x_VR1I = tl.load(x_1R11 + dim_V11I, mask=dim_V11I < in_size, other=0.0).to(tl.float32)
            sum_VRC1 += tl.sum(_nibble(now_V1CI, 0) * x_VR1I, axis=3, keep_dims=True) * scale_V1C1.to(tl.float32)
            dim_V11I += 32
            x_VR1I = tl.load(x_1R11 + dim_V11I, mask=dim_V11I < in_size, other=0.0).to(tl.float32)
            sum_VRC1 += tl.sum(_nibble(now_V1CI, 1) * x_VR1I, axis=3, keep_dims=True) * upper_V1C1.to(tl.float32)
        elif KIND == "int4_zeros":
            word_V1C1, next_V111 = scale_ahead_V1C1, next_start + lane_V111
            scale_ahead_V1C1 = tl.load(scales_11C1 + next_V111 // 64, mask=is_output_11C1 & (next_V111 < stride), other=0)
            zero_V1C1, dim_V11I = group_zero(word_V1C1), (start + offset_V11I) // 32 * 64 + (start + offset_V11I) % 32
            x_VR1I = tl.load(x_1R11 + dim_V11I, mask=dim_V11I < in_size, other=0.0).to(tl.float32)
            here_VRC1 = tl.sum(_nibble_minus_zero(now_V1CI, 0, zero_V1C1) * x_VR1I, axis=3, keep_dims=True)
            dim_V11I += 32
            x_VR1I = tl.load(x_1R11 + dim_V11I, mask=dim_V11I < in_size, other=0.0).to(tl.float32)
            here_VRC1 += tl.sum(_nibble_minus_zero(now_V1CI, 1, zero_V1C1) * x_VR1I, axis=3, keep_dims=True)
            sum_VRC1 += here_VRC1 * group_scale(word_V1C1)
        else:
            dim_V11I = start + offset_V11I
            x_VR1I = tl.load(x_1R11 + dim_V11I, mask=dim_V11I < in_size, other=0.0).to(tl.float32)
            here_VRC1 = tl.sum(now_V1CI.to(tl.float32) * x_VR1I, axis=3, keep_dims=True)
            if KIND == "int8":
                here_VRC1 *= scale_ahead_V1C1.to(tl.float32)
                next_V111 = next_start + lane_V111
                scale_ahead_V1C1 = tl.load(scales_11C1 + next_V111 // 128, mask=is_output_11C1 & (next_V111 < stride), other=0.0)
            sum_VRC1 += here_VRC1
    sum_1RC1 = tl.sum(sum_VRC1, axis=0, keep_dims=True)
    sum_1RC1 += tl.load(bias + column_11C1, mask=is_output_11C1 & (has_bias > 0), other=0.0).to(tl.float32)
    tl.store(out + row_1R11 * out_size + column_11C1, sum_1RC1.to(out.dtype.element_ty), mask=is_output_11C1)


def multiply(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None, otherwise: Callable[[], Tensor]) -> Tensor:
    """(T, N): at most `parallel.weight_format.MAX_GEMV_ROWS` rows times a plain matrix ``weight``, or ``numbers`` and ``scales`` of
    `parallel.quantised_format`. Calls ``otherwise`` instead if that was measured to be faster. The references are
    `torch.nn.functional.linear` and `parallel.quantised_format.multiply_reference`."""
    is_plain = "weight" in tensors
    kind, numbers = ("plain", tensors["weight"]) if is_plain else (kind_of(tensors), tensors["numbers"])
    (num_rows, in_size), (num_outputs, stride) = x_TK.shape, numbers.shape
    if kind == "fp8":
        return otherwise()  # tensor cores are faster even with one row: here both operands would have to be converted
    x_TK = x_TK.contiguous()

    def launch(tile: Tile) -> Tensor:
        if tile == LIBRARY:
            return otherwise()
        out_TN = x_TK.new_empty((num_rows, num_outputs))
        _gemv_kernel[(cdiv(num_outputs, tile.columns),)](
            x_TK, numbers, tensors.get("scales", numbers), out_TN if bias_N is None else bias_N, out_TN,
            in_size, stride, num_outputs, int(bias_N is not None),
            KIND=kind, ROWS=num_rows, COLUMNS=tile.columns, LANES=lanes(tile),
            num_warps=tile.num_warps, **pdl_options(num_rows, x_TK),
        )  # fmt: skip
        return out_TN

    key = f"{kind} by {x_TK.dtype}, {in_size} to {num_outputs}, up to {num_rows} rows"
    return launch(autotuner_for(x_TK.device).best(key, (LIBRARY, *CANDIDATES[num_rows]), launch))


def lanes(tile: Tile) -> int:
    """Number of partial sums per row in a program, of `IN_LANE` neighbours each: ``num_stages`` for each of its threads."""
    return 32 * tile.num_warps * tile.num_stages
