"""Rounding weights, and rows that they multiply, to few bits and a scale. C features that share a scale, N outputs, K input features,
T rows, G groups.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.scale_groups import GROUP

LEVELS = {"int8": 127, "int4": 7}
FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number of FP8 (four bits of exponent, three of mantissa; arXiv 2209.05433)."""

SHORTENED = GROUP["int8"] ** -0.5
"""By what sums and differences of a group must be multiplied to be as long as it was."""


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


def turned(x_xC: Tensor) -> Tensor:
    """Groups of 128 numbers by an orthogonal matrix with entries of one size (a Hadamard matrix, rows' signs drawn by lot): a number that
    is much larger than the others of its group is shared out among all, and rounding loses less. If both sides of a product are
    turned it is the same (QuaRot, arXiv 2404.00456)."""
    return _sums_and_differences(x_xC * _signs()).mul_(SHORTENED)


def turned_back(x_xC: Tensor) -> Tensor:
    """What `turned` has made of them, as they were."""
    return _sums_and_differences(x_xC.clone()).mul_(_signs() * SHORTENED)


def round_rows(x_TK: Tensor, group: int, *, turn: bool) -> Tensor:
    """``x`` in float32 with each ``group`` of a row's features rounded to 8-bit multiples of a scale of its own (the last group is filled
    up with zeros), perhaps while they are turned: the slow twin of what csrc/integers.h multiplies by, to the same 8 bits."""
    filled_TGC = F.pad(x_TK.float(), (0, -x_TK.shape[-1] % group)).unflatten(-1, (-1, group))
    filled_TGC = _sums_and_differences(filled_TGC * _signs()) if turn else filled_TGC
    most_TG1 = filled_TGC.abs().amax(-1, keepdim=True)
    inverse_TG1 = torch.where(most_TG1 > 0, torch.full_like(most_TG1, LEVELS["int8"]) / most_TG1, 0)  # 127 / x is 127 * (1 / x) in torch
    rounded_TGC = (filled_TGC * inverse_TG1).round() * (most_TG1 / LEVELS["int8"])
    rounded_TGC = turned_back(rounded_TGC * SHORTENED) if turn else rounded_TGC
    return rounded_TGC.flatten(-2)[..., : x_TK.shape[-1]]


def _sums_and_differences(x_xC: Tensor) -> Tensor:
    """Times the Hadamard matrix of 1 and -1, in place: sums in the order in which the kernel takes them."""
    apart = 1
    while apart < x_xC.shape[-1]:
        left, right = x_xC.unflatten(-1, (-1, 2, apart)).unbind(-2)
        difference = left - right
        left += right
        right.copy_(difference)
        apart *= 2
    return x_xC


@cache
def _signs() -> Tensor:
    """1 or -1 for each number of a group, by the digits of pi."""
    bits = [number >> bit & 1 for number in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344) for bit in range(32)]
    return 1 - 2 * torch.tensor(bits, dtype=torch.float32)


def round_to_fp8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (N, K) and float32 scales (N): each row's largest number becomes the largest that there is."""
    wide_NK = x_NK.float()
    scales_N = wide_NK.abs().amax(-1) / FP8_MOST
    inverse_N = torch.where(scales_N == 0, 0, 1 / scales_N)
    return (wide_NK * inverse_N.unsqueeze(-1)).clamp_(-FP8_MOST, FP8_MOST).to(FP8), scales_N
