"""Attention over blocks of KV, where they lie. The twin of every function here is `model.attention.reference`.

T tokens, S sequences, H query heads, G KV heads, P query heads of one KV head (padded to a power of two), K head width,
N blocks, B tokens per block, M most blocks of a sequence, C parts of a context.

The query heads of a KV head are rows of one matrix product, so that its keys and values are read once for all of them.
Softmax runs online, in base 2 (FlashAttention-2, arXiv 2307.08691); long contexts of few sequences are cut into parts that
are computed side by side and merged (Flash-Decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import next_power_of_2

LOG2_E = 1.4426950408889634
NOTHING = tl.constexpr(-1.0e30)
"""Below every score: where nothing is visible. Finite, so that a difference of two is a number."""


@dataclass(frozen=True)
class Heads:
    """The heads of a rank as a kernel wants them."""

    first_G: Tensor
    """int32: the first query head of each KV head; its others follow"""
    count_G: Tensor
    """int32: how many there are, which may differ where ranks share heads unevenly"""
    largest_group: int
    """Query heads of the KV head that has most."""


@triton.jit
def _load_tile(
    cache, table, positions_L, visible_L, kv_head, dims_K, block_stride, token_stride, head_stride,
    BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr, IS_WHOLE: tl.constexpr = False,
):  # fmt: skip
    """(L, K) of keys or values in the dtype that is multiplied; zero where nothing is visible: that is another sequence's, perhaps NaN.
    Where all is visible (IS_WHOLE), nobody asks."""
    if IS_WHOLE:
        block_L = tl.load(table + positions_L // BLOCK_TOKENS).to(tl.int64)
        mask_LK = (dims_K < HEAD_DIM)[None, :]
    else:
        block_L = tl.load(table + positions_L // BLOCK_TOKENS, mask=visible_L, other=0).to(tl.int64)
        mask_LK = visible_L[:, None] & (dims_K < HEAD_DIM)[None, :]
    place_L = block_L * block_stride + (positions_L % BLOCK_TOKENS) * token_stride + kv_head * head_stride
    return tl.load(cache + place_L[:, None] + dims_K[None, :], mask=mask_LK, other=0.0).to(DTYPE)


@triton.jit
def _attend_tile(
    q_RK, keys_LK, values_LK, seen_RL, highest_R, sum_R, out_RK, scale_log2, PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr = False
):  # fmt: skip
    """One step of the online softmax: R rows see L more positions, all of them where IS_WHOLE."""
    scores_RL = tl.dot(q_RK, tl.trans(keys_LK), input_precision=PRECISION) * scale_log2
    if not IS_WHOLE:
        scores_RL = tl.where(seen_RL, scores_RL, NOTHING)
    higher_R = tl.maximum(highest_R, tl.max(scores_RL, axis=1))
    weights_RL = tl.exp2(scores_RL - higher_R[:, None])
    if not IS_WHOLE:
        weights_RL = tl.where(seen_RL, weights_RL, 0.0)
    fade_R = tl.exp2(highest_R - higher_R)
    sum_R = sum_R * fade_R + tl.sum(weights_RL, axis=1)
    out_RK = out_RK * fade_R[:, None] + tl.dot(weights_RL.to(values_LK.dtype), values_LK, input_precision=PRECISION)
    return higher_R, sum_R, out_RK


@quick
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["lengths"])  # else other steps wait for a compiler
def _decode_kernel(
    q, keys, values, out, part_out, part_lse, tables, lengths, first_head, num_heads_of,
    scale_log2, table_stride, q_token_stride, block_stride, token_stride, head_stride, num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence's newest token, one KV head, one part of the context."""
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    first, count = tl.load(first_head + kv_head), tl.load(num_heads_of + kv_head)
    rows_P, dims_K = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    mask_PK = (rows_P < count)[:, None] & (dims_K < HEAD_DIM)[None, :]
    head_P = first + rows_P
    q_PK = tl.load(q + sequence.to(tl.int64) * q_token_stride + head_P[:, None] * HEAD_DIM + dims_K[None, :], mask=mask_PK, other=0.0)
    tiles_per_part = tl.cdiv(tl.cdiv(length, TILE), PARTS)
    start = part * tiles_per_part * TILE
    stop = tl.minimum(start + tiles_per_part * TILE, length)
    table = tables + sequence.to(tl.int64) * table_stride
    highest_P = tl.full([PADDED_GROUP], NOTHING, tl.float32)
    sum_P = tl.zeros([PADDED_GROUP], tl.float32)
    out_PK = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for tile in range(start, stop, TILE):
        positions_L = tile + tl.arange(0, TILE)
        visible_L = positions_L < stop
        keys_LK = _load_tile(
            keys, table, positions_L, visible_L, kv_head, dims_K, block_stride, token_stride, head_stride,
            BLOCK_TOKENS, HEAD_DIM, q.dtype.element_ty,
        )  # fmt: skip
        values_LK = _load_tile(
            values, table, positions_L, visible_L, kv_head, dims_K, block_stride, token_stride, head_stride,
            BLOCK_TOKENS, HEAD_DIM, q.dtype.element_ty,
        )  # fmt: skip
        seen_PL = tl.broadcast_to(visible_L[None, :], [PADDED_GROUP, TILE])
        highest_P, sum_P, out_PK = _attend_tile(q_PK, keys_LK, values_LK, seen_PL, highest_P, sum_P, out_PK, scale_log2, PRECISION)
    divisor_P = tl.where(sum_P > 0, sum_P, 1.0)
    out_PK = out_PK / divisor_P[:, None]
    row_P = sequence.to(tl.int64) * num_heads + head_P
    if PARTS == 1:
        tl.store(out + row_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK.to(out.dtype.element_ty), mask=mask_PK)
    else:
        place_P = row_P * PARTS + part
        tl.store(part_out + place_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK, mask=mask_PK)
        lse_P = tl.where(sum_P > 0, highest_P + tl.log2(divisor_P), NOTHING)
        tl.store(part_lse + place_P, lse_P, mask=rows_P < count)


