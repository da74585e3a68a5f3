"""Grouped GEMM: for each routed expert, one matrix product with the tokens that chose it, all experts in one launch.

N rows, A experts per row, E experts, R rows of a tile, O output features.

Each expert's weights stay in tensors of their own, so that experts can move between ranks; the kernel finds them through a table of
addresses. Assignments come sorted by expert and cut into tiles (`parallel.cuda.expert_sort`). The launch depends on no token count, so
it can be captured in a CUDA graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.autotune import Tile, autotuner_for
from parallel.cuda.expert_sort import TILE_ROWS, WIDE_TILE_ROWS, WIDEST_TILE_ROWS, SortedAssignments
from parallel.cuda.matmul import DEPTH, matmul_tile, tile_coordinates
from parallel.cuda.quantised_matmul import padded_in_size, quantise_rows
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv
from parallel.quantised_format import kind_of

TILES = {
    TILE_ROWS: (Tile(16, 64), Tile(16, 32), Tile(16, 32, 2, 6), Tile(16, 64, 4, 6), Tile(16, 128), Tile(16, 128, 8, 3)),
    WIDE_TILE_ROWS: (Tile(64, 128), Tile(64, 64), Tile(64, 128, 4, 3), Tile(64, 128, 8, 3), Tile(64, 256, 8, 3)),
    WIDEST_TILE_ROWS: (Tile(128, 128, 8, 3), Tile(128, 256, 8, 3), Tile(128, 64, 4, 3)),
}
"""Candidate tiles by rows of a tile; the first is used if nothing was measured."""


@dataclass(frozen=True)
class ExpertMatrices:
    """One matrix of each expert, all of the same shape and dtype. They must be kept alive elsewhere: this holds only their addresses."""

    kind: Literal["plain", "int8", "int4", "int4_zeros", "fp8"]
    numbers_E: Tensor
    """int64: address of each expert's numbers"""
    scales_E: Tensor
    """int64: address of each expert's scales; unused for plain matrices"""
    out_size: int
    padded_in_size: int
    """Input features including zero padding; see `parallel.quantised_format`."""


def expert_matrices(experts: Sequence[Mapping[str, Tensor]], device: torch.device) -> ExpertMatrices:
    """From the tensors of a plain format (``weight``) or of `parallel.quantised_format.QuantisedFormat` (``numbers``, ``scales``)."""
    first = experts[0]
    if "weight" in first:
        addresses = tensor_addresses([expert["weight"] for expert in experts], device)
        return ExpertMatrices("plain", addresses, addresses, *first["weight"].shape)
    numbers, scales = (tensor_addresses([expert[name] for expert in experts], device) for name in ("numbers", "scales"))
    return ExpertMatrices(kind_of(first), numbers, scales, first["numbers"].shape[0], padded_in_size(first))


def tensor_addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64: address of each tensor. They must be contiguous, equal in shape and dtype, and aligned to 16 bytes, as new tensors are."""
    assert all(tensor.is_contiguous() and tensor.shape == tensors[0].shape and tensor.dtype == tensors[0].dtype for tensor in tensors)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64).to(device)


@quick
@triton.jit(do_not_specialize=["num_assigned", "num_tiles"])  # else a step of another number of rows may wait for a compiler
def _grouped_gemm_kernel(
    x, x_scales, numbers_of, scales_of, out, row_weights, assignments, experts,
    num_assigned, num_tiles, rows_per_source, in_size, padded_in_size, out_size,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of assignments, one block of output features: ``out[a] = x[a // rows_per_source] @ W.T`` (times the weight of a)."""
    tile, column_tile = tile_coordinates(tl.program_id(0), num_tiles, tl.cdiv(out_size, COLUMNS))
    expert = tl.load(experts + tile)
    if expert >= 0:
        numbers = tl.load(numbers_of + expert)
        scales = tl.load(scales_of + expert)
        if KIND == "int4" or KIND == "int4_zeros":
            numbers = numbers.to(tl.pointer_type(tl.uint8))
        elif KIND == "int8":
            numbers = numbers.to(tl.pointer_type(tl.int8))
        else:
            numbers = numbers.to(tl.pointer_type(x.dtype.element_ty))
        if KIND == "int4_zeros":
            scales = scales.to(tl.pointer_type(tl.int32))
        else:
            scales = scales.to(tl.pointer_type(tl.float32)) if KIND == "fp8" else scales.to(tl.pointer_type(tl.float16))
        # Triton cannot know the alignment of an address from a table: without this it would not vectorise or pipeline the loads.
        numbers, scales = tl.multiple_of(numbers, 16), tl.multiple_of(scales, 16)
        assignment_R = tl.load(assignments + tile * ROWS + tl.arange(0, ROWS))
        real_R = assignment_R < num_assigned
        source_R = (assignment_R // rows_per_source).to(tl.int64)
        columns_O = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        mask_O = columns_O < out_size
        sum_RO = matmul_tile(
            x,
            x_scales,
            numbers,
            scales,
            source_R,
            real_R,
            columns_O,
            mask_O,
            in_size,
            padded_in_size,
            KIND,
            ROWS,
            COLUMNS,
            DEPTH,
            PRECISION,
        )
        if WEIGHTED:  # rounded before and after, as in transformers
            weight_R = tl.load(row_weights + assignment_R, mask=real_R, other=0.0).to(tl.float32)
            sum_RO = sum_RO.to(out.dtype.element_ty).to(tl.float32) * weight_R[:, None]
        result_RO = sum_RO.to(out.dtype.element_ty)
        offset_RO = assignment_R.to(tl.int64)[:, None] * out_size + columns_O[None, :]
        tl.store(out + offset_RO, result_RO, mask=real_R[:, None] & mask_O[None, :])


def grouped_gemm(
    x: Tensor,
    experts: ExpertMatrices,
    by_expert: SortedAssignments,
    *,
    rows_per_source: int,
    num_assigned: int,
    weights: Tensor | None = None,
) -> Tensor:
    """(N * A, O): for each assignment the product of its expert and its row of ``x``; uninitialised if it is computed elsewhere.

    ``rows_per_source`` assignments share a row of ``x`` (A for the first product, 1 for the second). ``weights`` (N * A) multiply the
    results.
    """
    out = x.new_empty((num_assigned, experts.out_size))
    rows, row_scales = quantise_rows(x) if experts.kind == "fp8" else (x, out)
    num_tiles = by_expert.expert_X.shape[0]

    def launch(tile: Tile) -> None:
        _grouped_gemm_kernel[(num_tiles * cdiv(experts.out_size, tile.columns),)](
            rows, row_scales, experts.numbers_E, experts.scales_E, out, out if weights is None else weights,
            by_expert.assignment_Y, by_expert.expert_X, num_assigned, num_tiles, rows_per_source,
            x.shape[1], experts.padded_in_size, experts.out_size,
            KIND=experts.kind, WEIGHTED=weights is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH[experts.kind],
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    key = f"experts {experts.kind} by {x.dtype}, {x.shape[1]} to {experts.out_size}, {by_expert.tile_rows} rows of each"
    launch(autotuner_for(x.device).best(key, TILES[by_expert.tile_rows], launch))
    return out
