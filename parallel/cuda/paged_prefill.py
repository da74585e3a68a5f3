"""Paged attention for prefill: many new tokens per sequence. Reference: `model.attention.reference`.

T tokens, S sequences, H query heads, G KV heads, K head width, N blocks, B tokens per block, M most blocks of a sequence, X tiles of new
tokens, R rows of a tile, L positions read at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _attend_span(
    q_RK, keys, values, table, start, stop, last_seen_R, highest_R, sum_R, out_RK, dims_K, block_stride, token_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Attention of R rows over positions ``start`` to ``stop``. Each row sees those up to its ``last_seen`` (every row sees at
    least position 0), or all of them if IS_WHOLE."""
    mask_K = dims_K < HEAD_DIM
    block_L = load_blocks(table, start, stop, TILE, BLOCK_TOKENS)
    for tile in range(start, stop, TILE):
        place_L = kv_offsets(block_L, tile, stop, block_stride, token_stride, TILE, BLOCK_TOKENS)
        keys_LK = tl.load(keys + place_L[:, None] + dims_K[None, :], mask=mask_K[None, :]).to(q_RK.dtype)
        values_LK = tl.load(values + place_L[:, None] + dims_K[None, :], mask=mask_K[None, :]).to(q_RK.dtype)
        scores_RL = tl.dot(q_RK, tl.trans(keys_LK), input_precision=PRECISION)
        if not IS_WHOLE:
            scores_RL = tl.where((tile + tl.arange(0, TILE))[None, :] <= last_seen_R[:, None], scores_RL, MASKED)
        highest_R, weights_RL, fade_R = online_softmax(scores_RL, highest_R, scale_log2)
        sum_R = sum_R * fade_R + tl.sum(weights_RL, axis=1)
        out_RK = tl.dot(weights_RL.to(q_RK.dtype), values_LK, acc=out_RK * fade_R[:, None], input_precision=PRECISION)
        block_L = load_blocks(table, tile + TILE, stop, TILE, BLOCK_TOKENS)
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
    # The last tokens of a prompt have the longest context: their programs start first, to avoid a tail effect.
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
        q_RK, scale_log2 = scaled_to_float16(q_RK), scale_log2 * 16.0
    before = length - num_new
    last_seen_R = before + token_R if CAUSAL else tl.full([ROWS], 0, tl.int32) + (length - 1)
    stop = before + first_token + tokens_here if CAUSAL else length
    table = tables + sequence.to(tl.int64) * table_stride
    keys += kv_head * head_stride
    values += kv_head * head_stride
    highest_R = tl.full([ROWS], MASKED, tl.float32)
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
class PrefillTile:
    """Tile configuration of the prefill kernel."""

    rows: int
    """Rows of the matrix product: new tokens times the query heads of one KV head."""
    positions: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """The tokens of each program: as many consecutive tokens of one sequence as fit its rows."""

    sequence_X: Tensor
    """int32: index of the sequence"""
    token_X: Tensor
    """int32: its first token, relative to the sequence's first new token"""


def prefill(
    q_THK: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    tables_SM: Tensor,
    lengths_S: Tensor,
    query_starts: Tensor,
    tiles: PrefillTiles,
    heads: HeadGroups,
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
        HEAD_DIM=head_dim, PADDED_DIM=padded_size(head_dim), TOKENS=tile.rows // heads.largest_group, ROWS=tile.rows,
        BLOCK_TOKENS=keys_NBGK.shape[1], TILE=tile.positions, PRECISION=dot_precision(q_THK.dtype), CAUSAL=is_causal,
        IN_FLOAT16=keys_NBGK.dtype == FP8 and q_THK.dtype != torch.float32, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


TILES = {
    (True, False): ((98_304, PrefillTile(rows=128, positions=64, num_warps=8, num_stages=3)), (65_536, PrefillTile(64, 64, 4, 2))),
    (False, False): ((74_752, PrefillTile(rows=64, positions=128, num_warps=4, num_stages=3)),),
    (True, True): (
        (164_352, PrefillTile(rows=128, positions=64, num_warps=8, num_stages=2)),
        (73_984, PrefillTile(64, 32, 4, 2)),
        (49_152, PrefillTile(32, 32, 4, 1)),
    ),
    (False, True): ((65_536, PrefillTile(rows=64, positions=64, num_warps=4, num_stages=2)),),
}
"""By (head_dim > 64, is float32): tiles with their shared memory in bytes when compiled for small devices
(tests/parallel/cuda/test_compilation.py), largest first. They were the fastest on an H200 with chunks of 2,048 tokens in half precision."""


def prefill_tile(head_dim: int, dtype: torch.dtype, shared_bytes: int = HOPPER_SHARED_BYTES) -> PrefillTile:
    """The first tile that fits into ``shared_bytes``."""
    tiles = TILES[head_dim > 64, dtype == torch.float32]
    return next((tile for wanted, tile in tiles if wanted <= shared_bytes), tiles[-1][1])
