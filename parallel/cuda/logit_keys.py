"""Logits as order-preserving 32-bit integers (*keys*), and their integer sampling weights, as in `engine.run.sampling.filters`.

Device functions of the sampling kernels. Kernels need ``enable_fp_fusion=False``, as the reference rounds products before adding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.sizes import cdiv

PART = 4096
"""Columns of a row that one program processes."""
NO_ID = tl.constexpr(2**31 - 1)
"""Larger than any id."""
LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHT_BITS = tl.constexpr(44)
"""As in the reference."""
LOWEST = tl.constexpr(-(2**31))
"""Below the key of any logit."""
KEY_OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)
KEY_OF_INFINITY = tl.constexpr(0x7F800000)
KEY_OF_NAN = tl.constexpr(0x7FFFFFFF)


def empty_parts(logits_RV: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """(R, N): a number for each part of each row, uninitialised."""
    num_rows, width = logits_RV.shape
    return torch.empty(num_rows, cdiv(width, PART), dtype=dtype, device=logits_RV.device)


@triton.jit
def to_key(x):
    """int32, ordered like the logits (float32). -0 equals 0; NaN is the highest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), KEY_OF_NAN)


@triton.jit
def load_keys(row, ids, width, readable):
    """Loads logits as keys; `LOWEST` beyond the last column."""
    x = tl.load(row + ids, mask=ids < readable, other=float("-inf")).to(tl.float32)
    return tl.where(ids < width, to_key(x), LOWEST)


@triton.jit
def to_logit(key):
    """The logit of a key, in float64."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def sampling_weights(key, highest, scale):
    """int64: unnormalised probabilities in fixed point; the highest logit has 2^WEIGHT_BITS."""
    weight = tl.exp2((to_logit(key) - highest) * scale + WEIGHT_BITS).to(tl.int64)
    return tl.where(key > KEY_OF_MINUS_INFINITY, weight, 0)


@triton.jit
def temperature_scale(temperature):
    return LOG2_E / tl.maximum(temperature, 1e-300)


@triton.jit
def row_max_key(highest_of_parts, num_parts, PARTS: tl.constexpr):
    """The key of a row's highest logit, from the maxima of its parts."""
    parts = tl.arange(0, PARTS)
    return tl.max(tl.load(highest_of_parts + parts, mask=parts < num_parts, other=LOWEST), axis=0)


def key_shift(dtype: torch.dtype) -> int:
    """How many low bits of a key carry no information: a bfloat16 is a float32 with 16 zero bits."""
    return 16 if dtype == torch.bfloat16 else 0


@triton.jit
def restore_key(shifted, SHIFT: tl.constexpr):
    """int32: the full key of a shifted one (int64). The dropped bits of negative logits are ones."""
    key = shifted
    if SHIFT > 0:
        key = (shifted << SHIFT) | tl.where(shifted < 0, (1 << SHIFT) - 1, 0)
    return key.to(tl.int32)


@triton.jit
def min_p_weight(min_p):
    """int64: the smallest weight that min-p keeps, at least 1, as an id of weight 0 is never sampled."""
    return tl.maximum(tl.ceil(min_p * tl.full([], 17592186044416.0, tl.float64)).to(tl.int64), 1)


@triton.jit
def count_within(before, each, limit, width):
    """How many of equal logits, of weight ``each``, top-p keeps: one is kept if the weight before it is less than ``limit``. At least 1."""
    least, most = tl.full([], 1, tl.int64), width.to(tl.int64)
    for _halving in range(20):
        middle = (least + most + 1) >> 1
        is_kept = (before + (middle - 1) * each).to(tl.float64) < limit
        least, most = tl.where(is_kept, middle, least), tl.where(is_kept, most, middle - 1)
    return tl.maximum(most, 1)
