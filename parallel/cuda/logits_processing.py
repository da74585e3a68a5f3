"""Logits processing before temperature (penalties, minimum tokens, grammar masks, logit bias) in two launches.

The reference is `engine.run.sampling.edit_table.EditTable`, which documents the tables. R rows, V columns, N entries, W words of 32 ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.aligned_rows import empty_rows, readable_columns
from parallel.cuda.logit_keys import PART, empty_parts, to_key
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv

BIASES = 128
"""Logit biases that a program adds at a time."""
ROWS = 128
"""Rows whose tokens one program counts."""


_PER_ROW = ["entries", "tokens", "starts", "stops_now", "word_rows"]
"""Arguments with arbitrary alignment: otherwise a new number of rows might trigger a compilation."""


@quick
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_PER_ROW[:3])
def _count_tokens_kernel(entries, tokens, starts, counts, known, num_rows, width, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.load(entries + rows, mask=rows < num_rows, other=-1)
    has_entry = entry >= 0
    token, start = tl.load(tokens + rows, mask=has_entry, other=0), tl.load(starts + rows, mask=has_entry, other=0)
    num_known = tl.load(known + entry, mask=has_entry, other=0)
    is_new = has_entry & (start >= num_known) & (token < width)
    address = counts + entry * width + token
    tl.store(address, tl.load(address, mask=is_new, other=0) + 2, mask=is_new)
    tl.store(known + entry, tl.maximum(num_known, start + 1), mask=has_entry)


@quick
@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=_PER_ROW[:1] + _PER_ROW[3:])
def _process_logits_kernel(
    logits, out, raw_highest, entries, counts, penalties, stop_ids, num_stop_ids, stops_now, words, word_rows,
    width, readable, row_stride, out_stride, num_words, most_stop_ids, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of a row: penalties, then ids that must not be sampled. No operations are fused, so the bits equal the reference's. The key
    of the highest unmodified logit is written to ``raw_highest``."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = ids < width
    x = tl.load(logits + row * row_stride + ids, mask=ids < readable, other=float("-inf")).to(tl.float32)
    x = tl.where(there, x, float("-inf"))
    tl.store(raw_highest + row * tl.num_programs(1) + tl.program_id(1), tl.max(to_key(x), axis=0))
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
    tl.store(out + row * out_stride + ids, x, mask=ids < out_stride)


@quick
@triton.jit(do_not_specialize_on_alignment=_PER_ROW[:1])
def _bias_kernel(out, entries, bias_ids, biases, num_biases, out_stride, most_biases, BLOCK: tl.constexpr):
    """Adds the logit biases of one row. Masked ids stay at minus infinity."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(entries + row)
    if entry >= 0:
        count = tl.load(num_biases + entry)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < count
            ids = tl.load(bias_ids + entry * most_biases + at, mask=there, other=0)
            bias = tl.load(biases + entry * most_biases + at, mask=there, other=0.0)
            address = out + row * out_stride + ids
            tl.store(address, tl.load(address, mask=there, other=0.0) + bias, mask=there)


def count_tokens(entries_R: Tensor, tokens_R: Tensor, starts_R: Tensor, counts_NV: Tensor, known_N: Tensor) -> None:
    """See `EditTable.count_tokens`."""
    num_rows = len(entries_R)
    if num_rows:
        _count_tokens_kernel[(cdiv(num_rows, ROWS),)](
            entries_R.contiguous(), tokens_R.contiguous(), starts_R.contiguous(), counts_NV, known_N, num_rows, counts_NV.shape[1],
            ROWS=ROWS, num_warps=4,
        )  # fmt: skip


def process_logits(
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
    raw_highest_RN: Tensor | None = None,
) -> Tensor:
    """The processed logits, float32 (R, V), in rows as of `empty_rows`; the input is unchanged. If ``raw_highest_RN`` is given (shape of
    `parallel.cuda.logit_keys.empty_parts`), the key of the highest input logit of each part is written to it."""
    num_rows, width = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert counts_NV.shape[1] == width
    out_RV = empty_rows(num_rows, width, dtype=torch.float32, device=logits_RV.device)
    if num_rows:
        entries_R = entries_R.contiguous()
        raw_highest_RN = empty_parts(logits_RV) if raw_highest_RN is None else raw_highest_RN
        _process_logits_kernel[(num_rows, cdiv(width, PART))](
            logits_RV, out_RV, raw_highest_RN, entries_R, counts_NV, penalties_N3, stop_ids, num_stop_ids_N, stops_now_R.contiguous(),
            words_GW, word_rows_R.contiguous(), width, readable_columns(logits_RV), logits_RV.stride(0), out_RV.stride(0),
            words_GW.shape[1], stop_ids.shape[1],
            BLOCK=PART, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        _bias_kernel[(num_rows,)](
            out_RV, entries_R, bias_ids, biases, num_biases_N, out_RV.stride(0), bias_ids.shape[1], BLOCK=BIASES, num_warps=1
        )  # fmt: skip
    return out_RV
