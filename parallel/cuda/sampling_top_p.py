"""Top-p and min-p sampling for rows that keep more candidates than `parallel.cuda.sampling` can rank, with many programs per row.

Filters keep a prefix of the canonical order (descending logit, then ascending id). It ends at the lowest key above which the total weight
is less than top-p of the whole. That key is found by a `CUTS`-ary search: each pass divides the remaining range of keys into `CUTS`
intervals and sums the weight above every border; the next pass picks the interval from these sums. When a single key is left, one pass
sums the kept weight of each part, and a last launch samples a part and an id in it. The reference is
`engine.run.sampling.filters.draw_filtered`, which sorts.

R rows, V columns, N parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.aligned_rows import readable_columns
from parallel.cuda.logit_keys import (
    LOWEST,
    NO_ID,
    PART,
    count_within,
    key_shift,
    load_keys,
    min_p_weight,
    restore_key,
    row_max_key,
    sampling_weights,
    temperature_scale,
    to_logit,
)
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import next_power_of_2

CUTS = 16
"""Intervals per pass; a power of two."""


_PER_ROW = ["top_ks", "top_ps", "min_ps", "temperatures", "chosen"]
"""Arguments with arbitrary alignment: otherwise Triton compiles a second kernel for those aligned to 16 bytes."""


@triton.jit
def _bracket(
    brackets, sums, number, limit, highest, num_rows, row, num_parts, PARTS: tl.constexpr, CUTS: tl.constexpr, SHIFT: tl.constexpr
):
    """The range of (shifted) keys that contains the lowest key with less than ``limit`` above it, from the sums of the previous pass."""
    low, high = tl.full([], LOWEST, tl.int64) >> SHIFT, highest.to(tl.int64) >> SHIFT
    if number > 0:
        slot = ((number - 1) % 2) * num_rows + row
        low, high = tl.load(brackets + slot * 2), tl.load(brackets + slot * 2 + 1)
        parts, cuts = tl.arange(0, PARTS), tl.arange(0, CUTS)
        at = (slot * num_parts + parts[:, None]) * CUTS + cuts[None, :]
        above = tl.sum(tl.load(sums + at, mask=(parts < num_parts)[:, None], other=0), axis=0)
        is_less = (above.to(tl.float64) < limit) | (cuts == CUTS - 1)  # the last border is ``high``, for which it is known to hold
        first = tl.min(tl.where(is_less, cuts, CUTS), axis=0)
        step = (high - low + CUTS) // CUTS
        low, high = low + first * step, tl.minimum(low + (first + 1) * step - 1, high)
    return low, high


@quick
@triton.jit(do_not_specialize=["number", "num_rows"], do_not_specialize_on_alignment=_PER_ROW)
def _bisect_kernel(
    logits, is_decided, top_ks, top_ps, temperatures, highest_of_parts, weights_of_parts, brackets, sums,
    width, readable, row_stride, num_parts, num_rows, number,
    PARTS: tl.constexpr, PART: tl.constexpr, CUTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One pass over one part of a row: the weight above each border."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(is_decided + row) == 0) & (tl.load(top_ks + row) >= width):
        parts = tl.arange(0, PARTS)
        highest = row_max_key(highest_of_parts + row * num_parts, num_parts, PARTS)
        whole = tl.sum(tl.load(weights_of_parts + row * num_parts + parts, mask=parts < num_parts, other=0), axis=0)
        limit = tl.load(top_ps + row) * whole.to(tl.float64)
        low, high = _bracket(brackets, sums, number, limit, highest, num_rows, row, num_parts, PARTS, CUTS, SHIFT)
        slot = (number % 2) * num_rows + row
        if part == 0:
            tl.store(brackets + slot * 2, low)
            tl.store(brackets + slot * 2 + 1, high)
        keys = load_keys(logits + row * row_stride, part * PART + tl.arange(0, PART), width, readable)
        weights = sampling_weights(keys, to_logit(highest), temperature_scale(tl.load(temperatures + row)))
        keys = keys >> SHIFT
        step = (high - low + CUTS) // CUTS
        for cut in range(CUTS - 1):
            border = tl.minimum(low + (cut + 1) * step - 1, high).to(tl.int32)
            above = tl.sum(tl.where(keys > border, weights, 0), axis=0)
            tl.store(sums + (slot * num_parts + part) * CUTS + cut, above)


@triton.jit
def _end(
    row, number, num_rows, top_ps, temperatures, min_ps, highest_of_parts, weights_of_parts, brackets, sums, num_parts,
    PARTS: tl.constexpr, CUTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """After the last pass: the (shifted) key at which the kept prefix ends, the weight of a logit there, the top-p limit, the smallest
    weight that min-p keeps, the highest logit and the temperature scale."""
    parts = tl.arange(0, PARTS)
    highest = row_max_key(highest_of_parts + row * num_parts, num_parts, PARTS)
    whole = tl.sum(tl.load(weights_of_parts + row * num_parts + parts, mask=parts < num_parts, other=0), axis=0)
    limit = tl.load(top_ps + row) * whole.to(tl.float64)
    key, _high = _bracket(brackets, sums, number, limit, highest, num_rows, row, num_parts, PARTS, CUTS, SHIFT)
    scale = temperature_scale(tl.load(temperatures + row))
    each = sampling_weights(restore_key(key, SHIFT), to_logit(highest), scale)
    least = min_p_weight(tl.load(min_ps + row))
    return key.to(tl.int32), each, limit, least, to_logit(highest), scale


@quick
@triton.jit(do_not_specialize=["number", "num_rows"], do_not_specialize_on_alignment=_PER_ROW)
def _weigh_kernel(
    logits, is_decided, top_ks, top_ps, min_ps, temperatures, highest_of_parts, weights_of_parts, brackets, sums, kept,
    width, readable, row_stride, num_parts, num_rows, number,
    PARTS: tl.constexpr, PART: tl.constexpr, CUTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One part of a row: the weight above the end key, how much of it min-p keeps, and the number of logits at the end key."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(is_decided + row) == 0) & (tl.load(top_ks + row) >= width):
        end, _each, _limit, least, highest, scale = _end(
            row, number, num_rows, top_ps, temperatures, min_ps, highest_of_parts, weights_of_parts, brackets, sums, num_parts,
            PARTS, CUTS, SHIFT,
        )  # fmt: skip
        keys = load_keys(logits + row * row_stride, part * PART + tl.arange(0, PART), width, readable)
        weights = tl.where((keys >> SHIFT) > end, sampling_weights(keys, highest, scale), 0)
        to = kept + (row * num_parts + part) * 3
        tl.store(to, tl.sum(weights, axis=0))
        tl.store(to + 1, tl.sum(tl.where(weights >= least, weights, 0), axis=0))
        tl.store(to + 2, tl.sum((((keys >> SHIFT) == end) & (keys > LOWEST)).to(tl.int64), axis=0))


@quick
@triton.jit(do_not_specialize=["number", "num_rows"], do_not_specialize_on_alignment=_PER_ROW)
def _draw_kernel(
    logits, is_decided, top_ks, top_ps, min_ps, temperatures, highest_of_parts, weights_of_parts, brackets, sums, kept, uniforms, chosen,
    width, readable, row_stride, num_parts, num_rows, number,
    PARTS: tl.constexpr, PART: tl.constexpr, CUTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Samples one row."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(is_decided + row) == 0) & (tl.load(top_ks + row) >= width):
        end, each, limit, least, highest, scale = _end(
            row, number, num_rows, top_ps, temperatures, min_ps, highest_of_parts, weights_of_parts, brackets, sums, num_parts,
            PARTS, CUTS, SHIFT,
        )  # fmt: skip
        parts = tl.arange(0, PARTS)
        at, there = kept + (row * num_parts + parts) * 3, parts < num_parts
        before = tl.sum(tl.load(at, mask=there, other=0), axis=0)
        rest = count_within(before, each, limit, width)
        of_equals = tl.where(each >= least, each, 0)
        equals = tl.load(at + 2, mask=there, other=0)
        equals_before = tl.cumsum(equals, axis=0) - equals
        weights_of_kept = tl.load(at + 1, mask=there, other=0) + tl.minimum(tl.maximum(rest - equals_before, 0), equals) * of_equals
        whole = tl.sum(weights_of_kept, axis=0)
        # The cumulative sum runs in id order, as in the reference.
        target = tl.minimum((tl.load(uniforms + row) * whole.to(tl.float64)).to(tl.int64), whole - 1)
        part = tl.min(tl.where(tl.cumsum(weights_of_kept, axis=0) > target, parts, PARTS), axis=0)
        passed = tl.sum(tl.where(parts < part, weights_of_kept, 0), axis=0)
        equals_passed = tl.sum(tl.where(parts < part, equals, 0), axis=0)
        ids = part * PART + tl.arange(0, PART)
        keys = load_keys(logits + row * row_stride, ids, width, readable)
        weights = sampling_weights(keys, highest, scale)
        is_equal = (((keys >> SHIFT) == end) & (keys > LOWEST)).to(tl.int64)
        tie_index = equals_passed + tl.cumsum(is_equal, axis=0) - is_equal
        is_left = (((keys >> SHIFT) > end) | ((is_equal > 0) & (tie_index < rest))) & (weights >= least)
        reached = passed + tl.cumsum(tl.where(is_left, weights, 0), axis=0)
        found = tl.min(tl.where(is_left & (reached > target), ids, NO_ID), axis=0)
        tl.store(chosen + row, tl.minimum(found, width - 1).to(tl.int64))
        tl.store(is_decided + row, tl.full([], 1, tl.int64))


KERNELS = (_bisect_kernel, _weigh_kernel, _draw_kernel)


def draw_top_p(
    logits_RV: Tensor,
    highest_of_parts_RN: Tensor,
    weights_of_parts_RN: Tensor,
    decided_R: Tensor,
    chosen_R: Tensor,
    *,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    uniform_R: Tensor,
) -> None:
    """Sample the undecided rows without top-k: write ids to ``chosen_R`` (int64) and set ``decided_R``. The maximum key (int32) and total
    weight (int64) of each part are given. Parameters as in `engine.run.sampling.filters.DrawParams`, contiguous."""
    num_rows, num_parts = highest_of_parts_RN.shape
    width, device = logits_RV.shape[1], logits_RV.device
    brackets = torch.empty(2, num_rows, 2, dtype=torch.int64, device=device)
    sums = torch.empty(2, num_rows, num_parts, CUTS, dtype=torch.int64, device=device)
    kept = torch.empty(num_rows, num_parts, 3, dtype=torch.int64, device=device)
    shift = key_shift(logits_RV.dtype)
    num_passes = (32 - shift) // (CUTS.bit_length() - 1)
    sizes = (width, readable_columns(logits_RV), logits_RV.stride(0), num_parts, num_rows)
    options = {"PARTS": max(2, next_power_of_2(num_parts)), "PART": PART, "CUTS": CUTS, "SHIFT": shift}
    options |= {"num_warps": 8, "enable_fp_fusion": False}
    of_parts = (highest_of_parts_RN, weights_of_parts_RN, brackets, sums)
    for number in range(num_passes):
        _bisect_kernel[(num_rows, num_parts)](logits_RV, decided_R, top_k_R, top_p_R, temperature_R, *of_parts, *sizes, number, **options)
    per_row = (logits_RV, decided_R, top_k_R, top_p_R, min_p_R, temperature_R, *of_parts, kept)
    _weigh_kernel[(num_rows, num_parts)](*per_row, *sizes, num_passes, **options)
    _draw_kernel[(num_rows,)](*per_row, uniform_R, chosen_R, *sizes, num_passes, **options)
