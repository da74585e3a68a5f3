"""Samples the next token of each row of logits with the row's own parameters, in a few launches (plain torch takes about 40).

The references, which give identical tokens, are `engine.run.sampling.top_k.highest`, `engine.run.sampling.filters.draw_unfiltered` and
`draw_filtered`.

1. *Stretches*: the maximum of every `STRETCH` ids and of every part of `PART` ids. Many programs per row.
2. *Weights*: the total weight (unnormalised probability) of each part, for rows that sample from the whole vocabulary or with top-p
   only. Many programs per row.
3. *Rows*: one program per row samples. If filters can keep only few ids, the candidates are found through the stretches: a threshold is
   chosen that at least as many stretch maxima reach as ids are wanted. All ids at or above the threshold are in those stretches, ties
   included.
4. Rows that these candidates cannot decide go to `parallel.cuda.sampling_top_p`, and the rest to `parallel.cuda.sampling_full_vocab`.

Logits are compared as order-preserving 32-bit integers (*keys*, `parallel.cuda.logit_keys`). R rows, V columns, N parts, S stretches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.aligned_rows import readable_columns
from parallel.cuda.logit_keys import (
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    NO_ID,
    PART,
    empty_parts,
    load_keys,
    row_max_key,
    sampling_weights,
    temperature_scale,
    to_logit,
)
from parallel.cuda.noise import uniform_of
from parallel.cuda.quick_launch import quick
from parallel.cuda.sampling_full_vocab import draw_full_vocab
from parallel.cuda.sampling_top_p import draw_top_p
from parallel.cuda.sizes import next_power_of_2

STRETCH = 128
ROOM = 2048
"""Candidates of a row that can be stored before they are reduced to `FEW`."""
FEW = 128
"""Most candidates that are ranked, by comparing each with each."""
CHUNK = 4096
"""Columns that a row's program reads at a time when it collects candidates."""
SIZES = {"STRETCH": STRETCH, "CHUNK": CHUNK, "ROOM": ROOM, "FEW": FEW}
ROWS_OPTIONS = {"num_warps": 8}
MAX_WANTED = tl.constexpr(112)
"""Candidates collected for a row that has no top-k, or a larger one."""
SLACK = tl.constexpr(12)
"""The threshold search stops when at most this many stretches more than wanted are left."""
GREEDY, FEW_KIND, FILTERED, UNFILTERED = (tl.constexpr(kind) for kind in range(4))
"""As in `engine.run.sampling.columns`."""


