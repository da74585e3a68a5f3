"""Paged attention for decoding: one new token per sequence, or a few (speculative decoding). Reference: `model.attention.reference`.

S sequences, F of them with a few new tokens, T tokens, H query heads, G KV heads, P rows: the query heads of one KV head (padded to a power
of two) for each new token; K head width, N blocks, B tokens per block, M most blocks of a sequence, C parts of a context, L positions
read at a time.

Long contexts of few sequences are split into parts that are computed in parallel and merged (split-KV, Flash-Decoding). A draft token costs
next to nothing, as keys and values are read once for all new tokens of a sequence.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.dependent_launch import launch_dependents, pdl_options, wait_for_previous
from parallel.cuda.paged_attention import (
    HOPPER_SHARED_BYTES,
    LOG2_E,
    MASKED,
    HeadGroups,
    dot_precision,
    kv_offsets,
    load_blocks,
    online_softmax,
    padded_size,
    scaled_to_float16,
)
from parallel.cuda.quick_launch import quick
from parallel.quantisation import FP8


@triton.jit
def _of_pairs(pairs, IN_ASSEMBLY: tl.constexpr):
    """The two e4m3 numbers in each 16-bit word, as float16. IN_ASSEMBLY takes three instructions for two words instead of about ten; the
    other variant is for the interpreter."""
    if IN_ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 sorted;
                .reg .b16 lows, highs;
                prmt.b32 sorted, $2, $2, 0x3120;
                mov.b32 {lows, highs}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, lows;
                cvt.rn.f16x2.e4m3x2 $1, highs;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return low, high


@quick
@triton.jit(
    do_not_specialize=["table_stride", "parts"], do_not_specialize_on_alignment=["lengths", "sequences", "query_starts"]
)  # else other steps wait for a compiler
def _decode_kernel(
    q, keys, values, out, part_out, part_lse, tables, lengths, first_head, num_heads_of, sequences, query_starts,
    scale_log2, table_stride, q_token_stride, block_stride, token_stride, head_stride, num_heads, parts,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, IN_PAIRS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
    TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One sequence's newest token, one KV head, one part of the context. Programs whose part begins past its end return at once.

    IN_PAIRS: keys and values are FP8, read as 16-bit words of two neighbours, as tensor cores need them, and multiplied in float16.

    TOKENS > 1: up to so many new tokens of one of the ``sequences``: row r is token r // n, head r % n, as in prefill.
    """
    launch_dependents(PDL)
    wait_for_previous(PDL)
    number, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = number
    if TOKENS > 1:
        sequence = tl.load(sequences + number)
    length = tl.load(lengths + sequence)
    tiles_per_part = tl.cdiv(tl.cdiv(length, TILE), parts)
    start = part * tiles_per_part * TILE
    if (part > 0) & (start >= length):
        return
    stop = tl.minimum(start + tiles_per_part * TILE, length)
    first, count = tl.load(first_head + kv_head), tl.load(num_heads_of + kv_head)
    WIDTH: tl.constexpr = HEAD_DIM // 2 if IN_PAIRS else HEAD_DIM
    PADDED_WIDTH: tl.constexpr = PADDED_DIM // 2 if IN_PAIRS else PADDED_DIM
    rows_P, dims_W, dims_K = tl.arange(0, PADDED_ROWS), tl.arange(0, PADDED_WIDTH), tl.arange(0, PADDED_DIM)
    if TOKENS > 1:
        query_start = tl.load(query_starts + sequence)
        num_new = tl.load(query_starts + sequence + 1) - query_start
        token_P, head_P = rows_P // count, first + rows_P % count
        there_P, last_seen_P = token_P < num_new, length - num_new + token_P
        query_P = (query_start + token_P).to(tl.int64)
        q_P = q + query_P * q_token_stride + head_P * HEAD_DIM
        row_P, part_row_P = query_P * num_heads + head_P, (number.to(tl.int64) * TOKENS + token_P) * num_heads + head_P
    else:
        there_P, head_P = rows_P < count, first + rows_P
        q_P = q + sequence.to(tl.int64) * q_token_stride + head_P * HEAD_DIM
        row_P = sequence.to(tl.int64) * num_heads + head_P
        part_row_P = row_P
    mask_PK = there_P[:, None] & (dims_K < HEAD_DIM)[None, :]
    mask_PW = there_P[:, None] & (dims_W < WIDTH)[None, :]
    if IN_PAIRS:
        q_PW = scaled_to_float16(tl.load(q_P[:, None] + 2 * dims_W[None, :], mask=mask_PW, other=0.0))
        odd_q_PW = scaled_to_float16(tl.load(q_P[:, None] + 2 * dims_W[None, :] + 1, mask=mask_PW, other=0.0))
        scale_log2 *= 16.0
    else:
        q_PW = tl.load(q_P[:, None] + dims_W[None, :], mask=mask_PW, other=0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    highest_P = tl.full([PADDED_ROWS], MASKED, tl.float32)
    sum_PL = tl.zeros([PADDED_ROWS, TILE], tl.float32)
    out_PW = tl.zeros([PADDED_ROWS, PADDED_WIDTH], tl.float32)
    odd_out_PW = tl.zeros([PADDED_ROWS, PADDED_WIDTH], tl.float32)
    keys += kv_head * head_stride
    values += kv_head * head_stride
    # Block numbers are loaded one tile ahead: if an address depends on a load of the same iteration, Triton pipelines only half as deep.
    block_L = load_blocks(table, start, stop, TILE, BLOCK_TOKENS)
    for tile in range(start, stop, TILE):
        offset_L = kv_offsets(block_L, tile, stop, block_stride, token_stride, TILE, BLOCK_TOKENS)
        keys_WL = tl.trans(tl.load(keys + offset_L[:, None] + dims_W[None, :], mask=(dims_W < WIDTH)[None, :]))
        values_LW = tl.load(values + offset_L[:, None] + dims_W[None, :], mask=(dims_W < WIDTH)[None, :])
        if IN_PAIRS:
            even_WL, odd_WL = _of_pairs(keys_WL, IN_ASSEMBLY)
            scores_PL = tl.dot(odd_q_PW, odd_WL, acc=tl.dot(q_PW, even_WL))
        else:
            scores_PL = tl.dot(q_PW, keys_WL.to(q_PW.dtype), input_precision=PRECISION)
        at_L = tile + tl.arange(0, TILE)
        if TOKENS > 1:  # a row with no visible position in this part gets a result whose weight in the merge is 0
            scores_PL = tl.where(at_L[None, :] <= last_seen_P[:, None], scores_PL, MASKED)
        else:
            scores_PL = tl.where((at_L < stop)[None, :], scores_PL, MASKED)
        highest_P, weights_PL, fade_P = online_softmax(scores_PL, highest_P, scale_log2)
        sum_PL = sum_PL * fade_P[:, None] + weights_PL
        out_PW = out_PW * fade_P[:, None]
        if IN_PAIRS:
            even_LW, odd_LW = _of_pairs(values_LW, IN_ASSEMBLY)
            out_PW = tl.dot(weights_PL.to(tl.float16), even_LW, acc=out_PW)
            odd_out_PW = tl.dot(weights_PL.to(tl.float16), odd_LW, acc=odd_out_PW * fade_P[:, None])
        else:
            out_PW = tl.dot(weights_PL.to(q_PW.dtype), values_LW.to(q_PW.dtype), acc=out_PW, input_precision=PRECISION)
        block_L = load_blocks(table, tile + TILE, stop, TILE, BLOCK_TOKENS)
    sum_P = tl.sum(sum_PL, axis=1)
    divisor_P = tl.where(sum_P > 0, sum_P, 1.0)
    out_PK = tl.interleave(out_PW, odd_out_PW) if IN_PAIRS else out_PW
    out_PK = out_PK / divisor_P[:, None]
    used = tl.cdiv(length, tl.maximum(tiles_per_part, 1) * TILE)
    if used <= 1:
        tl.store(out + row_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK.to(out.dtype.element_ty), mask=mask_PK)
    else:
        at_P = part_row_P * parts + part
        tl.store(part_out + at_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK, mask=mask_PK)
        tl.store(part_lse + at_P, highest_P + tl.log2(divisor_P), mask=there_P)


@quick
@triton.jit(do_not_specialize_on_alignment=["lengths", "sequences", "query_starts"])
def _merge_kernel(
    part_out, part_lse, out, lengths, sequences, query_starts, num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merges the parts of one query head of one new token by their log-sum-exp, if there are several.

    Parts that no program has written are loaded too and then masked, so that no load has to wait for the sequence's length."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    number, head = tl.program_id(0), tl.program_id(1)
    sequence = number
    row = number.to(tl.int64) * num_heads + head
    out_row = row
    if TOKENS > 1:
        sequence = tl.load(sequences + number // TOKENS)
        query = tl.load(query_starts + sequence) + number % TOKENS
        if query >= tl.load(query_starts + sequence + 1):
            return
        out_row = query.to(tl.int64) * num_heads + head
    parts_C, dims_K = tl.arange(0, PARTS), tl.arange(0, PADDED_DIM)
    length = tl.load(lengths + sequence)
    lse_C = tl.load(part_lse + row * PARTS + parts_C)
    offset_CK = (row * PARTS + parts_C)[:, None] * HEAD_DIM + dims_K[None, :]
    out_CK = tl.load(part_out + offset_CK, mask=(dims_K < HEAD_DIM)[None, :], other=0.0)
    used = tl.cdiv(length, tl.maximum(tl.cdiv(tl.cdiv(length, TILE), PARTS), 1) * TILE)
    is_used_C = (parts_C < used) & (used > 1)
    lse_C = tl.where(is_used_C, lse_C, MASKED)
    weight_C = tl.exp2(lse_C - tl.max(lse_C, axis=0))
    out_CK = tl.where(is_used_C[:, None], out_CK, 0.0)
    out_K = tl.sum(out_CK * weight_C[:, None], axis=0) / tl.sum(weight_C, axis=0)
    tl.store(out + out_row * HEAD_DIM + dims_K, out_K.to(out.dtype.element_ty), mask=(dims_K < HEAD_DIM) & (used > 1))


@dataclass(frozen=True)
class DecodeTile:
    """Tile configuration of the decode kernel."""

    positions: int
    """Positions read at a time."""
    num_warps: int
    num_stages: int


def decode(
    q_SHK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    heads: HeadGroups,
    out_SHK: Tensor,
    *,
    parts: int,
    tile: DecodeTile | None = None,
) -> None:
    """Attention of one new token per sequence into ``out_SHK``; a sequence of length 0 gets zeros.

    A context is split into at most ``parts`` (C, a power of two). The launch does not depend on lengths, so that it can be captured.
    """
    tile = tile or decode_tile(q_SHK.shape[2], keys_NBGK.dtype, parts)
    _launch(
        q_SHK, keys_NBGK, values_NBGK, tables_SM, lengths_S, heads, out_SHK, lengths_S, lengths_S,
        num_sequences=q_SHK.shape[0], tokens=1, rows=padded_size(heads.largest_group), parts=parts, tile=tile,
    )  # fmt: skip


def decode_multi_token(
    q_THK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    sequence_F: Tensor,
    query_starts: Tensor,
    heads: HeadGroups,
    out_THK: Tensor,
    *,
    parts: int,
    tile: DecodeTile | None = None,
) -> None:
    """As `decode`, for sequences ``sequence_F`` (int32) with at most `max_multi_tokens` new tokens each, the last ones of their contexts,
    with causal masking. ``query_starts`` (int32, S + 1) are offsets into T."""
    _launch(
        q_THK, keys_NBGK, values_NBGK, tables_SM, lengths_S, heads, out_THK, sequence_F, query_starts,
        num_sequences=sequence_F.shape[0], tokens=max_multi_tokens(heads), rows=FEW_ROWS, parts=parts,
        tile=tile or multi_token_tile(q_THK.shape[2], keys_NBGK.dtype),
    )  # fmt: skip


FEW_ROWS = 64
"""Rows of a program for a few new tokens: the minimum of Hopper's wgmma."""


def max_multi_tokens(heads: HeadGroups) -> int:
    """The most new tokens per sequence that `decode_multi_token` supports; 1 means that it cannot be used."""
    return min(FEW_ROWS // heads.largest_group, MULTI_TOKEN_LIMIT)


MULTI_TOKEN_LIMIT = 16


def _launch(
    q_THK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    heads: HeadGroups,
    out_THK: Tensor,
    sequences: Tensor,
    query_starts: Tensor,
    *,
    num_sequences: int,
    tokens: int,
    rows: int,
    parts: int,
    tile: DecodeTile,
) -> None:
    num_heads, head_dim = q_THK.shape[1:]
    in_pairs = keys_NBGK.dtype == FP8 and q_THK.dtype != torch.float32 and head_dim % 2 == 0
    if in_pairs:
        keys_NBGK, values_NBGK = keys_NBGK.view(torch.uint16), values_NBGK.view(torch.uint16)
    part_out, part_lse = out_THK, out_THK
    if parts > 1:
        part_out = q_THK.new_empty((num_sequences * tokens, num_heads, parts, head_dim), dtype=torch.float32)
        part_lse = q_THK.new_empty((num_sequences * tokens, num_heads, parts), dtype=torch.float32)
    padded_dim = 2 * padded_size(head_dim // 2) if in_pairs else padded_size(head_dim)
    begins = pdl_options(num_sequences * tokens, q_THK)
    _decode_kernel[(num_sequences, keys_NBGK.shape[2], parts)](
        q_THK, keys_NBGK, values_NBGK, out_THK, part_out, part_lse, tables_SM, lengths_S, heads.first_G, heads.count_G,
        sequences, query_starts, head_dim**-0.5 * LOG2_E, tables_SM.stride(0), q_THK.stride(0), *keys_NBGK.stride()[:3], num_heads, parts,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PADDED_ROWS=rows,
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=tile.positions, PRECISION=dot_precision(q_THK.dtype),
        IN_PAIRS=in_pairs, IN_ASSEMBLY=q_THK.is_cuda, TOKENS=tokens, num_warps=tile.num_warps, num_stages=tile.num_stages, **begins,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(num_sequences * tokens, num_heads)](
            part_out, part_lse, out_THK, lengths_S, sequences, query_starts, num_heads,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PARTS=parts, TILE=tile.positions, TOKENS=tokens,
            num_warps=merge_warps(parts * padded_dim), **begins,
        )  # fmt: skip


def decode_tile(head_dim: int, kv_dtype: torch.dtype, parts: int, shared_bytes: int = HOPPER_SHARED_BYTES) -> DecodeTile:
    """The fastest tile measured on an H200. If contexts are not split there are enough programs, and less shared memory is better. With
    only 64 KiB of shared memory per program, Triton does not pipeline anyway."""
    num_bytes = head_dim * kv_dtype.itemsize
    if num_bytes > 256 and shared_bytes < 80 * 1024:
        return DecodeTile(positions=32, num_warps=4, num_stages=1)
    if num_bytes <= 128:
        return DecodeTile(positions=64, num_warps=4, num_stages=3)
    if num_bytes > 256 or parts == 1:
        return DecodeTile(positions=64, num_warps=4, num_stages=2)
    if 2 < parts <= 16:
        return DecodeTile(positions=32, num_warps=2, num_stages=4)
    return DecodeTile(positions=64, num_warps=4, num_stages=3)


def multi_token_tile(head_dim: int, kv_dtype: torch.dtype, shared_bytes: int = HOPPER_SHARED_BYTES) -> DecodeTile:
    """The tile for several new tokens per sequence; not measured."""
    num_bytes = head_dim * kv_dtype.itemsize
    if num_bytes > 256:
        return DecodeTile(positions=32, num_warps=4, num_stages=2 if shared_bytes >= 80 * 1024 else 1)
    return DecodeTile(positions=64, num_warps=4, num_stages=3 if num_bytes <= 128 else 2)


def merge_warps(size: int) -> int:
    """Warps of the merge kernel, so that the parts of a query head (``size`` numbers) take 64 registers per thread."""
    return min(max(size // (64 * 32), 1), 8)
