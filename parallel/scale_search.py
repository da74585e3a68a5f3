"""The scale of a group of weights in 4 bits, chosen among some by how much of the group it leaves unsaid. C weights of a group.

The furthest weight is made -8, or a little more or less; which of these says most of the group is tried, and the scale is then the one that
fits the numbers best (as llama.cpp's `make_qx_quants` does). Squared errors count by the size of a weight and the mean of its group's
sizes: large weights tend to be where activations are large. Whatever computes it comes to the same bits, kernels of CPUs and of GPUs and
plain torch: what decides is counted in whole numbers below 2^24, so that no order of sums and no fused operation can change it.
"""

import torch
from torch import Tensor

from parallel.native.library import native, num_threads
from parallel.scale_groups import GROUP_SIZE
from parallel.weight_format import has_triton

WHOLE = 511
"""A group's furthest weight while scales are tried, and negative; the others are rounded to whole parts of it."""
LEAST = 1e-30
"""Of a furthest weight. Groups below are zeros, as what their weights are multiplied by would be infinite."""
COUNT_BITS = 4
"""That are left away of what an error counts, for it to be below 64."""
FACTOR_BITS = 15
FIRST_TRIED, LAST_TRIED, STEP_TRIED = 465, 577, 16
"""What a whole part is multiplied by, in parts of 2^15, to be a number of 4 bits: the furthest weight becomes -7.25, -7.5, -7.75 .. -9."""


def choose_scales(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., C) from -8 to 7 and float16 scales (...) of weights in float32, by a kernel where there is one."""
    assert weight_xC.dtype == torch.float32
    assert weight_xC.shape[-1] == GROUP_SIZE["int4"], "the CPU kernel relies on it"
    library = native()
    if weight_xC.device.type == "cuda" and has_triton():
        from parallel.cuda.scale_search import choose_scales as choose_on_device  # triton: not where there is no such device

        return choose_on_device(weight_xC)
    if weight_xC.device.type != "cpu" or library is None:
        return choose_scales_reference(weight_xC)
    weight_xC = weight_xC.contiguous()
    numbers_xC = torch.empty_like(weight_xC, dtype=torch.int8)
    scales_x = weight_xC.new_empty(weight_xC.shape[:-1], dtype=torch.float16)
    library.choose_scales(weight_xC.data_ptr(), numbers_xC.data_ptr(), scales_x.data_ptr(), scales_x.numel(), num_threads())
    return numbers_xC, scales_x


def choose_scales_reference(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of the kernels, to the same bits. Of a group with a weight that is no number the scale is none."""
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
    """Rounded once: by a number and a tensor torch divides as it likes (127 / x is 127 * (1 / x))."""
    return torch.full_like(divisor, dividend) / divisor
