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


@triton.jit
def _in_lanes(loaded_XYJ):
    """(X, Y, V, I)"""
    return tl.reshape(loaded_XYJ, (loaded_XYJ.shape[0], loaded_XYJ.shape[1], loaded_XYJ.shape[2] // IN_LANE, IN_LANE))


@triton.jit
def _rows_in_lanes(x_1R1, features_11J, in_size):
    """(1, R, V, I) in float32"""
    return _in_lanes(tl.load(x_1R1 + features_11J, mask=features_11J < in_size, other=0.0)).to(tl.float32)


@triton.jit
def column_sums(
    x, numbers, scales, column_C, is_output_C, in_size, stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(C, R) in float32: all rows times some outputs. ``stride``: elements (int4: bytes) of one output, with padding. The first weights are
    loaded before the input is ready (PDL), and later ones one iteration ahead of their use.

    Weights and rows are loaded along one axis of V I neighbours (J), I at a time: then each thread has the same lanes of both. Had they
    axes of their own for lanes and columns, Triton would choose which to spread over threads, for each tensor by itself, and move the
    weights through shared memory (3.6 and 3.7.1 choose differently).
    """
    column_C11, is_output_C11 = column_C[:, None, None], is_output_C[:, None, None]
    lane_11V = tl.arange(0, LANES)[None, None, :] * IN_LANE
    offset_11J = tl.max_contiguous(tl.arange(0, LANES * IN_LANE)[None, None, :], (1, 1, IN_LANE))
    at_C1J = numbers + column_C11.to(tl.int64) * stride + offset_11J
    ahead_C1J = tl.load(at_C1J, mask=is_output_C11 & (offset_11J < stride), other=0.0)
    if KIND == "int8":
        scales_C11 = scales + column_C11.to(tl.int64) * (stride // 128)
        scale_ahead_C1V = tl.load(scales_C11 + lane_11V // 128, mask=is_output_C11 & (lane_11V < stride), other=0.0)
    elif KIND == "int4_zeros":
        scales_C11 = scales + column_C11.to(tl.int64) * (stride // 64)
        scale_ahead_C1V = tl.load(scales_C11 + lane_11V // 64, mask=is_output_C11 & (lane_11V < stride), other=0)
    elif KIND == "int4":
        scales_C11 = scales + column_C11.to(tl.int64) * (stride // 16)
        scale_ahead_C1V = tl.load(scales_C11 + lane_11V // 32 * 2, mask=is_output_C11 & (lane_11V < stride), other=0.0)
        upper_ahead_C1V = tl.load(scales_C11 + lane_11V // 32 * 2 + 1, mask=is_output_C11 & (lane_11V < stride), other=0.0)
    wait_for_previous(PDL)
    x_1R1 = x + tl.arange(0, ROWS)[None, :, None] * in_size
    sum_CRV = tl.zeros([column_C.shape[0], ROWS, LANES], tl.float32)
    for start in range(0, stride, LANES * IN_LANE):
        next_start = start + LANES * IN_LANE
        now_C1VI = _in_lanes(ahead_C1J)
        ahead_C1J = tl.load(at_C1J + next_start, mask=is_output_C11 & (next_start + offset_11J < stride), other=0.0)
        if KIND == "int4":  # the low nibble of a byte belongs to one group and the high nibble to the next
            scale_C1V, upper_C1V, groups_11V = scale_ahead_C1V, upper_ahead_C1V, (next_start + lane_11V) // 32 * 2
            is_scale_C1V = is_output_C11 & (next_start + lane_11V < stride)
            scale_ahead_C1V = tl.load(scales_C11 + groups_11V, mask=is_scale_C1V, other=0.0)
            upper_ahead_C1V = tl.load(scales_C11 + groups_11V + 1, mask=is_scale_C1V, other=0.0)
            dim_11J = tl.max_contiguous((start + offset_11J) // 32 * 64 + (start + offset_11J) % 32, (1, 1, IN_LANE))
            x_1RVI = _rows_in_lanes(x_1R1, dim_11J, in_size)
            sum_CRV += tl.sum(_nibble(now_C1VI, 0) * x_1RVI, axis=3) * scale_C1V.to(tl.float32)
            x_1RVI = _rows_in_lanes(x_1R1, dim_11J + 32, in_size)
            sum_CRV += tl.sum(_nibble(now_C1VI, 1) * x_1RVI, axis=3) * upper_C1V.to(tl.float32)
        elif KIND == "int4_zeros":
            word_C1V, next_11V = scale_ahead_C1V, next_start + lane_11V
            scale_ahead_C1V = tl.load(scales_C11 + next_11V // 64, mask=is_output_C11 & (next_11V < stride), other=0)
            zero_C1V1 = group_zero(word_C1V)[:, :, :, None]
            dim_11J = tl.max_contiguous((start + offset_11J) // 32 * 64 + (start + offset_11J) % 32, (1, 1, IN_LANE))
            x_1RVI = _rows_in_lanes(x_1R1, dim_11J, in_size)
            here_CRV = tl.sum(_nibble_minus_zero(now_C1VI, 0, zero_C1V1) * x_1RVI, axis=3)
            x_1RVI = _rows_in_lanes(x_1R1, dim_11J + 32, in_size)
            here_CRV += tl.sum(_nibble_minus_zero(now_C1VI, 1, zero_C1V1) * x_1RVI, axis=3)
            sum_CRV += here_CRV * group_scale(word_C1V)
        else:
            here_CRV = tl.sum(now_C1VI.to(tl.float32) * _rows_in_lanes(x_1R1, start + offset_11J, in_size), axis=3)
            if KIND == "int8":
                here_CRV *= scale_ahead_C1V.to(tl.float32)
                next_11V = next_start + lane_11V
                scale_ahead_C1V = tl.load(scales_C11 + next_11V // 128, mask=is_output_C11 & (next_11V < stride), other=0.0)
            sum_CRV += here_CRV
    return tl.sum(sum_CRV, axis=2)


@quick
@triton.jit(do_not_specialize=["has_bias"])
def _gemv_kernel(
    x, numbers, scales, bias, out, in_size, stride, out_size, has_bias,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows."""
    launch_dependents(PDL)
    column_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_output_C = column_C < out_size
    sum_CR = column_sums(x, numbers, scales, column_C, is_output_C, in_size, stride, KIND, ROWS, LANES, PDL)
    sum_CR += tl.load(bias + column_C, mask=is_output_C & (has_bias > 0), other=0.0).to(tl.float32)[:, None]
    place_CR = out + tl.arange(0, ROWS)[None, :] * out_size + column_C[:, None]
    tl.store(place_CR, sum_CR.to(out.dtype.element_ty), mask=is_output_C[:, None])


def multiply(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None, otherwise: Callable[[], Tensor]) -> Tensor:
    """(T, N): at most `parallel.weight_format.MAX_GEMV_ROWS` rows times a plain matrix ``weight``, or ``numbers`` and ``scales`` of
    `parallel.quantised_format`. Calls ``otherwise`` instead if that was measured to be faster. The references are
    `torch.nn.functional.linear` and `parallel.quantised_format.multiply_reference`."""
    kind, numbers = kind_and_numbers(tensors)
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


def kind_and_numbers(tensors: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """A matrix's KIND in these kernels, and its tensor (N, padded K)."""
    return ("plain", tensors["weight"]) if "weight" in tensors else (kind_of(tensors), tensors["numbers"])


def lanes(tile: Tile) -> int:
    """Number of partial sums per row in a program, of `IN_LANE` neighbours each: ``num_stages`` for each of its threads."""
    return 32 * tile.num_warps * tile.num_stages
