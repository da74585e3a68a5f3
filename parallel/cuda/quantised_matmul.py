"""Products with matrices quantised to 8 or 4 bits (`parallel.quantised_format`). T rows, K input features, N outputs."""

import logging
from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda import gemv
from parallel.cuda.autotune import Tile, autotuner_for, bucket_name, candidates_for, row_bucket
from parallel.cuda.matmul import DEPTH, INT4_GROUP, matmul_tile, tile_coordinates
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2
from parallel.cuda.swap_ab import INT8_GROUP, SWAP_AB_DEPTH, split_k_sum_kernel, swap_ab_kernel
from parallel.cuda.zero_points import ZERO_POINT_GROUP, group_scale, group_zero
from parallel.quantisation import FP8, FP8_MAX
from parallel.quantised_format import Kind, kind_of
from parallel.weight_format import MAX_GEMV_ROWS

logger = logging.getLogger(__name__)

FP8_BLOCK = 32768
"""Most features of a row that a program quantises at a time. Large, as quantising a single row is bound by memory latency."""
PER_WARP = 1024
SUM_BLOCK, UNPACK_BLOCK = 512, 2048
ROWWISE_CAPABILITY = (9, 0)
DEQUANTISED_BYTES = 256 << 20
"""Size of the dequantised block of a matrix that cuBLAS multiplies at a time."""


