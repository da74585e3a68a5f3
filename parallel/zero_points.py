"""Asymmetric int4 with a zero point per group, as in AWQ: a weight is ``scale * (number - zero)``. C weights of a group, X groups.

A group's scale and zero point are packed in a 32-bit word, the float16 scale in the low half, so that they are read together.
"""

import torch
from torch import Tensor

from parallel.quantisation import as_exact_multiples, sample_groups

LEVELS = 15
"""The largest number, and the largest zero point."""


def pack_words(scales_x: Tensor, zeros_x: Tensor) -> Tensor:
    """int32 words of scales (any floating dtype, rounded to float16) and integer zero points."""
    return scales_x.half().view(torch.int16).int() & 0xFFFF | zeros_x.int() << 16


def unpack_words(words_x: Tensor) -> tuple[Tensor, Tensor]:
    """The scales (float32) and zero points (int32) of packed words."""
    return words_x.to(torch.int16).view(torch.float16).float(), words_x >> 16


def quantise_groups(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise groups of float32 weights: uint8 numbers (..., C) from 0 to 15 and packed words (...).

    Weights that were stored in this form are quantised without loss, by searching for an equivalent scale and zero point among their
    exact multiples. Other groups are divided into fifteen steps from their smallest to their largest weight.
    """
    groups_XC = weight_xC.reshape(-1, weight_xC.shape[-1])
    sample_XC = sample_groups(groups_XC)
    if as_exact_multiples(sample_XC, LEVELS)[-1].any() or not sample_XC.any():
        numbers_XC, scales_X, zeros_X = _as_stored(groups_XC)
    else:
        numbers_XC, scales_X, zeros_X = _in_steps(groups_XC)
    return numbers_XC.to(torch.uint8).view(weight_xC.shape), pack_words(scales_X, zeros_X).view(weight_xC.shape[:-1])


def _as_stored(groups_XC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_in_steps`, but without loss for every group for which that is possible."""
    multiples_XC, scales_X, holds_X = as_exact_multiples(groups_XC, LEVELS)
    zeros_X = -multiples_XC.amin(-1).clamp_(max=0)
    numbers_XC = multiples_XC.add_(zeros_X.unsqueeze(-1))
    holds_X &= (zeros_X <= LEVELS) & (numbers_XC.amax(-1) <= LEVELS)
    if not holds_X.all():
        numbers_XC[~holds_X], scales_X[~holds_X], zeros_X[~holds_X] = _in_steps(groups_XC[~holds_X])
    return numbers_XC, scales_X, zeros_X


def _in_steps(weight_XC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 numbers (X, C), float16 scales and int8 zero points (X). A weight of 0 is represented exactly, as padding must be."""
    least_X, most_X = weight_XC.amin(-1).clamp_(max=0), weight_XC.amax(-1).clamp_(min=0)
    scales_X = ((most_X - least_X) / torch.full_like(most_X, LEVELS)).half()  # dividing by a Python number is rounded differently on a GPU
    inverse_X = torch.where(scales_X == 0, 0, 1 / scales_X.float())
    zeros_X = (-least_X * inverse_X).round_().nan_to_num_(0).clamp_(0, LEVELS)
    numbers_XC = (weight_XC * inverse_X.unsqueeze(-1)).round_().add_(zeros_X.unsqueeze(-1)).nan_to_num_(0).clamp_(0, LEVELS)
    return numbers_XC.to(torch.int8), scales_X, zeros_X.to(torch.int8)
