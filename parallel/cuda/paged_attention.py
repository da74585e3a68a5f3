"""What kernels of attention over blocks of KV share: where a position lies, and whose heads are whose.

G KV heads, R rows of queries, L positions read at a time, in blocks of some tokens each. The query heads of a KV head are rows of one
matrix product, so that its keys and values are read once for all of them. Softmax runs online, in base 2 (FlashAttention-2, arXiv
2307.08691).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.sizes import next_power_of_2

LOG2_E = 1.4426950408889634
MASKED = tl.constexpr(-1.0e30)
"""Below every score: where nothing is visible. Finite, so that a difference of two is a number."""
MIN_DOT_SIZE = 16
"""The least rows and columns that a matrix unit takes."""
HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have there. On an A100 it is 163 KiB, on Ada and on GeForce and RTX of Blackwell 99, on Turing 64."""


@dataclass(frozen=True)
class HeadGroups:
    """The heads of a rank as a kernel wants them."""

    first_G: Tensor
    """int32: the first query head of each KV head; its others follow"""
    count_G: Tensor
    """int32: how many there are, which may differ where ranks share heads unevenly"""
    largest_group: int
    """Query heads of the KV head that has most."""


@triton.jit
def load_blocks(table, start, stop, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """The blocks of the TILE positions from start on; past the end stands the last once more."""
    return tl.load(table + tl.maximum(tl.minimum(start + tl.arange(0, TILE), stop - 1), 0) // BLOCK_TOKENS)


@triton.jit
def kv_offsets(block_L, start, stop, block_stride, token_stride, TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Where the cache has these positions. Past the end is another sequence's, perhaps NaN, which times 0 is NaN: there it is the last once
    more, and nothing has to be masked."""
    return block_L.to(tl.int64) * block_stride + tl.minimum(start + tl.arange(0, TILE), stop - 1) % BLOCK_TOKENS * token_stride


@triton.jit
def scaled_to_float16(q):
    """A sixteenth of queries, so that none is too large for float16, which has three digits more than bfloat16. Two numbers in FP8 become
    float16 by one instruction, and bfloat16 by five, of which two are slow (and Triton takes some for it that Ada has not)."""
    return (q.to(tl.float32) * 0.0625).to(tl.float16)


@triton.jit
def online_softmax(scores_RL, highest_R, scale_log2):
    """One step of the online softmax: each row's running maximum (base 2), the weights of these positions, and the factor by which to
    rescale what was accumulated before."""
    higher_R = tl.maximum(highest_R, tl.max(scores_RL, axis=1) * scale_log2)
    weights_RL = tl.exp2(scores_RL * scale_log2 - higher_R[:, None])
    return higher_R, weights_RL, tl.exp2(highest_R - higher_R)


def padded_size(size: int) -> int:
    """The power of two that a tile of so many columns needs."""
    return max(MIN_DOT_SIZE, next_power_of_2(size))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as such: TF32 has a mantissa of 10 bits. Half precision is exact in its products anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"