@quick
@triton.jit
def _merge_kernel(part_out, part_lse, out, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one query head of one sequence, each weighed by how much of the softmax's sum it had."""
    row = tl.program_id(0).to(tl.int64)
    parts_C, dims_K = tl.arange(0, PARTS), tl.arange(0, PADDED_DIM)
    lse_C = tl.load(part_lse + row * PARTS + parts_C)
    weight_C = tl.where(lse_C > NOTHING, tl.exp2(lse_C - tl.max(lse_C, axis=0)), 0.0)
    sum_all = tl.sum(weight_C, axis=0)
    place_CK = (row * PARTS + parts_C)[:, None] * HEAD_DIM + dims_K[None, :]
    out_CK = tl.load(part_out + place_CK, mask=(dims_K < HEAD_DIM)[None, :], other=0.0)
    out_K = tl.sum(out_CK * weight_C[:, None], axis=0) / tl.where(sum_all > 0, sum_all, 1.0)
    tl.store(out + row * HEAD_DIM + dims_K, out_K.to(out.dtype.element_ty), mask=dims_K < HEAD_DIM)


@triton.jit
def _attend_span(
    q_RK, keys, values, table, start, stop, last_seen_R, highest_R, sum_R, out_RK, kv_head, dims_K, block_stride, token_stride, head_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """R rows see the positions from start to stop, each those up to its last; all of whole tiles where IS_WHOLE."""
    for tile in range(start, stop, TILE):
        positions_L = tile + tl.arange(0, TILE)
        visible_L = positions_L < stop
        keys_LK = _load_tile(
            keys, table, positions_L, visible_L, kv_head, dims_K, block_stride, token_stride, head_stride,
            BLOCK_TOKENS, HEAD_DIM, q_RK.dtype, IS_WHOLE,
        )  # fmt: skip
        values_LK = _load_tile(
            values, table, positions_L, visible_L, kv_head, dims_K, block_stride, token_stride, head_stride,
            BLOCK_TOKENS, HEAD_DIM, q_RK.dtype, IS_WHOLE,
        )  # fmt: skip
        seen_RL = positions_L[None, :] <= last_seen_R[:, None]
        highest_R, sum_R, out_RK = _attend_tile(
            q_RK, keys_LK, values_LK, seen_RL, highest_R, sum_R, out_RK, scale_log2, PRECISION, IS_WHOLE
        )
    return highest_R, sum_R, out_RK


@quick
@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["lengths", "query_starts", "tile_sequence", "tile_token"]
)  # else other steps wait for a compiler
def _prefill_kernel(
    q, keys, values, out, tables, lengths, query_starts, tile_sequence, tile_token, first_head, num_heads_of,
    scale_log2, table_stride, q_token_stride, block_stride, token_stride, head_stride, num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """TOKENS neighbouring new tokens of one sequence, one KV head of n query heads: row r is token r // n, head r % n."""
    # The last tokens of a prompt see most: who computes them begins first, and is not waited for alone at the end.
    tile_number, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence, first_token = tl.load(tile_sequence + tile_number), tl.load(tile_token + tile_number)
    first, count = tl.load(first_head + kv_head), tl.load(num_heads_of + kv_head)
    query_start = tl.load(query_starts + sequence)
    num_new = tl.load(query_starts + sequence + 1) - query_start
    length = tl.load(lengths + sequence)
    rows_R, dims_K = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    tokens_here = tl.minimum(TOKENS, num_new - first_token)
    token_R, head_R = first_token + rows_R // count, rows_R % count
    valid_R = rows_R // count < tokens_here
    mask_RK = valid_R[:, None] & (dims_K < HEAD_DIM)[None, :]
    token_place_R = (query_start + token_R).to(tl.int64)
    q_RK = tl.load(
        q + token_place_R[:, None] * q_token_stride + (first + head_R)[:, None] * HEAD_DIM + dims_K[None, :], mask=mask_RK, other=0.0
    )
    before = length - num_new
    last_seen_R = before + token_R if CAUSAL else tl.full([ROWS], 0, tl.int32) + (length - 1)
    stop = before + first_token + tokens_here if CAUSAL else length
    table = tables + sequence.to(tl.int64) * table_stride
    highest_R = tl.full([ROWS], NOTHING, tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RK = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    seen_by_all = (before + first_token + 1 if CAUSAL else length) // TILE * TILE
    highest_R, sum_R, out_RK = _attend_span(
        q_RK, keys, values, table, 0, seen_by_all, last_seen_R, highest_R, sum_R, out_RK, kv_head, dims_K,
        block_stride, token_stride, head_stride, scale_log2, HEAD_DIM, BLOCK_TOKENS, TILE, PRECISION, True,
    )  # fmt: skip
    highest_R, sum_R, out_RK = _attend_span(
        q_RK, keys, values, table, seen_by_all, stop, last_seen_R, highest_R, sum_R, out_RK, kv_head, dims_K,
        block_stride, token_stride, head_stride, scale_log2, HEAD_DIM, BLOCK_TOKENS, TILE, PRECISION, False,
    )  # fmt: skip
    out_RK = out_RK / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    place_R = token_place_R * num_heads + first + head_R
    tl.store(out + place_R[:, None] * HEAD_DIM + dims_K[None, :], out_RK.to(out.dtype.element_ty), mask=mask_RK)


def decode(
    q_SHK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    heads: Heads,
    out_SHK: Tensor,
    *,
    parts: int,
) -> None:
    """Attention of one new token per sequence into ``out_SHK``; a sequence of length 0 gets zeros.

    ``parts`` (C, a power of two) programs share a context. The launch depends on no length, so that it can be captured.
    """
    num_sequences, num_heads, head_dim = q_SHK.shape
    part_out, part_lse = out_SHK, out_SHK
    if parts > 1:
        part_out = q_SHK.new_empty((num_sequences, num_heads, parts, head_dim), dtype=torch.float32)
        part_lse = q_SHK.new_empty((num_sequences, num_heads, parts), dtype=torch.float32)
    _decode_kernel[(num_sequences, keys_NBGK.shape[2], parts)](
        q_SHK, keys_NBGK, values_NBGK, out_SHK, part_out, part_lse, tables_SM, lengths_S, heads.first_G, heads.count_G,
        head_dim**-0.5 * LOG2_E, tables_SM.stride(0), q_SHK.stride(0), *keys_NBGK.stride()[:3], num_heads,
        HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), PADDED_GROUP=padded(heads.largest_group),
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=DECODE_TILE, PARTS=parts, PRECISION=precision(q_SHK.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(num_sequences * num_heads,)](
            part_out, part_lse, out_SHK, HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), PARTS=parts, num_warps=2
        )


@dataclass(frozen=True)
class PrefillTiles:
    """Which tokens each program of a prefill takes: as many neighbours of one sequence as fill its rows."""

    sequence_X: Tensor
    """int32: numbers of sequences"""
    token_X: Tensor
    """int32: the first of its tokens, counted from the sequence's first new one"""


def prefill(
    q_THK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    query_starts: Tensor,
    tiles: PrefillTiles,
    heads: Heads,
    out_THK: Tensor,
    *,
    is_causal: bool = True,
) -> None:
    """Attention of several new tokens per sequence, the last of their contexts, into ``out_THK``.

    ``query_starts`` (int32, S + 1) are offsets into T; ``tiles`` may leave sequences out.
    """
    num_heads, head_dim = q_THK.shape[1:]
    _prefill_kernel[(tiles.sequence_X.shape[0], keys_NBGK.shape[2])](
        q_THK, keys_NBGK, values_NBGK, out_THK, tables_SM, lengths_S, query_starts, tiles.sequence_X, tiles.token_X,
        heads.first_G, heads.count_G, head_dim**-0.5 * LOG2_E, tables_SM.stride(0), q_THK.stride(0), *keys_NBGK.stride()[:3], num_heads,
        HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), TOKENS=tokens_per_tile(heads), ROWS=PREFILL_ROWS,
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=PREFILL_TILE, PRECISION=precision(q_THK.dtype), CAUSAL=is_causal,
        num_warps=8 if head_dim > 64 else 4, num_stages=PREFILL_STAGES,
    )  # fmt: skip


DECODE_TILE = 64
"""Positions that a decoding program reads at a time: four blocks of 16 tokens."""
PREFILL_TILE = 64
PREFILL_ROWS = 128
"""Rows of a prefill's matrix product: new tokens times the query heads of one KV head."""
PREFILL_STAGES = 3
"""Tiles are read that far ahead: with two, each waits for its entries of the block table."""
SMALLEST_DOT = 16
"""The least rows and columns that a matrix unit takes."""


def tokens_per_tile(heads: Heads) -> int:
    """How many new tokens of a sequence one program of a prefill takes."""
    return PREFILL_ROWS // heads.largest_group


def padded(size: int) -> int:
    """The power of two that a tile of so many columns needs."""
    return max(SMALLEST_DOT, next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as such: TF32 has a mantissa of 10 bits. Half precision is exact in its products anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"
