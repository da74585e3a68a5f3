"""Temperature, top-k, top-p, min-p and the draw itself, in integer arithmetic.

R rows, V ids that can be sampled, C candidates.

The *canonical order* of a row is by descending logit, then by ascending id. Each filter keeps a prefix of that order, so all of them
together are one number per row: how many ids are kept. Probabilities are converted to integers, whose sums do not depend on the order of
summation: a row's result is the same whatever other rows are in the batch and however a device adds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.run.sampling.top_k import candidates, num_certain

WEIGHT_BITS = 44
"""The most probable id weighs 2^44 and the others in proportion, rounded down. An id with less than 2^-44 of its probability is never
drawn."""

MAX_VOCAB_SIZE = 2 ** (62 - WEIGHT_BITS)
"""So that the sum of all weights fits an int64."""

_WHOLE_ELEMENTS = 2**23
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DrawParams:
    """One value per row. The first four are those of `SamplingParams`; temperature is positive."""

    temperature_R: Tensor
    """float64"""
    top_k_R: Tensor
    """int64; off = V"""
    top_p_R: Tensor
    """float64; off = 1"""
    min_p_R: Tensor
    """float64; off = 0"""
    uniform_R: Tensor
    """float64 in (0, 1): the noise"""

    def rows(self, rows: Tensor | slice) -> "DrawParams":
        return DrawParams(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_unfiltered(logits_RV: Tensor, params: DrawParams) -> tuple[Tensor, Tensor]:
    """Ids (R) drawn from the whole vocabulary with temperature only, and the total weight (R, int64) of all ids."""
    drawn = [_invert_cdf(weights_RV, uniform_R) for weights_RV, uniform_R in _total_weights(logits_RV, params)]
    chosen, weights = zip(*drawn, strict=True)
    return torch.cat(chosen), torch.cat(weights)


def total_weight(logits_RV: Tensor, params: DrawParams) -> Tensor:
    """The total weight (R, int64) of all ids."""
    return torch.cat([weights_RV.sum(-1) for weights_RV, _ in _total_weights(logits_RV, params)])


def draw_filtered(logits_RV: Tensor, params: DrawParams, num_candidates: int, total_weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids (R) drawn among those that the filters keep, and whether each row is decided (R, bool).

    A row is undecided if a filter might keep more than the certain part of the ``num_candidates`` highest logits. Its id is then
    meaningless: draw again with ``num_candidates`` = V, which decides every row at the cost of sorting it. ``total_weight_R`` is needed
    for rows with top-p but no top-k; None if there are none.
    """
    values_RC, ids_RC = candidates(logits_RV, num_candidates)
    ordered_RC, order_RC = values_RC.sort(dim=-1, descending=True, stable=True)
    weights_RC = _weights(ordered_RC, ordered_RC[:, 0], params.temperature_R)
    num_kept_R = _num_kept(weights_RC, params, logits_RV.shape[1], total_weight_R)
    decided_R = num_kept_R <= num_certain(ordered_RC, logits_RV.shape[1])
    # For a top-k beyond the candidates the weight that top-p is a fraction of is unknown. A top-p of 1 keeps everything with weight.
    decided_R &= (params.top_k_R <= num_candidates) | (params.top_k_R >= logits_RV.shape[1]) | (params.top_p_R >= 1)
    places_C = torch.arange(weights_RC.shape[1], device=weights_RC.device)
    kept_RC = weights_RC * (places_C < num_kept_R.unsqueeze(-1))
    # The draw runs in id order: a rounding error that swaps two almost equal logits then barely moves the boundaries.
    by_id_RC = torch.empty_like(kept_RC).scatter_(-1, order_RC, kept_RC)
    place_R, _ = _invert_cdf(by_id_RC, params.uniform_R)
    return ids_RC.gather(-1, place_R.unsqueeze(-1)).squeeze(-1), decided_R


def draw_undecided(logits_RV: Tensor, params: DrawParams, chosen_R: Tensor, decided_R: Tensor) -> Tensor:
    """``chosen_R``, redrawn from the whole vocabulary where ``decided_R`` (int64) is 0. Never waits for the host."""
    drawn_R, _ = draw_filtered(logits_RV, params, logits_RV.shape[1], total_weight(logits_RV, params))
    return torch.where(decided_R > 0, chosen_R, drawn_R)


def _num_kept(weights_RC: Tensor, params: DrawParams, vocab_size: int, total_weight_R: Tensor | None) -> Tensor:
    """The length (R), at least 1, of the prefix of the canonical order that top-k, top-p and min-p keep."""
    count = weights_RC.shape[1]
    sums_RC = weights_RC.cumsum(-1)
    total_R = sums_RC.gather(-1, (params.top_k_R.clamp(max=count) - 1).unsqueeze(-1)).squeeze(-1)
    if total_weight_R is not None:
        total_R = torch.where(params.top_k_R < vocab_size, total_R, total_weight_R)
    # An id is kept while the weight before it is below top_p of the total. With top_p = 1 that is every id with weight.
    before_RC = (sums_RC - weights_RC).to(torch.float64)
    by_top_p_R = (before_RC < (params.top_p_R * total_R).unsqueeze(-1)).sum(-1)
    by_min_p_R = (weights_RC >= (params.min_p_R * 2.0**WEIGHT_BITS).unsqueeze(-1)).sum(-1)
    drawable_R = (weights_RC > 0).sum(-1)
    filters_KR = torch.stack([params.top_k_R, by_top_p_R, by_min_p_R, drawable_R])
    return filters_KR.amin(0).clamp(min=1)


def _total_weights(logits_RV: Tensor, params: DrawParams) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of all ids and the uniforms, for some rows at a time: in float64 a whole batch could fill a device's free memory."""
    step = max(1, _WHOLE_ELEMENTS // logits_RV.shape[1])
    for start in range(0, logits_RV.shape[0], step):
        some, logits = params.rows(slice(start, start + step)), logits_RV[start : start + step]
        yield _weights(logits, logits.amax(-1), some.temperature_R), some.uniform_R


def _weights(logits_RC: Tensor, highest_R: Tensor, temperature_R: Tensor) -> Tensor:
    """int64 (R, C): exp(logit / temperature), scaled so that the highest logit weighs 2^WEIGHT_BITS."""
    # in one expression torch would allocate a third tensor
    below_RC = logits_RC.to(torch.float64, copy=True).sub_(highest_R.to(torch.float64).unsqueeze(-1))
    # 2^(x log2(e) / temperature + WEIGHT_BITS) needs one pass over the vocabulary less than exp and a product.
    bits = torch.full((), WEIGHT_BITS, dtype=torch.float64, device=logits_RC.device)
    scale_R = _LOG2_E / temperature_R.clamp(min=1e-300)  # finite, because infinity times the highest logit's 0 would be NaN
    return torch.addcmul(bits, below_RC, scale_R.unsqueeze(-1), out=below_RC).exp2_().to(torch.int64)


def _invert_cdf(weights_RC: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """The index (R) in each row where the cumulative weight first exceeds the uniform's share of the total, and the total (R)."""
    sums_RC = weights_RC.cumsum(-1)
    total_R = sums_RC[:, -1]
    target_R = torch.minimum((uniform_R * total_R).to(torch.int64), total_R - 1)
    place_R1 = torch.searchsorted(sums_RC, target_R.unsqueeze(-1), right=True)
    return place_R1.squeeze(-1).clamp(max=weights_RC.shape[1] - 1), total_R  # a row of NaN must not index out of range
