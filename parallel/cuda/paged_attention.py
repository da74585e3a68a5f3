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

from parallel.cuda.early import early, let_the_next_begin, wait_for_the_last
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import next_power_of_2
from parallel.rounding import FP8

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
def _look_up(table, start, stop, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """The blocks of the TILE positions from start on; past the end stands the last once more."""
    return tl.load(table + tl.maximum(tl.minimum(start + tl.arange(0, TILE), stop - 1), 0) // BLOCK_TOKENS)


@triton.jit
def _places(block_L, start, stop, block_stride, token_stride, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Where the cache has these positions. Past the end is another sequence's, perhaps NaN, which times 0 is NaN: there it is the last once
    more, and nothing has to be masked."""
    return block_L.to(tl.int64) * block_stride + tl.minimum(start + tl.arange(0, TILE), stop - 1) % BLOCK_TOKENS * token_stride


@triton.jit
def _as_float16(q):
    """A sixteenth of queries, so that none is too large for float16, which has three digits more than bfloat16. Two numbers in FP8 become
    float16 by one instruction, and bfloat16 by five, of which two are slow (and Triton takes some for it that Ada has not)."""
    return (q.to(tl.float32) * 0.0625).to(tl.float16)


@triton.jit
def _of_pairs(pairs, IN_ASSEMBLY: tl.constexpr):
    """The two e4m3 numbers of 16 bits, as float16. IN_ASSEMBLY that takes three instructions for two of each, otherwise some ten, and only
    so it can be interpreted."""
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
@triton.jit(do_not_specialize=["table_stride", "parts"], do_not_specialize_on_alignment=["lengths"])  # else other steps wait for a compiler
def _decode_kernel(
    q, keys, values, out, part_out, part_lse, tables, lengths, first_head, num_heads_of,
    scale_log2, table_stride, q_token_stride, block_stride, token_stride, head_stride, num_heads, parts,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, IN_PAIRS: tl.constexpr, IN_ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One sequence's newest token, one KV head, one part of the context. Those whose part would begin past its end have nothing to do.

    IN_PAIRS: keys and values are FP8, read as 16 bits of two neighbours, as matrix units want them, and multiplied in float16.
    """
    let_the_next_begin(EARLY)
    wait_for_the_last(EARLY)
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    tiles_per_part = tl.cdiv(tl.cdiv(length, TILE), parts)
    start = part * tiles_per_part * TILE
    if (part > 0) & (start >= length):
        return
    stop = tl.minimum(start + tiles_per_part * TILE, length)
    first, count = tl.load(first_head + kv_head), tl.load(num_heads_of + kv_head)
    WIDTH: tl.constexpr = HEAD_DIM // 2 if IN_PAIRS else HEAD_DIM
    PADDED_WIDTH: tl.constexpr = PADDED_DIM // 2 if IN_PAIRS else PADDED_DIM
    rows_P, dims_W, dims_K = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_WIDTH), tl.arange(0, PADDED_DIM)
    mask_PK = (rows_P < count)[:, None] & (dims_K < HEAD_DIM)[None, :]
    mask_PW = (rows_P < count)[:, None] & (dims_W < WIDTH)[None, :]
    head_P = first + rows_P
    q += sequence.to(tl.int64) * q_token_stride
    if IN_PAIRS:
        place_PW = head_P[:, None] * HEAD_DIM + 2 * dims_W[None, :]
        q_PW = _as_float16(tl.load(q + place_PW, mask=mask_PW, other=0.0))
        odd_q_PW = _as_float16(tl.load(q + place_PW + 1, mask=mask_PW, other=0.0))
        scale_log2 *= 16.0
    else:
        q_PW = tl.load(q + head_P[:, None] * HEAD_DIM + dims_W[None, :], mask=mask_PW, other=0.0)
    table = tables + sequence.to(tl.int64) * table_stride
    highest_P = tl.full([PADDED_GROUP], NOTHING, tl.float32)
    sum_PL = tl.zeros([PADDED_GROUP, TILE], tl.float32)
    out_PW = tl.zeros([PADDED_GROUP, PADDED_WIDTH], tl.float32)
    odd_out_PW = tl.zeros([PADDED_GROUP, PADDED_WIDTH], tl.float32)
    keys += kv_head * head_stride
    values += kv_head * head_stride
    # Blocks are looked up a tile ahead: Triton reads ahead by half of its stages where an address waits for a load in the same turn.
    block_L = _look_up(table, start, stop, TILE, BLOCK_TOKENS)
    for tile in range(start, stop, TILE):
        seen_L = tile + tl.arange(0, TILE) < stop
        place_L = _places(block_L, tile, stop, block_stride, token_stride, TILE, BLOCK_TOKENS)
        keys_WL = tl.trans(tl.load(keys + place_L[:, None] + dims_W[None, :], mask=(dims_W < WIDTH)[None, :]))
        values_LW = tl.load(values + place_L[:, None] + dims_W[None, :], mask=(dims_W < WIDTH)[None, :])
        if IN_PAIRS:
            even_WL, odd_WL = _of_pairs(keys_WL, IN_ASSEMBLY)
            scores_PL = tl.dot(odd_q_PW, odd_WL, acc=tl.dot(q_PW, even_WL))
        else:
            scores_PL = tl.dot(q_PW, keys_WL.to(q_PW.dtype), input_precision=PRECISION)
        scores_PL = tl.where(seen_L[None, :], scores_PL, NOTHING)
        higher_P = tl.maximum(highest_P, tl.max(scores_PL, axis=1) * scale_log2)
        weights_PL = tl.exp2(scores_PL * scale_log2 - higher_P[:, None])
        fade_P = tl.exp2(highest_P - higher_P)
        highest_P = higher_P
        sum_PL = sum_PL * fade_P[:, None] + weights_PL
        out_PW = out_PW * fade_P[:, None]
        if IN_PAIRS:
            even_LW, odd_LW = _of_pairs(values_LW, IN_ASSEMBLY)
            out_PW = tl.dot(weights_PL.to(tl.float16), even_LW, acc=out_PW)
            odd_out_PW = tl.dot(weights_PL.to(tl.float16), odd_LW, acc=odd_out_PW * fade_P[:, None])
        else:
            out_PW = tl.dot(weights_PL.to(q_PW.dtype), values_LW.to(q_PW.dtype), acc=out_PW, input_precision=PRECISION)
        block_L = _look_up(table, tile + TILE, stop, TILE, BLOCK_TOKENS)
    sum_P = tl.sum(sum_PL, axis=1)
    divisor_P = tl.where(sum_P > 0, sum_P, 1.0)
    out_PK = tl.interleave(out_PW, odd_out_PW) if IN_PAIRS else out_PW
    out_PK = out_PK / divisor_P[:, None]
    row_P = sequence.to(tl.int64) * num_heads + head_P
    used = tl.cdiv(length, tl.maximum(tiles_per_part, 1) * TILE)
    if used <= 1:
        tl.store(out + row_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK.to(out.dtype.element_ty), mask=mask_PK)
    else:
        place_P = row_P * parts + part
        tl.store(part_out + place_P[:, None] * HEAD_DIM + dims_K[None, :], out_PK, mask=mask_PK)
        tl.store(part_lse + place_P, highest_P + tl.log2(divisor_P), mask=rows_P < count)


@quick
@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _merge_kernel(
    part_out, part_lse, out, lengths, num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of one query head of one sequence, where there are several, each weighed by how much of the softmax's sum it had.

    What no program has written is read as well, and left out: so nothing is waited for before it is asked for."""
    let_the_next_begin(EARLY)
    wait_for_the_last(EARLY)
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = sequence.to(tl.int64) * num_heads + head
    parts_C, dims_K = tl.arange(0, PARTS), tl.arange(0, PADDED_DIM)
    length = tl.load(lengths + sequence)
    lse_C = tl.load(part_lse + row * PARTS + parts_C)
    place_CK = (row * PARTS + parts_C)[:, None] * HEAD_DIM + dims_K[None, :]
    out_CK = tl.load(part_out + place_CK, mask=(dims_K < HEAD_DIM)[None, :], other=0.0)
    used = tl.cdiv(length, tl.maximum(tl.cdiv(tl.cdiv(length, TILE), PARTS), 1) * TILE)
    is_used_C = (parts_C < used) & (used > 1)
    lse_C = tl.where(is_used_C, lse_C, NOTHING)
    weight_C = tl.exp2(lse_C - tl.max(lse_C, axis=0))
    out_CK = tl.where(is_used_C[:, None], out_CK, 0.0)
    out_K = tl.sum(out_CK * weight_C[:, None], axis=0) / tl.sum(weight_C, axis=0)
    tl.store(out + row * HEAD_DIM + dims_K, out_K.to(out.dtype.element_ty), mask=(dims_K < HEAD_DIM) & (used > 1))


@triton.jit
def _attend_span(
    q_RK, keys, values, table, start, stop, last_seen_R, highest_R, sum_R, out_RK, dims_K, block_stride, token_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """R rows see the positions from start to stop, each those up to its last and the first in any case; all of them where IS_WHOLE."""
    mask_K = dims_K < HEAD_DIM
    block_L = _look_up(table, start, stop, TILE, BLOCK_TOKENS)
    for tile in range(start, stop, TILE):
        place_L = _places(block_L, tile, stop, block_stride, token_stride, TILE, BLOCK_TOKENS)
        keys_LK = tl.load(keys + place_L[:, None] + dims_K[None, :], mask=mask_K[None, :]).to(q_RK.dtype)
        values_LK = tl.load(values + place_L[:, None] + dims_K[None, :], mask=mask_K[None, :]).to(q_RK.dtype)
        scores_RL = tl.dot(q_RK, tl.trans(keys_LK), input_precision=PRECISION)
        if not IS_WHOLE:
            scores_RL = tl.where((tile + tl.arange(0, TILE))[None, :] <= last_seen_R[:, None], scores_RL, NOTHING)
        higher_R = tl.maximum(highest_R, tl.max(scores_RL, axis=1) * scale_log2)
        weights_RL = tl.exp2(scores_RL * scale_log2 - higher_R[:, None])
        fade_R = tl.exp2(highest_R - higher_R)
        highest_R = higher_R
        sum_R = sum_R * fade_R + tl.sum(weights_RL, axis=1)
        out_RK = tl.dot(weights_RL.to(q_RK.dtype), values_LK, acc=out_RK * fade_R[:, None], input_precision=PRECISION)
        block_L = _look_up(table, tile + TILE, stop, TILE, BLOCK_TOKENS)
    return highest_R, sum_R, out_RK


@quick
@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["lengths", "query_starts", "tile_sequence", "tile_token"]
)  # else other steps wait for a compiler
def _prefill_kernel(
    q, keys, values, out, tables, lengths, query_starts, tile_sequence, tile_token, first_head, num_heads_of,
    scale_log2, table_stride, q_token_stride, block_stride, token_stride, head_stride, num_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, IN_FLOAT16: tl.constexpr,
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
    if IN_FLOAT16:
        q_RK, scale_log2 = _as_float16(q_RK), scale_log2 * 16.0
    before = length - num_new
    last_seen_R = before + token_R if CAUSAL else tl.full([ROWS], 0, tl.int32) + (length - 1)
    stop = before + first_token + tokens_here if CAUSAL else length
    table = tables + sequence.to(tl.int64) * table_stride
    keys += kv_head * head_stride
    values += kv_head * head_stride
    highest_R = tl.full([ROWS], NOTHING, tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    out_RK = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    seen_by_all = (before + first_token + 1 if CAUSAL else length) // TILE * TILE
    highest_R, sum_R, out_RK = _attend_span(
        q_RK, keys, values, table, 0, seen_by_all, last_seen_R, highest_R, sum_R, out_RK, dims_K,
        block_stride, token_stride, scale_log2, HEAD_DIM, BLOCK_TOKENS, TILE, PRECISION, True,
    )  # fmt: skip
    highest_R, sum_R, out_RK = _attend_span(
        q_RK, keys, values, table, seen_by_all, stop, last_seen_R, highest_R, sum_R, out_RK, dims_K,
        block_stride, token_stride, scale_log2, HEAD_DIM, BLOCK_TOKENS, TILE, PRECISION, False,
    )  # fmt: skip
    out_RK = out_RK / tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    place_R = token_place_R * num_heads + first + head_R
    tl.store(out + place_R[:, None] * HEAD_DIM + dims_K[None, :], out_RK.to(out.dtype.element_ty), mask=mask_RK)


@dataclass(frozen=True)
class DecodeTile:
    """How a decoding program reads its part."""

    positions: int
    """At a time."""
    num_warps: int
    num_stages: int


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
    tile: DecodeTile | None = None,
) -> None:
    """Attention of one new token per sequence into ``out_SHK``; a sequence of length 0 gets zeros.

    At most ``parts`` (C, a power of two) programs share a context. The launch depends on no length, so that it can be captured.
    """
    num_sequences, num_heads, head_dim = q_SHK.shape
    in_pairs = keys_NBGK.dtype == FP8 and q_SHK.dtype != torch.float32 and head_dim % 2 == 0
    tile = tile or decode_tile(head_dim, keys_NBGK.dtype, parts)
    if in_pairs:
        keys_NBGK, values_NBGK = keys_NBGK.view(torch.uint16), values_NBGK.view(torch.uint16)
    part_out, part_lse = out_SHK, out_SHK
    if parts > 1:
        part_out = q_SHK.new_empty((num_sequences, num_heads, parts, head_dim), dtype=torch.float32)
        part_lse = q_SHK.new_empty((num_sequences, num_heads, parts), dtype=torch.float32)
    padded_dim = 2 * padded(head_dim // 2) if in_pairs else padded(head_dim)
    _decode_kernel[(num_sequences, keys_NBGK.shape[2], parts)](
        q_SHK, keys_NBGK, values_NBGK, out_SHK, part_out, part_lse, tables_SM, lengths_S, heads.first_G, heads.count_G,
        head_dim**-0.5 * LOG2_E, tables_SM.stride(0), q_SHK.stride(0), *keys_NBGK.stride()[:3], num_heads, parts,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PADDED_GROUP=padded(heads.largest_group),
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=tile.positions, PRECISION=precision(q_SHK.dtype),
        IN_PAIRS=in_pairs, IN_ASSEMBLY=q_SHK.is_cuda, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **early(num_sequences, q_SHK),
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(num_sequences, num_heads)](
            part_out, part_lse, out_SHK, lengths_S, num_heads,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PARTS=parts, TILE=tile.positions, num_warps=merge_warps(parts * padded_dim),
            **early(num_sequences, q_SHK),
        )  # fmt: skip


@dataclass(frozen=True)
class PrefillTile:
    """What a program of a prefill computes at a time."""

    rows: int
    """Of its matrix product: new tokens times the query heads of one KV head."""
    positions: int
    num_warps: int
    num_stages: int


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
    tile: PrefillTile | None = None,
) -> None:
    """Attention of several new tokens per sequence, the last of their contexts, into ``out_THK``.

    ``query_starts`` (int32, S + 1) are offsets into T; ``tiles`` may leave sequences out.
    """
    num_heads, head_dim = q_THK.shape[1:]
    tile = tile or prefill_tile(head_dim, q_THK.dtype)
    _prefill_kernel[(tiles.sequence_X.shape[0], keys_NBGK.shape[2])](
        q_THK, keys_NBGK, values_NBGK, out_THK, tables_SM, lengths_S, query_starts, tiles.sequence_X, tiles.token_X,
        heads.first_G, heads.count_G, head_dim**-0.5 * LOG2_E, tables_SM.stride(0), q_THK.stride(0), *keys_NBGK.stride()[:3], num_heads,
        HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), TOKENS=tile.rows // heads.largest_group, ROWS=tile.rows,
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=tile.positions, PRECISION=precision(q_THK.dtype), CAUSAL=is_causal,
        IN_FLOAT16=keys_NBGK.dtype == FP8 and q_THK.dtype != torch.float32, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


SMALLEST_DOT = 16
"""The least rows and columns that a matrix unit takes."""


def decode_tile(head_dim: int, kv_dtype: torch.dtype, parts: int) -> DecodeTile:
    """What was fastest on an H200. Where contexts are not cut there are programs enough: then those win that take less shared memory."""
    num_bytes = head_dim * kv_dtype.itemsize
    if num_bytes <= 128:
        return DecodeTile(positions=64, num_warps=4, num_stages=3)
    if num_bytes > 256 or parts == 1:
        return DecodeTile(positions=64, num_warps=4, num_stages=2)
    if 2 < parts <= 16:
        return DecodeTile(positions=32, num_warps=2, num_stages=4)
    return DecodeTile(positions=64, num_warps=4, num_stages=3)


def merge_warps(size: int) -> int:
    """So many that the parts of a query head, of ``size`` numbers, take 64 registers of each thread."""
    return min(max(size // (64 * 32), 1), 8)


def prefill_tile(head_dim: int, dtype: torch.dtype) -> PrefillTile:
    """What was fastest on an H200 with chunks of 2,048 tokens in half precision; in float32 what fits an A100."""
    if head_dim > 64:
        return PrefillTile(rows=128, positions=64, num_warps=8, num_stages=2 if dtype == torch.float32 else 3)
    if dtype == torch.float32:
        return PrefillTile(rows=64, positions=64, num_warps=4, num_stages=2)
    return PrefillTile(rows=64, positions=128, num_warps=4, num_stages=3)


def tokens_per_tile(heads: Heads, head_dim: int) -> int:
    """How many new tokens of a sequence one program of a prefill takes."""
    return prefill_tile(head_dim, torch.bfloat16).rows // heads.largest_group


def padded(size: int) -> int:
    """The power of two that a tile of so many columns needs."""
    return max(SMALLEST_DOT, next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as such: TF32 has a mantissa of 10 bits. Half precision is exact in its products anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"
