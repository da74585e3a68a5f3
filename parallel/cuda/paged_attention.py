"""Shared parts of the paged attention kernels: addressing of the KV cache, grouped query heads, online softmax.

G KV heads, R rows of queries, L positions read at a time. The query heads of one KV head are rows of one matrix product, so that its keys
and values are read once for all of them. Softmax is computed online in base 2 (FlashAttention-2, arXiv 2307.08691).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.sizes import next_power_of_2

LOG2_E = 1.4426950408889634
MASKED = tl.constexpr(-1.0e30)
"""Score of a masked position, below every real one. Finite, so that the difference of two is not NaN."""
MIN_DOT_SIZE = 16
"""The minimum rows and columns of `tl.dot`."""
HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory per program on Hopper. An A100 has 163 KiB, Ada and consumer Blackwell 99, Turing 64."""


@dataclass(frozen=True)
class HeadGroups:
    """A rank's KV heads and their groups of query heads, as the kernels need them."""

    first_G: Tensor
    """int32: the first query head of each KV head; its others follow"""
    count_G: Tensor
    """int32: how many query heads each KV head has; they may differ if heads are split unevenly over ranks"""
    largest_group: int
    """The most query heads of a KV head."""


@triton.jit
def load_blocks(table, start, stop, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Block numbers of the TILE positions from ``start`` on; past the end, of the last position."""
    return tl.load(table + tl.maximum(tl.minimum(start + tl.arange(0, TILE), stop - 1), 0) // BLOCK_TOKENS)


@triton.jit
def kv_offsets(block_L, start, stop, block_stride, token_stride, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Offsets of these positions in the cache. Past the end the last position is repeated, so loads need no mask: what lies there may be
    another sequence's or NaN, and 0 * NaN is NaN."""
    return block_L.to(tl.int64) * block_stride + tl.minimum(start + tl.arange(0, TILE), stop - 1) % BLOCK_TOKENS * token_stride


@triton.jit
def scaled_to_float16(q):
    """Queries / 16 in float16, to stay within its range; float16 has three bits of mantissa more than bfloat16. One instruction converts
    two FP8 numbers to float16, while bfloat16 takes five, two of them slow (and Triton uses some that Ada does not have)."""
    return (q.to(tl.float32) * 0.0625).to(tl.float16)


@triton.jit
def online_softmax(scores_RL, highest_R, scale_log2):
    """One step of the online softmax: each row's running maximum (base 2), the weights of these positions, and the factor by which to
    rescale what was accumulated before."""
    higher_R = tl.maximum(highest_R, tl.max(scores_RL, axis=1) * scale_log2)
    weights_RL = tl.exp2(scores_RL * scale_log2 - higher_R[:, None])
    return higher_R, weights_RL, tl.exp2(highest_R - higher_R)


def padded_size(size: int) -> int:
    """``size`` rounded up to what a tile dimension supports: a power of two of at least `MIN_DOT_SIZE`."""
    return max(MIN_DOT_SIZE, next_power_of_2(size))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of `tl.dot`: float32 is not reduced to TF32 (10 bits of mantissa). It does not matter for half precision."""
    return "ieee" if dtype == torch.float32 else "tf32"