@quick
@triton.jit
def _quantise_fp8_kernel(x, numbers, scales, width, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Quantises one row to FP8, its largest magnitude becoming `FP8_MAX`. The row is read twice, the second time from cache."""
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
def _matmul_kernel(
    x, x_scales, numbers, scales, bias, out, num_rows, in_size, padded_in_size, out_size, has_bias, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows, a block of outputs."""
    tile, column_tile = tile_coordinates(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(out_size, COLUMNS))
    row_R = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns_O = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_R, mask_O = row_R < num_rows, columns_O < out_size
    sum_RO = matmul_tile(
        x, x_scales, numbers, scales, row_R, real_R, columns_O, mask_O, in_size, padded_in_size, KIND, ROWS, COLUMNS, DEPTH, PRECISION
    )
    sum_RO += tl.load(bias + columns_O, mask=mask_O & (has_bias > 0), other=0.0).to(tl.float32)[None, :]
    offset_RO = row_R[:, None] * out_size + columns_O[None, :]
    tl.store(out + offset_RO, sum_RO.to(out.dtype.element_ty), mask=real_R[:, None] & mask_O[None, :])


def quantise_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (T, K) and their scales (T, float32); the reference is `parallel.quantisation.quantise_fp8`."""
    x_TK = x_TK.contiguous()
    numbers_TK = torch.empty_like(x_TK, dtype=FP8)
    scales_T = x_TK.new_empty(x_TK.shape[0], dtype=torch.float32)
    if x_TK.shape[0]:
        block = min(next_power_of_2(x_TK.shape[1]), FP8_BLOCK)
        _quantise_fp8_kernel[(x_TK.shape[0],)](
            x_TK, numbers_TK, scales_T, x_TK.shape[1], MOST=FP8_MAX, BLOCK=block, num_warps=max(4, block // PER_WARP)
        )
    return numbers_TK, scales_T


@quick
@triton.jit(do_not_specialize=["first", "num_groups"])
def _dequantise_kernel(numbers, scales, out, first, in_size, row_size, num_groups, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Dequantises a block of bytes of one row. Each number times its scale is rounded once to the dtype of ``out``."""
    row = tl.program_id(0).to(tl.int64)
    indices_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_B = indices_B < row_size
    number_B = tl.load(numbers + (first + row) * row_size + indices_B, mask=mask_B, other=0)
    scales, out = scales + (first + row) * num_groups, out + row * in_size
    if KIND == "int4":
        group_B = indices_B // INT4_GROUP * 2
        dims_B = indices_B // INT4_GROUP * (2 * INT4_GROUP) + indices_B % INT4_GROUP
        number_B = number_B.to(tl.int32)
        low_B = ((number_B & 15) - 8).to(tl.float32) * tl.load(scales + group_B, mask=mask_B, other=0.0).to(tl.float32)
        high_B = ((number_B >> 4) - 8).to(tl.float32) * tl.load(scales + group_B + 1, mask=mask_B, other=0.0).to(tl.float32)
        tl.store(out + dims_B, low_B.to(out.dtype.element_ty), mask=dims_B < in_size)
        tl.store(out + dims_B + INT4_GROUP, high_B.to(out.dtype.element_ty), mask=dims_B + INT4_GROUP < in_size)
    elif KIND == "int4_zeros":
        dims_B = indices_B // INT4_GROUP * (2 * INT4_GROUP) + indices_B % INT4_GROUP
        word_B, number_B = tl.load(scales + dims_B // ZERO_POINT_GROUP, mask=mask_B, other=0), number_B.to(tl.int32)
        low_B = ((number_B & 15) - group_zero(word_B)).to(tl.float32) * group_scale(word_B)
        high_B = ((number_B >> 4) - group_zero(word_B)).to(tl.float32) * group_scale(word_B)
        tl.store(out + dims_B, low_B.to(out.dtype.element_ty), mask=dims_B < in_size)
        tl.store(out + dims_B + INT4_GROUP, high_B.to(out.dtype.element_ty), mask=dims_B + INT4_GROUP < in_size)
    else:
        scale_B = tl.load(scales + indices_B // INT8_GROUP, mask=mask_B, other=0.0).to(tl.float32)
        tl.store(out + indices_B, (number_B.to(tl.float32) * scale_B).to(out.dtype.element_ty), mask=indices_B < in_size)


def multiply(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None) -> Tensor:
    """(T, N) in the dtype of ``x``; the reference is `parallel.quantised_format.multiply_reference`."""
    if 0 < x_TK.shape[0] <= MAX_GEMV_ROWS and tensors["numbers"].shape[0]:
        return gemv.multiply(x_TK, tensors, bias_N, lambda: multiply_by_tensor_cores(x_TK, tensors, bias_N))
    return multiply_by_tensor_cores(x_TK, tensors, bias_N)


def multiply_by_tensor_cores(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None) -> Tensor:
    """As `multiply`, with tensor cores, for any number of rows."""
    kind, num_outputs = kind_of(tensors), tensors["numbers"].shape[0]
    num_rows, in_size = x_TK.shape
    if num_rows * num_outputs == 0:
        return x_TK.new_empty((num_rows, num_outputs))
    x, row_scales = quantise_rows(x_TK) if kind == "fp8" else (x_TK.contiguous(), tensors["scales"])

    def launch(tile: Tile) -> Tensor:
        return WAYS[tile.way](x, row_scales, tensors, bias_N, x_TK.dtype, tile)

    key, candidates = _choice(kind, x_TK.dtype, x_TK.device, in_size, num_outputs, row_bucket(num_rows))
    return launch(autotuner_for(x.device).best(key, candidates, launch))


@cache  # called for every product
def _choice(
    kind: Kind, dtype: torch.dtype, device: torch.device, in_size: int, num_outputs: int, most_rows: int | None
) -> tuple[str, tuple[Tile, ...]]:
    """The autotuner's key for a product, and the candidate tiles."""
    has_library = kind != "fp8" or _has_rowwise_fp8(device, dtype, in_size, num_outputs)
    key = f"{kind} by {dtype}, {in_size} to {num_outputs}, {bucket_name(most_rows)}"
    return key, candidates_for(kind, most_rows, has_library=has_library)


def _has_rowwise_fp8(device: torch.device, dtype: torch.dtype, in_size: int, num_outputs: int) -> bool:
    """cuBLAS supports row-wise FP8 scales from Hopper on, for multiples of 16 features and bfloat16 results."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < ROWWISE_CAPABILITY:
        return False
    return in_size % 16 == 0 and num_outputs % 16 == 0 and dtype == torch.bfloat16 and _takes_rowwise_fp8(device)


@cache
def _takes_rowwise_fp8(device: torch.device) -> bool:
    """Tested once, as it is the only candidate for many rows: if the device or torch rejects it, our kernel is used instead."""
    numbers, scales = torch.zeros(256, 256, device=device).to(FP8), torch.ones(256, 1, device=device)
    try:
        torch._scaled_mm(numbers, numbers.T, scale_a=scales, scale_b=scales.T, out_dtype=torch.bfloat16)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        logger.warning("FP8 is multiplied by our own kernel however many rows there are, as torch's refuses it: %s", error)
        return False
    return True


def _multiply_by_rows(
    x: Tensor, row_scales: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    kind, numbers, scales = kind_of(tensors), tensors["numbers"], tensors["scales"]
    (num_rows, in_size), num_outputs = x.shape, numbers.shape[0]
    out_TN = x.new_empty((num_rows, num_outputs), dtype=dtype)
    _matmul_kernel[(cdiv(num_rows, tile.rows) * cdiv(num_outputs, tile.columns),)](
        x, row_scales, numbers, scales, out_TN if bias_N is None else bias_N, out_TN,
        num_rows, in_size, padded_in_size(tensors), num_outputs, int(bias_N is not None),
        KIND=kind, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH[kind],
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out_TN


def _multiply_swapped(
    x: Tensor, row_scales: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    kind, numbers, scales = kind_of(tensors), tensors["numbers"], tensors["scales"]
    (num_rows, in_size), num_outputs = x.shape, numbers.shape[0]
    if kind != "fp8":
        numbers = numbers.view(torch.int16)
    out_TN = x.new_empty((num_rows, num_outputs), dtype=dtype)
    into = out_TN if tile.parts == 1 else x.new_empty((tile.parts, num_rows, num_outputs), dtype=torch.float32)
    bias = out_TN if bias_N is None else bias_N
    swap_ab_kernel[(cdiv(num_rows, tile.rows) * cdiv(num_outputs, tile.columns), tile.parts)](
        x, row_scales, numbers, scales, bias, into,
        num_rows, in_size, numbers.shape[1], scales.shape[-1], num_outputs, int(bias_N is not None), tile.parts,
        KIND=kind, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=SWAP_AB_DEPTH,
        FAST=kind != "fp8" and dtype == torch.bfloat16 and x.device.type == "cuda",
        PRECISION="ieee" if dtype == torch.float32 else "tf32", WHOLE=tile.parts == 1, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if tile.parts > 1:
        split_k_sum_kernel[(cdiv(num_outputs, SUM_BLOCK), num_rows)](
            into, bias, out_TN, num_rows, num_outputs, int(bias_N is not None), PARTS=tile.parts, BLOCK=SUM_BLOCK
        )
    return out_TN


def _multiply_by_library(
    x: Tensor, row_scales: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None, dtype: torch.dtype, _tile: Tile
) -> Tensor:
    """By cuBLAS. FP8 is multiplied directly, without fast accumulation, which uses few bits (with 29,568 features its error is three times
    that of rounding the result). int8 and int4 are dequantised to the dtype of ``x``, some outputs at a time."""
    numbers, scales = tensors["numbers"], tensors["scales"]
    if kind_of(tensors) == "fp8":
        return torch._scaled_mm(x, numbers.T, scale_a=row_scales.unsqueeze(1), scale_b=scales.unsqueeze(0), bias=bias_N, out_dtype=dtype)
    (num_rows, in_size), num_outputs = x.shape, numbers.shape[0]
    at_once = max(1, min(num_outputs, DEQUANTISED_BYTES // (in_size * x.itemsize)))
    at_once = cdiv(num_outputs, cdiv(num_outputs, at_once))
    out_TN, unpacked = x.new_empty((num_rows, num_outputs)), x.new_empty((at_once, in_size))
    for first in range(0, num_outputs, at_once):
        some_NK = dequantise_rows(tensors, first, unpacked[: num_outputs - first])
        into = out_TN[:, first : first + at_once]
        if bias_N is None:
            torch.mm(x, some_NK.T, out=into)
        else:
            torch.addmm(bias_N[first : first + at_once], x, some_NK.T, out=into)
    return out_TN


WAYS = {"rows": _multiply_by_rows, "swapped": _multiply_swapped, "library": _multiply_by_library}


def dequantise_rows(tensors: Mapping[str, Tensor], first: int, out: Tensor) -> Tensor:
    """Dequantise the matrix's rows from ``first`` on into ``out`` (R, K); the reference is `parallel.quantised_format.unpack`."""
    numbers, scales = tensors["numbers"], tensors["scales"]
    _dequantise_kernel[(out.shape[0], cdiv(numbers.shape[1], UNPACK_BLOCK))](
        numbers, scales, out, first, out.shape[1], numbers.shape[1], scales.shape[1], KIND=kind_of(tensors), BLOCK=UNPACK_BLOCK
    )
    return out


def padded_in_size(tensors: Mapping[str, Tensor]) -> int:
    """Input features of the matrix including zero padding."""
    width = tensors["numbers"].shape[1]
    return 2 * width if tensors["numbers"].dtype == torch.uint8 else width
