"""What is done to logits before temperature, in two launches. The twin is `engine.run.sampling.edit_table.EditTable`, which says what the
tables hold.

R rows, V columns, N entries, W words of 32 ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv

BLOCK = 2048
"""Columns that one program edits."""
BIASES = 128
"""Biases that a program adds at a time."""


@quick
@triton.jit(do_not_specialize=["num_words"])
def _edit_kernel(
    logits, out, entries, counts, penalties, stop_ids, num_stop_ids, stops_now, words, word_rows,
    width, row_stride, num_words, most_stop_ids, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of one row: penalties, then what may not be sampled. Nothing is fused, so that the bits are the twin's."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = ids < width
    x = tl.load(logits + row * row_stride + ids, mask=there, other=float("-inf")).to(tl.float32)
    entry = tl.load(entries + row)
    if entry >= 0:
        count = tl.load(counts + entry * width + ids, mask=there, other=0)
        repetition, presence = tl.load(penalties + entry * 3), tl.load(penalties + entry * 3 + 1)
        frequency = tl.load(penalties + entry * 3 + 2)
        times = (count >> 1).to(tl.float32)
        y = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        y = y - tl.where(times > 0, presence, 0.0)
        y = y - frequency * times
        x = tl.where(count > 0, y, x)
        if tl.load(stops_now + row) > 0:
            for at in range(0, tl.load(num_stop_ids + entry)):
                x = tl.where(ids == tl.load(stop_ids + entry * most_stop_ids + at), float("-inf"), x)
    word_row = tl.load(word_rows + row)
    if word_row >= 0:
        word = tl.load(words + word_row * num_words + ids // 32, mask=there, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) > 0, x, float("-inf"))
    tl.store(out + row * width + ids, x, mask=there)


@quick
@triton.jit
def _bias_kernel(out, entries, bias_ids, biases, num_biases, width, most_biases, BLOCK: tl.constexpr):
    """One row. What may not be sampled stays at minus infinity."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(entries + row)
    if entry >= 0:
        count = tl.load(num_biases + entry)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < count
            ids = tl.load(bias_ids + entry * most_biases + at, mask=there, other=0)
            bias = tl.load(biases + entry * most_biases + at, mask=there, other=0.0)
            place = out + row * width + ids
            tl.store(place, tl.load(place, mask=there, other=0.0) + bias, mask=there)


def edited(
    logits_RV: Tensor,
    *,
    entries_R: Tensor,
    stops_now_R: Tensor,
    word_rows_R: Tensor,
    words_GW: Tensor,
    counts_NV: Tensor,
    penalties_N3: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    num_biases_N: Tensor,
    stop_ids: Tensor,
    num_stop_ids_N: Tensor,
) -> Tensor:
    """float32 (R, V); the logits stay as they are."""
    num_rows, width = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert counts_NV.shape[1] == width
    out_RV = torch.empty(num_rows, width, dtype=torch.float32, device=logits_RV.device)
    if num_rows:
        entries_R = entries_R.contiguous()
        _edit_kernel[(num_rows, cdiv(width, BLOCK))](
            logits_RV, out_RV, entries_R, counts_NV, penalties_N3, stop_ids, num_stop_ids_N, stops_now_R.contiguous(), words_GW,
            word_rows_R.contiguous(), width, logits_RV.stride(0), words_GW.shape[1], stop_ids.shape[1],
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _bias_kernel[(num_rows,)](
            out_RV, entries_R, bias_ids, biases, num_biases_N, width, bias_ids.shape[1], BLOCK=BIASES, num_warps=1
        )  # fmt: skip
    return out_RV
