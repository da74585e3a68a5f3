"""`parallel.scale_search` as a kernel; each program processes `BLOCK` groups of weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.sizes import cdiv
from parallel.scale_search import COUNT_BITS, FIRST_TRIED, LAST_TRIED, LEAST, STEP_TRIED, WHOLE

BLOCK = 64
SIZES = {
    "FIRST": FIRST_TRIED,
    "LAST": LAST_TRIED,
    "STEP": STEP_TRIED,
    "WHOLE": WHOLE,
    "COUNT_BITS": COUNT_BITS,
    "LEAST": LEAST,
    "BLOCK": BLOCK,
}
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds a float32 to the nearest integer, ties to even."""


@triton.jit(do_not_specialize=["num_groups"])
def _choose_scales_kernel(
    weights, numbers, scales, num_groups,
    FIRST: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, COUNT_BITS: tl.constexpr,
    LEAST: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_B = group_B < num_groups
    offset_BC = group_B[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weight_BC = tl.load(weights + offset_BC, mask=mask_B[:, None], other=0.0)
    top_B, bottom_B = tl.max(weight_BC, axis=1), tl.max(-weight_BC, axis=1)
    most_B = tl.maximum(top_B, bottom_B)
    is_sound_B = tl.sum(weight_BC * 0, axis=1) == 0
    is_any_B = is_sound_B & (most_B > LEAST)
    signed_B = tl.where(is_any_B, tl.where(bottom_B >= top_B, most_B, -most_B), 1.0)
    by_B = tl.where(is_any_B, tl.div_rn(tl.full([BLOCK], WHOLE, tl.float32), signed_B), 0.0)
    weight_BC = tl.where(is_any_B[:, None], weight_BC, 0.0)
    whole_BC = (weight_BC * by_B[:, None] + ROUNDER - ROUNDER).to(tl.int32)
    size_BC = tl.abs(whole_BC)
    count_BC = (size_BC + (tl.sum(size_BC, axis=1) // GROUP)[:, None]) >> COUNT_BITS
    most_explained_B, fitted_B = tl.full([BLOCK], -1.0, tl.float32), tl.zeros([BLOCK], tl.float32)
    for factor in tl.static_range(FIRST, LAST + 1, STEP):
        number_BC = tl.minimum(tl.maximum((whole_BC * factor + 16384) >> 15, -8), 7)
        product_B = tl.sum(number_BC * count_BC * whole_BC, axis=1).to(tl.float32)
        square_B = tl.maximum(tl.sum(number_BC * number_BC * count_BC, axis=1), 1).to(tl.float32)
        explained_B = tl.div_rn(product_B * product_B, square_B)
        fitted_B = tl.where(explained_B > most_explained_B, tl.div_rn(product_B, square_B), fitted_B)
        most_explained_B = tl.maximum(explained_B, most_explained_B)
    unit_B = tl.div_rn(signed_B, tl.full([BLOCK], WHOLE, tl.float32))
    scale_B = tl.where(is_sound_B, fitted_B * unit_B, float("nan")).to(tl.float16)
    held_B = scale_B.to(tl.float32)
    is_none_B = (held_B == 0) | (is_any_B == 0)
    back_B = tl.where(is_none_B, 0.0, tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), tl.where(is_none_B, 1.0, held_B)))
    number_BC = tl.minimum(tl.maximum(weight_BC * back_B[:, None] + ROUNDER - ROUNDER, -8), 7)
    tl.store(numbers + offset_BC, number_BC.to(tl.int8), mask=mask_B[:, None])
    tl.store(scales + group_B, scale_B, mask=mask_B)


def choose_scales(weight_xC: Tensor) -> tuple[Tensor, Tensor]:
    """See `parallel.scale_search.choose_scales`."""
    weight_xC = weight_xC.contiguous()
    numbers_xC = torch.empty_like(weight_xC, dtype=torch.int8)
    scales_x = weight_xC.new_empty(weight_xC.shape[:-1], dtype=torch.float16)
    if scales_x.numel():
        _choose_scales_kernel[(cdiv(scales_x.numel(), BLOCK),)](
            weight_xC, numbers_xC, scales_x, scales_x.numel(), **SIZES, GROUP=weight_xC.shape[-1], num_warps=4, enable_fp_fusion=False
        )  # fmt: skip
    return numbers_xC, scales_x
