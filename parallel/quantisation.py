"""Quantisation of weights and activations in plain torch: the reference for the kernels.

C features that share a scale, N outputs, K input features, T rows, G groups, X any number of groups.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.scale_groups import GROUP_SIZE
from parallel.scale_search import choose_scales

LEVELS = {"int8": 127, "int4": 7}
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest FP8 number (e4m3; arXiv 2209.05433)."""
FP8_MIN_CAPABILITY = (8, 9)
"""The first CUDA capability with FP8 tensor cores (Ada; Hopper is 9.0), and the first for which Triton supports it."""

MAX_MULTIPLE = 16
"""In the search for a lossless scale: the largest multiple of the scale that the group's smallest nonzero weight may be."""
SAMPLED_GROUPS = 64
"""Groups that are tested before a lossless scale is searched for in all groups."""

HADAMARD_SCALE = GROUP_SIZE["int8"] ** -0.5
"""Normalises the Hadamard transform of a group of 128, so that it is orthogonal."""


def quantise_groups(weight_xC: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Quantise groups symmetrically: int8 numbers (..., C) and float16 scales (...).

    int4 uses -8 too: the scale's sign is chosen so that the weight of largest magnitude becomes -8 or close to it
    (`parallel.scale_search`). Weights of a checkpoint that was stored quantised are integer multiples of a float16 scale already. If a
    sample of the groups shows that, this scale is searched for, and such groups are quantised without loss.
    """
    groups_XC = weight_xC.reshape(-1, weight_xC.shape[-1])
    sample_XC = sample_groups(groups_XC)
    if not _in_multiples_of(_nearest_to_zero(sample_XC), sample_XC, levels)[-1].any():
        return _round_to_nearest(weight_xC, levels)
    numbers_XC, scales_X, holds_X = as_exact_multiples(groups_XC, levels)
    if not holds_X.all():
        numbers_XC[~holds_X], scales_X[~holds_X] = _round_to_nearest(groups_XC[~holds_X], levels)
    return numbers_XC.view(weight_xC.shape), scales_X.view(weight_xC.shape[:-1])


def sample_groups(groups_XC: Tensor) -> Tensor:
    """An evenly spaced sample of up to `SAMPLED_GROUPS` groups."""
    return groups_XC[:: len(groups_XC) // SAMPLED_GROUPS + 1]


def _round_to_nearest(weight_xC: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    if levels == LEVELS["int4"]:
        return choose_scales(weight_xC)
    most = weight_xC.abs().amax(-1)
    scales = (most / torch.full_like(most, levels)).half()  # dividing by a Python number is rounded differently on a GPU
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (weight_xC * inverse.unsqueeze(-1)).round_().clamp_(-levels, levels).to(torch.int8), scales


def as_exact_multiples(weight_XC: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lossless quantisation: int8 numbers (X, C), float16 scales (X), and for which groups (X, bool) it succeeded.

    Among 32 or more multiples of a scale there is nearly always a small one, so the scale is the smallest nonzero weight divided by a
    small integer.
    """
    nearest_X = _nearest_to_zero(weight_XC)
    numbers_XC, scales_X, holds_X = _in_multiples_of(nearest_X, weight_XC, levels)
    for times in range(2, min(MAX_MULTIPLE, levels + 1) + 1):
        (rest,) = holds_X.logical_not().nonzero(as_tuple=True)
        if len(rest):
            numbers_XC[rest], scales_X[rest], holds_X[rest] = _in_multiples_of(nearest_X[rest] / times, weight_XC[rest], levels)
    return numbers_XC, scales_X, holds_X


def _nearest_to_zero(weight_XC: Tensor) -> Tensor:
    """The smallest nonzero magnitude of each group (X); NaN for a group of zeros."""
    # The bits of non-negative floats are ordered like the floats. After subtracting 1, zero is above all others.
    return weight_XC.abs().view(torch.int32).sub_(1).bitwise_and_(0x7FFFFFFF).amin(-1).add_(1).view(torch.float32)


def _in_multiples_of(scales_X: Tensor, weight_XC: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `as_exact_multiples`. -8 and -128 are representable, 8 and 128 are not; a negative scale turns them into the former."""
    halves_X = scales_X.half()
    scales_X1 = halves_X.float().unsqueeze(-1)
    numbers_XC = (weight_XC / scales_X1).round_()
    lost_X = (numbers_XC * scales_X1).sub_(weight_XC).abs_().amax(-1)
    least_X, most_X = numbers_XC.amin(-1), numbers_XC.amax(-1)
    holds_X = (lost_X == 0) & (least_X >= -levels - 1) & (most_X <= levels + 1)
    turned_X = most_X > levels
    if turned_X.any():
        holds_X &= ~turned_X | (least_X >= -levels)
        numbers_XC[turned_X] *= -1
        halves_X = torch.where(turned_X, -halves_X, halves_X)
    return numbers_XC.to(torch.int8), halves_X, holds_X


def hadamard(x_xC: Tensor) -> Tensor:
    """Randomised Hadamard transform of groups of 128: an orthogonal matrix with entries of equal magnitude and random signs. It spreads
    outliers over their group, which reduces the quantisation error. A product is unchanged if both sides are transformed (QuaRot,
    arXiv 2404.00456)."""
    return _sums_and_differences(x_xC * _signs()).mul_(HADAMARD_SCALE)


def hadamard_inverse(x_xC: Tensor) -> Tensor:
    """The inverse of `hadamard`."""
    return _sums_and_differences(x_xC.clone()).mul_(_signs() * HADAMARD_SCALE)


def quantise_rows(x_TK: Tensor, group: int, *, rotate: bool) -> Tensor:
    """Quantise and dequantise rows: each ``group`` of features has one scale and 8 bits (the last group is zero-padded), if ``rotate``
    after a Hadamard transform. The reference for csrc/integers.h, with the same 8-bit numbers."""
    filled_TGC = F.pad(x_TK.float(), (0, -x_TK.shape[-1] % group)).unflatten(-1, (-1, group))
    filled_TGC = _sums_and_differences(filled_TGC * _signs()) if rotate else filled_TGC
    most_TG1 = filled_TGC.abs().amax(-1, keepdim=True)
    inverse_TG1 = torch.where(most_TG1 > 0, torch.full_like(most_TG1, LEVELS["int8"]) / most_TG1, 0)  # torch: 127 / x is 127 * (1 / x)
    rounded_TGC = (filled_TGC * inverse_TG1).round() * (most_TG1 / LEVELS["int8"])
    rounded_TGC = hadamard_inverse(rounded_TGC * HADAMARD_SCALE) if rotate else rounded_TGC
    return rounded_TGC.flatten(-2)[..., : x_TK.shape[-1]]


def _sums_and_differences(x_xC: Tensor) -> Tensor:
    """Multiply by the unnormalised Hadamard matrix, in place, with the same order of summation as the kernel."""
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
    """A random sign for each number of a group, from the binary digits of pi."""
    bits = [number >> bit & 1 for number in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344) for bit in range(32)]
    return 1 - 2 * torch.tensor(bits, dtype=torch.float32)


def quantise_fp8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to FP8: numbers (N, K) and float32 scales (N). Each row's largest magnitude becomes `FP8_MAX`."""
    wide_NK = x_NK.float()
    scales_N = wide_NK.abs().amax(-1) * (1 / FP8_MAX)  # a division is rounded differently on a GPU
    inverse_N = torch.where(scales_N == 0, 0, 1 / scales_N)
    return (wide_NK * inverse_N.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales_N
