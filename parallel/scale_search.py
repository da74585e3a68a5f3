"""Search for the int4 scale of a group that minimises the weighted squared error. C weights of a group.

Several scales are tried that map the weight of largest magnitude to about -8. For the candidate that explains most of the group, the scale
is refitted to the quantised numbers by least squares (as llama.cpp's ``make_qx_quants`` does). An error is weighted by the magnitude of its
weight plus the group's mean magnitude: large weights tend to meet large activations.

CPU kernel, GPU kernel and plain torch give identical bits: whatever decides is computed in integers below 2^24, so neither the order of
summation nor fused operations can change it.
"""

import torch
from torch import Tensor

from parallel.native.library import native, num_threads
from parallel.scale_groups import GROUP_SIZE
from parallel.weight_format import has_triton

WHOLE = 511
"""During the search, weights are integers scaled so that the one of largest magnitude is minus this."""
LEAST = 1e-30
"""Groups whose largest magnitude is not above this become zeros, as the inverse of their scale would be infinite."""
COUNT_BITS = 4
"""Low bits dropped from the weight of an error, so that it stays below 64."""
FACTOR_BITS = 15
FIRST_TRIED, LAST_TRIED, STEP_TRIED = 465, 577, 16
"""Tried factors from these integers to int4 numbers, in units of 2^-15: they map the largest magnitude to -7.25, -7.5, -7.75 .. -9."""


def choose_scales(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., C) from -8 to 7 and float16 scales (...) of float32 weights, by a kernel where available."""
    assert weight_xC.dtype == torch.float32
    assert weight_xC.shape[-1] == GROUP_SIZE["int4"], "the CPU kernel relies on it"
    library = native()
    if weight_xC.device.type == "cuda" and has_triton():
        from parallel.cuda.scale_search import choose_scales as choose_on_device  # imports triton

        return choose_on_device(weight_xC)
    if weight_xC.device.type != "cpu" or library is None:
        return choose_scales_reference(weight_xC)
    weight_xC = weight_xC.contiguous()
    numbers_xC = torch.empty_like(weight_xC, dtype=torch.int8)
    scales_x = weight_xC.new_empty(weight_xC.shape[:-1], dtype=torch.float16)
    library.choose_scales(weight_xC.data_ptr(), numbers_xC.data_ptr(), scales_x.data_ptr(), scales_x.numel(), num_threads())
    return numbers_xC, scales_x


def choose_scales_reference(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """Reference for the kernels, bit-identical. The scale of a group that holds a NaN or infinity is NaN."""
    top_x1, bottom_x1 = weight_xC.amax(-1, keepdim=True), -weight_xC.amin(-1, keepdim=True)
    most_x1 = torch.maximum(top_x1, bottom_x1)
    is_sound_x1 = (weight_xC * 0).sum(-1, keepdim=True) == 0
    is_any_x1 = is_sound_x1 & (most_x1 > LEAST)
    signed_x1 = torch.where(is_any_x1, torch.where(bottom_x1 >= top_x1, most_x1, -most_x1), 1)
    weight_xC = torch.where(is_any_x1, weight_xC, 0)
    whole_xC = (weight_xC * _quotient(WHOLE, signed_x1)).round_()
    sizes_xC = whole_xC.abs()
    mean_x1 = (sizes_xC.sum(-1, keepdim=True) / weight_xC.shape[-1]).floor_()
    counts_xC = ((sizes_xC + mean_x1) * 2**-COUNT_BITS).floor_()
    counted_xC = counts_xC * whole_xC
    most_explained_x1, fitted_x1 = torch.full_like(most_x1, -1), torch.zeros_like(most_x1)
    for factor in range(FIRST_TRIED, LAST_TRIED + 1, STEP_TRIED):
        numbers_xC = (whole_xC * factor).add_(2 ** (FACTOR_BITS - 1)).mul_(2**-FACTOR_BITS).floor_().clamp_(-8, 7)
        product_x1 = (numbers_xC * counted_xC).sum(-1, keepdim=True)
        square_x1 = numbers_xC.square_().mul_(counts_xC).sum(-1, keepdim=True).clamp_(1)
        explained_x1 = product_x1 * product_x1 / square_x1
        fitted_x1 = torch.where(explained_x1 > most_explained_x1, product_x1 / square_x1, fitted_x1)
        most_explained_x1 = torch.maximum(explained_x1, most_explained_x1)
    unit_x1 = signed_x1 / torch.full_like(signed_x1, WHOLE)
    scales_x1 = torch.where(is_sound_x1, fitted_x1 * unit_x1, torch.nan).half()
    inverse_x1 = torch.where(is_any_x1 & (scales_x1 != 0), _quotient(1, scales_x1.float()), 0)
    return (weight_xC * inverse_x1).round_().clamp_(-8, 7).to(torch.int8), scales_x1.squeeze(-1)


def _quotient(dividend: float, divisor: Tensor) -> Tensor:
    """A quotient rounded once. (With a Python number torch may compute 127 / x as 127 * (1 / x).)"""
    return torch.full_like(divisor, dividend) / divisor
