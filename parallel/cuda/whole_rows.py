"""Tokens of rows that few candidates do not decide, drawn from all of the vocabulary where it lies. The twin is
`engine.run.sampling.filters.draw_filtered` with as many candidates as there are ids, which sorts them.

Filters keep a beginning of the canonical order (by falling logit, then by rising id). Its end is sought, not sorted for: a logit is a
whole number of 32 bits in the same order, and 32 halvings find the one at which so many ids, or so much weight, stand above it.

R rows, V columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick

BLOCK = 2048
"""Columns that a program looks at at a time."""
NOBODY = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-(2**31))
LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHT_BITS = tl.constexpr(44)
"""As in the twin."""


@triton.jit
def _load(row, start, width, BLOCK: tl.constexpr):
    """Ids, which of them there are, and their logits; -0 is 0."""
    ids = start + tl.arange(0, BLOCK)
    there = ids < width
    x = tl.load(row + ids, mask=there, other=float("-inf")).to(tl.float32)
    return ids, there, tl.where(x == 0.0, 0.0, x)


@triton.jit
def _key(x):
    """int64, ordered as the logits are."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _logit(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, highest, scale):
    """int64; the highest logit's is 2^WEIGHT_BITS."""
    return tl.exp2((x.to(tl.float64) - highest) * scale + WEIGHT_BITS).to(tl.int64)


@triton.jit
def _above(row, width, key, highest, scale, least, WEIGHS: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits are above the one of a key, or the weight of those among them that weigh at least so much."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, width, BLOCK):
        _ids, there, x = _load(row, start, width, BLOCK)
        is_above = there & (_key(x) > key)
        if WEIGHS:
            weight = _weight(x, highest, scale)
            sums += tl.where(is_above & (weight >= least), weight, 0)
        else:
            sums += is_above.to(tl.int64)
    return tl.sum(sums, axis=0)


@quick
@triton.jit
def _draw_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, decided, chosen, width, row_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """One row, if it is not decided."""
    number = tl.program_id(0)
    if tl.load(decided + number) == 0:
        row = logits + number.to(tl.int64) * row_stride
        highest_of = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, width, BLOCK):
            ids, there, x = _load(row, start, width, BLOCK)
            highest_of = tl.maximum(highest_of, x)
        highest = tl.max(highest_of, axis=0).to(tl.float64)
        scale = LOG2_E / tl.maximum(tl.load(temperatures + number), 1e-300)

        top_k = tl.load(top_ks + number)
        low, high = tl.full([], LOWEST, tl.int64), tl.full([], NOBODY, tl.int64)
        for _halving in range(32):  # the lowest key with fewer than top_k above it
            middle = (low + high) >> 1
            is_enough = _above(row, width, middle, highest, scale, 0, False, BLOCK) < top_k
            low, high = tl.where(is_enough, low, middle + 1), tl.where(is_enough, middle, high)
        k_key = high
        k_rest = top_k - _above(row, width, k_key, highest, scale, 0, False, BLOCK)  # of those at the key itself
        total = _above(row, width, k_key, highest, scale, 0, True, BLOCK) + k_rest * _weight(_logit(k_key), highest, scale)

        # An id is kept while what stands before it does not reach top_p.
        limit = tl.load(top_ps + number) * total.to(tl.float64)
        low, high = tl.full([], LOWEST, tl.int64), tl.full([], NOBODY, tl.int64)
        for _halving in range(32):
            middle = (low + high) >> 1
            is_below = _above(row, width, middle, highest, scale, 0, True, BLOCK).to(tl.float64) < limit
            low, high = tl.where(is_below, low, middle + 1), tl.where(is_below, middle, high)
        p_key = high
        before, each = _above(row, width, p_key, highest, scale, 0, True, BLOCK), _weight(_logit(p_key), highest, scale)
        least_rest, p_rest = tl.full([], 1, tl.int64), width.to(tl.int64)
        for _halving in range(20):  # the most of the equal ones of which the last is still kept
            middle = (least_rest + p_rest + 1) >> 1
            is_kept = (before + (middle - 1) * each).to(tl.float64) < limit
            least_rest, p_rest = tl.where(is_kept, middle, least_rest), tl.where(is_kept, p_rest, middle - 1)

        key = tl.maximum(k_key, p_key)
        rest = tl.where(k_key > p_key, k_rest, tl.where(k_key < p_key, p_rest, tl.minimum(k_rest, p_rest)))
        least = tl.maximum(tl.ceil(tl.load(min_ps + number) * tl.full([], 17592186044416.0, tl.float64)).to(tl.int64), 1)
        equals = tl.zeros([BLOCK], tl.int64)
        for start in range(0, width, BLOCK):
            ids, there, x = _load(row, start, width, BLOCK)
            equals += (there & (_key(x) == key)).to(tl.int64)
        of_equals = _weight(_logit(key), highest, scale)
        of_equals = tl.where(of_equals >= least, of_equals, 0)
        kept = _above(row, width, key, highest, scale, least, True, BLOCK) + tl.minimum(rest, tl.sum(equals, axis=0)) * of_equals

        # The draw runs in id order, as the twin's.
        target = tl.minimum((tl.load(uniforms + number) * kept.to(tl.float64)).to(tl.int64), kept - 1)
        found, passed, num_equal = tl.full([], NOBODY, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        for start in range(0, width, BLOCK):
            ids, there, x = _load(row, start, width, BLOCK)
            its_key, weight = _key(x), _weight(x, highest, scale)
            is_equal = (there & (its_key == key)).to(tl.int64)
            place = num_equal + tl.cumsum(is_equal, axis=0) - is_equal
            is_kept = there & ((its_key > key) | ((is_equal > 0) & (place < rest))) & (weight >= least)
            weight = tl.where(is_kept, weight, 0)
            sums = passed + tl.cumsum(weight, axis=0)
            found = tl.minimum(found, tl.min(tl.where(is_kept & (sums > target), ids, NOBODY), axis=0))
            passed += tl.sum(weight, axis=0)
            num_equal += tl.sum(is_equal, axis=0)
        tl.store(chosen + number, tl.minimum(found, width - 1).to(tl.int64))  # a row of NaN must not index beyond the end


def draw_undecided(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    uniform_R: Tensor,
    chosen_R: Tensor,
    decided_R: Tensor,
) -> Tensor:
    """``chosen_R`` (int64) with what is drawn wherever ``decided_R`` (int64) is 0; the others' programs end at once."""
    num_rows, width = logits_RV.shape
    assert logits_RV.stride(1) == 1
    out_R = chosen_R.clone()
    if num_rows:
        per_row = (temperature_R, top_k_R, top_p_R, min_p_R, uniform_R, decided_R)
        _draw_kernel[(num_rows,)](
            logits_RV, *(x.contiguous() for x in per_row), out_R, width, logits_RV.stride(0), BLOCK=BLOCK, num_warps=8
        )  # fmt: skip
    return out_R
