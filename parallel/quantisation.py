"""Rounding weights, and rows that they multiply, to few bits and a scale. C features that share a scale, N outputs, K input features,
T rows, G groups.
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
"""The largest number of FP8 (four bits of exponent, three of mantissa; arXiv 2209.05433)."""
FP8_MIN_CAPABILITY = (8, 9)
"""Of CUDA devices: the first whose matrix units multiply it (Ada; Hopper is 9.0). Triton has it from there on, too."""

MAX_MULTIPLE = 16
"""How many times a group's scale the number nearest to zero is at most, where a scale is looked for that loses nothing."""
SAMPLED_GROUPS = 64
"""Looked at before that is tried with all."""

HADAMARD_SCALE = GROUP_SIZE["int8"] ** -0.5
"""By what sums and differences of a group must be multiplied to be as long as it was."""


def quantise_groups(weight_xC: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., C) and float16 scales (...). int4 uses -8 too: the scale's sign makes it the number furthest from zero, or nearly
    so (`parallel.scale_search`).

    Weights that were stored in few bits are whole multiples of a float16 number already, group by group. Nothing is lost of them: that
    number is looked for where some of the groups have one.
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
    """Up to `SAMPLED_GROUPS` of them, evenly."""
    return groups_XC[:: len(groups_XC) // SAMPLED_GROUPS + 1]


def _round_to_nearest(weight_xC: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    if levels == LEVELS["int4"]:
        return choose_scales(weight_xC)
    most = weight_xC.abs().amax(-1)
    scales = (most / torch.full_like(most, levels)).half()  # by a number torch divides in another way on a GPU
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (weight_xC * inverse.unsqueeze(-1)).round_().clamp_(-levels, levels).to(torch.int8), scales


def as_exact_multiples(weight_XC: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 numbers (X, C) and float16 scales (X) of which nothing is lost, and of which groups (X, bool) that is true.

    Of 32 or more multiples one is nearly always a small one, so a scale is a small part of the number nearest to zero.
    """
    nearest_X = _nearest_to_zero(weight_XC)
    numbers_XC, scales_X, holds_X = _in_multiples_of(nearest_X, weight_XC, levels)
    for times in range(2, min(MAX_MULTIPLE, levels + 1) + 1):
        (rest,) = holds_X.logical_not().nonzero(as_tuple=True)
        if len(rest):
            numbers_XC[rest], scales_X[rest], holds_X[rest] = _in_multiples_of(nearest_X[rest] / times, weight_XC[rest], levels)
    return numbers_XC, scales_X, holds_X


def _nearest_to_zero(weight_XC: Tensor) -> Tensor:
    """The size of each group's smallest number (X) that is not 0; what is no number where all are."""
    # The bits of sizes are in the order of the sizes. One less, and 0 is above them all.
    return weight_XC.abs().view(torch.int32).sub_(1).bitwise_and_(0x7FFFFFFF).amin(-1).add_(1).view(torch.float32)


def _in_multiples_of(scales_X: Tensor, weight_XC: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `as_exact_multiples`. -8 and -128 are numbers too, 8 and 128 are not: a negative scale may make them so."""
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
    """Groups of 128 numbers by an orthogonal matrix with entries of one size (a Hadamard matrix, rows' signs drawn by lot): a number that
    is much larger than the others of its group is shared out among all, and rounding loses less. If both sides of a product are
    turned it is the same (QuaRot, arXiv 2404.00456)."""
    return _sums_and_differences(x_xC * _signs()).mul_(HADAMARD_SCALE)


def hadamard_inverse(x_xC: Tensor) -> Tensor:
    """What `hadamard` has made of them, as they were."""
    return _sums_and_differences(x_xC.clone()).mul_(_signs() * HADAMARD_SCALE)


def quantise_rows(x_TK: Tensor, group: int, *, rotate: bool) -> Tensor:
    """``x`` in float32 with each ``group`` of a row's features rounded to 8-bit multiples of a scale of its own (the last group is filled
    up with zeros), perhaps while they are turned: the slow twin of what csrc/integers.h multiplies by, to the same 8 bits."""
    filled_TGC = F.pad(x_TK.float(), (0, -x_TK.shape[-1] % group)).unflatten(-1, (-1, group))
    filled_TGC = _sums_and_differences(filled_TGC * _signs()) if rotate else filled_TGC
    most_TG1 = filled_TGC.abs().amax(-1, keepdim=True)
    inverse_TG1 = torch.where(most_TG1 > 0, torch.full_like(most_TG1, LEVELS["int8"]) / most_TG1, 0)  # 127 / x is 127 * (1 / x) in torch
    rounded_TGC = (filled_TGC * inverse_TG1).round() * (most_TG1 / LEVELS["int8"])
    rounded_TGC = hadamard_inverse(rounded_TGC * HADAMARD_SCALE) if rotate else rounded_TGC
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


def quantise_fp8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers (N, K) and float32 scales (N): each row's largest number becomes the largest that there is."""
    wide_NK = x_NK.float()
    scales_N = wide_NK.abs().amax(-1) * (1 / FP8_MAX)  # by a quotient torch takes another way on a GPU
    inverse_N = torch.where(scales_N == 0, 0, 1 / scales_N)
    return (wide_NK * inverse_N.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales_N
