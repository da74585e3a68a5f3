"""Rounding weights to few bits and a scale. C features that share a scale, N outputs, K input features."""

import torch
from torch import Tensor

LEVELS = {"int8": 127, "int4": 7}
FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number of FP8 (four bits of exponent, three of mantissa; arXiv 2209.05433)."""


def round_to_groups(weight_xC: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., C) and float16 scales (...). int4 uses -8 too: the scale's sign makes it the number furthest from zero."""
    most = weight_xC.abs().amax(-1)
    if levels == LEVELS["int4"]:
        furthest = weight_xC.gather(-1, weight_xC.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales, lowest = furthest / -8, -8
    else:
        scales, lowest = most / levels, -levels
    scales = scales.half()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (weight_xC * inverse.unsqueeze(-1)).round_().clamp_(lowest, levels).to(torch.int8), scales


def round_to_fp8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (N, K) and float32 scales (N): each row's largest number becomes the largest that there is."""
    wide_NK = x_NK.float()
    scales_N = wide_NK.abs().amax(-1) / FP8_MOST
    inverse_N = torch.where(scales_N == 0, 0, 1 / scales_N)
    return (wide_NK * inverse_N.unsqueeze(-1)).clamp_(-FP8_MOST, FP8_MOST).to(FP8), scales_N