@quick
@triton.jit
def _stretches_kernel(
    logits, highest_of_stretches, highest_of_parts, width, readable, row_stride, num_parts, STRETCH: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Maxima of one part of a row and of its stretches."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    NUM: tl.constexpr = PART // STRETCH
    stretches = part * NUM + tl.arange(0, NUM)
    ids = stretches[:, None] * STRETCH + tl.arange(0, STRETCH)[None, :]
    highest = tl.max(load_keys(logits + row * row_stride, ids, width, readable), axis=1)
    tl.store(highest_of_stretches + row * num_parts * NUM + stretches, highest)
    tl.store(highest_of_parts + row * num_parts + part, tl.max(highest, axis=0))


@quick
@triton.jit(do_not_specialize_on_alignment=["kinds", "temperatures"])
def _weights_kernel(
    logits, kinds, temperatures, highest_of_parts, weights_of_parts, width, readable, row_stride, num_parts,
    PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Total weight of one part of a row, if the row samples without filters or needs the total for top-p."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(kinds + row) >= FILTERED:
        highest = row_max_key(highest_of_parts + row * num_parts, num_parts, PARTS)
        keys = load_keys(logits + row * row_stride, part * PART + tl.arange(0, PART), width, readable)
        weights = sampling_weights(keys, to_logit(highest), temperature_scale(tl.load(temperatures + row)))
        tl.store(weights_of_parts + row * num_parts + part, tl.sum(weights, axis=0))


@triton.jit
def _reached(keys, wanted, low, high, count, most):
    """Binary search for a threshold: a key that at least ``wanted`` of the int32 ``keys`` reach, and how many do. That is at most ``most``,
    unless equal keys make it more. ``high`` is the maximum of the keys, and ``count`` of them are at least ``low``; ``low`` is returned if
    fewer than ``wanted`` exist."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while (low < high) & (count > most):
        middle = (low + high + 1) >> 1
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        is_enough = reached >= wanted
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle - 1)
        count = tl.where(is_enough, reached, count)
    return low.to(tl.int32), count


@triton.jit
def _candidates(
    row, highs, highest, wanted, stretches, ids_of, keys_of, width, readable,
    STRETCH: tl.constexpr, STRETCHES: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Writes the ids and keys of all logits at or above some threshold, in ascending order of id. Returns their number, which is at least
    ``wanted`` unless fewer are above minus infinity, and whether they are all that are above minus infinity. A number above ``FEW`` means
    that they did not fit and must not be used."""
    indices = tl.arange(0, STRETCHES)
    num_stretches = tl.sum((highs > LOWEST).to(tl.int32), axis=0)
    low = tl.min(tl.where(highs > LOWEST, highs, highest), axis=0)
    low, _count = _reached(highs, wanted, low, highest, num_stretches, wanted + SLACK)
    bottom = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32) + 1
    low = tl.where(num_stretches < wanted, bottom, tl.maximum(low, bottom))
    is_in = highs >= low
    tl.store(stretches + tl.cumsum(is_in.to(tl.int32), axis=0) - 1, indices, mask=is_in)
    num_in = tl.sum(is_in.to(tl.int32), axis=0)
    tl.debug_barrier()

    found, start = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    inside = tl.arange(0, CHUNK)
    while (start < num_in) & (found <= ROOM):
        at = start + inside // STRETCH
        some_ids = tl.load(stretches + at, mask=at < num_in, other=0) * STRETCH + inside % STRETCH
        some_keys = tl.where(at < num_in, load_keys(row, some_ids, width, readable), LOWEST)
        is_high = some_keys >= low
        to = found + tl.cumsum(is_high.to(tl.int32), axis=0) - 1
        tl.store(ids_of + to, some_ids, mask=is_high & (to < ROOM))
        tl.store(keys_of + to, some_keys, mask=is_high & (to < ROOM))
        found += tl.sum(is_high.to(tl.int32), axis=0)
        start += CHUNK // STRETCH
    tl.debug_barrier()

    are_all = low == bottom
    if (found > FEW) & (found <= ROOM):
        room = tl.arange(0, ROOM)
        its_keys = tl.load(keys_of + room, mask=room < found, other=LOWEST)
        its_ids = tl.load(ids_of + room, mask=room < found, other=0)
        higher, found = _reached(its_keys, wanted, low, highest, found, FEW)
        are_all = are_all & (higher == low)
        is_left = its_keys >= higher
        left_to = tl.cumsum(is_left.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(ids_of + left_to, its_ids, mask=is_left)
        tl.store(keys_of + left_to, its_keys, mask=is_left)
        tl.debug_barrier()
    return found, are_all


@triton.jit
def _draw_filtered(ids_of, keys_of, found, are_all, highest, scale, top_k, top_p, least, uniform, whole, width, FEW: tl.constexpr):
    """The id sampled among the candidates, and whether the candidates suffice to decide it. ``least``: the smallest weight that min-p
    keeps. ``whole``: the total weight of all ids if known, else negative."""
    indices = tl.arange(0, FEW)
    there = indices < found
    keys = tl.load(keys_of + indices, mask=there, other=LOWEST)
    ids = tl.load(ids_of + indices, mask=there, other=NO_ID)
    weights = sampling_weights(keys, highest, scale)
    ranks, before = tl.zeros([FEW], tl.int32), tl.zeros([FEW], tl.int64)
    for start in range(0, FEW, 32):  # the canonical order: by falling logit, then by rising id
        others = start + tl.arange(0, 32)
        their_keys = tl.load(keys_of + others, mask=others < found, other=LOWEST)
        is_before = (their_keys[None, :] > keys[:, None]) | ((their_keys[None, :] == keys[:, None]) & (others[None, :] < indices[:, None]))
        is_before = is_before & (others < found)[None, :]
        ranks += tl.sum(is_before.to(tl.int32), axis=1)
        before += tl.sum(tl.where(is_before, sampling_weights(their_keys, highest, scale)[None, :], 0), axis=1)
    is_within = there & (ranks < top_k)
    total = tl.sum(tl.where(is_within, weights, 0), axis=0)
    is_known = are_all | (top_k <= found) | (whole >= 0) | (top_p >= 1)
    total = tl.where(whole >= 0, whole, total)
    limit = tl.where(top_p < 1, top_p * total.to(tl.float64), float("inf"))
    is_kept = (weights.to(tl.float64) >= least) & (weights > 0) & (before.to(tl.float64) < limit)
    is_kept = is_within & (is_kept | (ranks == 0))
    is_decided = is_known & (are_all | (top_k <= found) | (tl.sum(is_kept.to(tl.int32), axis=0) < found))
    # The cumulative sum runs in id order, as in the reference.
    sums = tl.cumsum(tl.where(is_kept, weights, 0), axis=0)
    kept = tl.sum(tl.where(is_kept, weights, 0), axis=0)
    target = tl.minimum((uniform * kept.to(tl.float64)).to(tl.int64), kept - 1)
    return tl.min(tl.where(is_kept & (sums > target), ids, NO_ID), axis=0), is_decided


@triton.jit
def _draw_unfiltered(row, weights_of_parts, highest, scale, uniform, width, readable, PARTS: tl.constexpr, PART: tl.constexpr):
    """The id sampled from the whole vocabulary: first a part, then an id within it."""
    parts = tl.arange(0, PARTS)
    whole = tl.sum(weights_of_parts, axis=0)
    target = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)
    part = tl.min(tl.where(tl.cumsum(weights_of_parts, axis=0) > target, parts, PARTS), axis=0)
    passed = tl.sum(tl.where(parts < part, weights_of_parts, 0), axis=0)
    ids = part * PART + tl.arange(0, PART)
    weights = sampling_weights(load_keys(row, ids, width, readable), highest, scale)
    return tl.min(tl.where(passed + tl.cumsum(weights, axis=0) > target, ids, NO_ID), axis=0)


_PER_ROW = ["kinds", "seeds", "choices", "positions", "top_ks", "temperatures", "top_ps", "min_ps", "chosen", "raw_is_sound", "is_sound"]
"""Arguments with arbitrary alignment: otherwise Triton compiles a second kernel for those aligned to 16 bytes."""


@quick
@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _rows_kernel(
    logits, highest_of_stretches, highest_of_parts, raw_highest_of_parts, weights_of_parts,
    kinds, seeds, choices, positions, top_ks, temperatures, top_ps, min_ps,
    chosen, raw_is_sound, is_sound, is_decided, uniforms, stretches, ids_of, keys_of,
    width, readable, row_stride, num_parts,
    MOST: tl.constexpr, STRETCH: tl.constexpr, PART: tl.constexpr, STRETCHES: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Samples one row. ``MOST``: the most complex kind that may occur in the batch; code for kinds above it is not compiled."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    parts = tl.arange(0, PARTS)
    highs = tl.load(highest_of_parts + number * num_parts + parts, mask=parts < num_parts, other=LOWEST)
    highest = tl.max(highs, axis=0)
    sound = (highest > KEY_OF_MINUS_INFINITY) & (highest < KEY_OF_INFINITY)
    raw = tl.max(tl.load(raw_highest_of_parts + number * num_parts + parts, mask=parts < num_parts, other=LOWEST), axis=0)
    tl.store(is_sound + number, sound.to(tl.int64))
    tl.store(raw_is_sound + number, ((raw > KEY_OF_MINUS_INFINITY) & (raw < KEY_OF_INFINITY)).to(tl.int64))
    kind = tl.load(kinds + number) if MOST > GREEDY else tl.full([], 0, tl.int64)  # if all rows are greedy, `kinds` is not filled in
    if (kind == GREEDY) | (sound == 0):
        first = tl.min(tl.where(highs == highest, parts, PARTS), axis=0)
        ids = first * PART + tl.arange(0, PART)
        found = tl.min(tl.where(load_keys(row, ids, width, readable) == highest, ids, NO_ID), axis=0)
        tl.store(chosen + number, tl.minimum(found, width - 1).to(tl.int64))
        tl.store(is_decided + number, tl.full([], 1, tl.int64))
    elif MOST > GREEDY:
        scale, its_highest = temperature_scale(tl.load(temperatures + number)), to_logit(highest)
        uniform = uniform_of(tl.load(seeds + number), tl.load(choices + number), tl.load(positions + number), 0)
        whole = tl.full([], -1, tl.int64)
        if MOST > FEW_KIND:  # noqa: SIM102 (else nothing of it is compiled)
            if kind == UNFILTERED:
                weights = tl.load(weights_of_parts + number * num_parts + parts, mask=parts < num_parts, other=0)
                its_id = _draw_unfiltered(row, weights, its_highest, scale, uniform, width, readable, PARTS, PART)
                tl.store(chosen + number, tl.minimum(its_id, width - 1).to(tl.int64))
                tl.store(is_decided + number, tl.full([], 1, tl.int64))
        if kind != UNFILTERED:
            top_k = tl.load(top_ks + number)
            if MOST > FEW_KIND:  # noqa: SIM102
                if (kind == FILTERED) & (top_k >= width):
                    whole = tl.sum(tl.load(weights_of_parts + number * num_parts + parts, mask=parts < num_parts, other=0), axis=0)
            wanted = tl.minimum(top_k, MAX_WANTED).to(tl.int32)
            indices = tl.arange(0, STRETCHES)
            there = indices < num_parts * (PART // STRETCH)
            stretch_highs = tl.load(highest_of_stretches + number * num_parts * (PART // STRETCH) + indices, mask=there, other=LOWEST)
            row_ids, row_keys = ids_of + number * ROOM, keys_of + number * ROOM
            found, are_all = _candidates(
                row, stretch_highs, highest, wanted, stretches + number * STRETCHES, row_ids, row_keys, width, readable,
                STRETCH, STRETCHES, CHUNK, ROOM, FEW,
            )  # fmt: skip
            least = tl.load(min_ps + number) * tl.full([], 17592186044416.0, tl.float64)
            drawn, decided = _draw_filtered(
                row_ids, row_keys, tl.minimum(found, FEW), are_all, its_highest, scale, top_k, tl.load(top_ps + number), least, uniform,
                whole, width, FEW,
            )  # fmt: skip
            tl.store(chosen + number, tl.minimum(drawn, width - 1).to(tl.int64))
            tl.store(is_decided + number, (decided & (found <= FEW)).to(tl.int64))
            tl.store(uniforms + number, uniform)


def draw(
    logits_RV: Tensor,
    report_3R: Tensor,
    *,
    hardest_mode: int,
    mode_R: Tensor,
    seed_R: Tensor,
    choice_R: Tensor,
    position_R: Tensor,
    top_k_R: Tensor,
    temperature_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    raw_highest_RN: Tensor | None = None,
) -> None:
    """Write to ``report_3R`` (int64): the sampled ids, whether the maximum of the model's logits is finite, and whether that of
    ``logits_RV`` is.

    Each row is sampled in its mode (`engine.run.sampling.columns.DRAW_MODE`). ``hardest_mode`` is the most complex one that may occur; if
    it is greedy, no other argument is read. Parameters as in `engine.run.sampling.filters.DrawParams`, contiguous, int64 except the last
    three, which are float64. ``raw_highest_RN``: keys of the model's highest logit in each part (`parallel.cuda.logit_keys`), if
    ``logits_RV`` were modified.
    """
    num_rows, width = logits_RV.shape
    if not num_rows:
        return
    of_stretches, of_parts = _search(logits_RV)
    (num_stretches, num_parts), device = (of_stretches.shape[1], of_parts.shape[1]), logits_RV.device
    stretches_padded = next_power_of_2(num_stretches)
    shape = (width, readable_columns(logits_RV), logits_RV.stride(0))
    decided_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    weights, uniform_R = empty_parts(logits_RV, torch.int64), torch.empty(num_rows, dtype=torch.float64, device=device)
    stretches, ids, keys = (torch.empty(num_rows, size, dtype=torch.int32, device=device) for size in (stretches_padded, ROOM, ROOM))
    parts_padded = max(2, next_power_of_2(num_parts))
    if hardest_mode > FEW_KIND.value:
        _weights_kernel[(num_rows, num_parts)](
            logits_RV, mode_R, temperature_R, of_parts, weights, *shape, num_parts,
            PARTS=parts_padded, PART=PART, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _rows_kernel[(num_rows,)](
        logits_RV, of_stretches, of_parts, of_parts if raw_highest_RN is None else raw_highest_RN, weights,
        mode_R, seed_R, choice_R, position_R, top_k_R, temperature_R, top_p_R, min_p_R,
        report_3R[0], report_3R[1], report_3R[2], decided_R, uniform_R, stretches, ids, keys,
        *shape, num_parts,
        MOST=hardest_mode, PART=PART, STRETCHES=max(2, stretches_padded), PARTS=parts_padded,
        **SIZES, **ROWS_OPTIONS, enable_fp_fusion=False,
    )  # fmt: skip
    if hardest_mode > FEW_KIND.value:
        draw_top_p(
            logits_RV, of_parts, weights, decided_R, report_3R[0], temperature_R=temperature_R, top_k_R=top_k_R, top_p_R=top_p_R,
            min_p_R=min_p_R, uniform_R=uniform_R,
        )  # fmt: skip
    if hardest_mode > GREEDY.value:
        draw_full_vocab(report_3R[0], logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, uniform_R, decided_R)


def highest_of_parts(logits_RV: Tensor) -> Tensor:
    """Keys (int32) of the highest logit in each part (R, N)."""
    return _search(logits_RV)[1]


def _search(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the highest logit in each stretch and in each part."""
    of_parts = empty_parts(logits_RV)
    num_rows, num_parts = of_parts.shape
    assert logits_RV.stride(1) == 1
    of_stretches = torch.empty(num_rows, num_parts * (PART // STRETCH), dtype=torch.int32, device=logits_RV.device)
    _stretches_kernel[(num_rows, num_parts)](
        logits_RV, of_stretches, of_parts, logits_RV.shape[1], readable_columns(logits_RV), logits_RV.stride(0), num_parts,
        STRETCH=STRETCH, PART=PART, num_warps=4,
    )  # fmt: skip
    return of_stretches, of_parts
