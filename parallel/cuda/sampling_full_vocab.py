"""Samples rows that need candidates from the whole vocabulary, one program per row, without sorting: the last resort of
`parallel.cuda.sampling`. The reference is `engine.run.sampling.filters.draw_filtered` with all ids as candidates, which sorts.

Filters keep a prefix of the canonical order (descending logit, then ascending id). Its end is found by binary search over the keys of
the logits (`parallel.cuda.logit_keys`): 32 steps (16 for bfloat16) find the key with the required number of ids, or weight, above it.

R rows, V columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.aligned_rows import readable_columns
from parallel.cuda.logit_keys import (
    LOWEST,
    NO_ID,
    count_within,
    key_shift,
    load_keys,
    min_p_weight,
    restore_key,
    sampling_weights,
    temperature_scale,
    to_logit,
)
from parallel.cuda.quick_launch import quick

BLOCK = 2048
"""Columns that a program reads at a time."""


@triton.jit
def _above(row, width, readable, key, highest, scale, least, WEIGHS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The number of logits above a (shifted) key, or the total weight of those among them that weigh at least ``least``."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, width, BLOCK):
        keys = load_keys(row, start + tl.arange(0, BLOCK), width, readable)
        is_above = (keys >> SHIFT) > key.to(tl.int32)
        if WEIGHS:
            weights = sampling_weights(keys, highest, scale)
            sums += tl.where(is_above & (weights >= least), weights, 0)
        else:
            sums += is_above.to(tl.int64)
    return tl.sum(sums, axis=0)


@quick
@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps", "uniforms", "decided", "chosen"])
def _draw_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, decided, chosen, width, readable, row_stride,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Samples one row, unless it is decided."""
    number = tl.program_id(0)
    if tl.load(decided + number) == 0:
        row = logits + number.to(tl.int64) * row_stride
        highest_of = tl.full([BLOCK], LOWEST, tl.int32)
        for start in range(0, width, BLOCK):
            highest_of = tl.maximum(highest_of, load_keys(row, start + tl.arange(0, BLOCK), width, readable))
        most = tl.max(highest_of, axis=0)
        highest, scale = to_logit(most), temperature_scale(tl.load(temperatures + number))
        most = most.to(tl.int64) >> SHIFT  # nothing is above it

        top_k = tl.load(top_ks + number)
        low, high = tl.full([], LOWEST, tl.int64) >> SHIFT, most
        for _halving in range(32 - SHIFT):  # the lowest key with fewer than top_k above it
            middle = (low + high) >> 1
            is_enough = _above(row, width, readable, middle, highest, scale, 0, False, SHIFT, BLOCK) < top_k
            low, high = tl.where(is_enough, low, middle + 1), tl.where(is_enough, middle, high)
        k_key = high
        k_rest = top_k - _above(row, width, readable, k_key, highest, scale, 0, False, SHIFT, BLOCK)  # of those at the key itself
        total = _above(row, width, readable, k_key, highest, scale, 0, True, SHIFT, BLOCK)
        total += k_rest * sampling_weights(restore_key(k_key, SHIFT), highest, scale)

        # top-p keeps an id if the weight before it is below the limit.
        limit = tl.load(top_ps + number) * total.to(tl.float64)
        low, high = tl.full([], LOWEST, tl.int64) >> SHIFT, most
        for _halving in range(32 - SHIFT):
            middle = (low + high) >> 1
            is_below = _above(row, width, readable, middle, highest, scale, 0, True, SHIFT, BLOCK).to(tl.float64) < limit
            low, high = tl.where(is_below, low, middle + 1), tl.where(is_below, middle, high)
        p_key = high
        before = _above(row, width, readable, p_key, highest, scale, 0, True, SHIFT, BLOCK)
        each = sampling_weights(restore_key(p_key, SHIFT), highest, scale)
        p_rest = count_within(before, each, limit, width)

        key = tl.maximum(k_key, p_key)
        rest = tl.where(k_key > p_key, k_rest, tl.where(k_key < p_key, p_rest, tl.minimum(k_rest, p_rest)))
        least = min_p_weight(tl.load(min_ps + number))
        equals = tl.zeros([BLOCK], tl.int64)
        for start in range(0, width, BLOCK):
            keys = load_keys(row, start + tl.arange(0, BLOCK), width, readable)
            equals += (((keys >> SHIFT) == key.to(tl.int32)) & (keys > LOWEST)).to(tl.int64)
        of_equals = sampling_weights(restore_key(key, SHIFT), highest, scale)
        of_equals = tl.where(of_equals >= least, of_equals, 0)
        kept = _above(row, width, readable, key, highest, scale, least, True, SHIFT, BLOCK)
        kept += tl.minimum(rest, tl.sum(equals, axis=0)) * of_equals

        # The cumulative sum runs in id order, as in the reference.
        target = tl.minimum((tl.load(uniforms + number) * kept.to(tl.float64)).to(tl.int64), kept - 1)
        found, passed, num_equal = tl.full([], NO_ID, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        for start in range(0, width, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            keys = load_keys(row, ids, width, readable)
            weights = sampling_weights(keys, highest, scale)
            is_equal = (((keys >> SHIFT) == key.to(tl.int32)) & (keys > LOWEST)).to(tl.int64)
            tie_index = num_equal + tl.cumsum(is_equal, axis=0) - is_equal
            is_kept = (((keys >> SHIFT) > key.to(tl.int32)) | ((is_equal > 0) & (tie_index < rest))) & (weights >= least)
            weights = tl.where(is_kept, weights, 0)
            sums = passed + tl.cumsum(weights, axis=0)
            found = tl.minimum(found, tl.min(tl.where(is_kept & (sums > target), ids, NO_ID), axis=0))
            passed += tl.sum(weights, axis=0)
            num_equal += tl.sum(is_equal, axis=0)
        tl.store(chosen + number, tl.minimum(found, width - 1).to(tl.int64))  # a row of NaN must not index beyond the end


def draw_full_vocab(
    chosen_R: Tensor,
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    uniform_R: Tensor,
    decided_R: Tensor,
) -> None:
    """Write sampled ids to ``chosen_R`` (int64) for the rows whose ``decided_R`` (int64) is 0; programs of other rows return at once.
    Parameters as in `engine.run.sampling.filters.DrawParams`, contiguous."""
    num_rows, width = logits_RV.shape
    assert logits_RV.stride(1) == 1
    if num_rows:
        per_row = (temperature_R, top_k_R, top_p_R, min_p_R, uniform_R, decided_R, chosen_R)
        _draw_kernel[(num_rows,)](
            logits_RV, *per_row, width, readable_columns(logits_RV), logits_RV.stride(0),
            SHIFT=key_shift(logits_RV.dtype), BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
