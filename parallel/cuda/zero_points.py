"""Unpacking of the scales and zero points of int4_zeros in kernels: see `parallel.zero_points`."""

import triton
import triton.language as tl

ZERO_POINT_GROUP = tl.constexpr(128)
"""Input features that share a scale and a zero point; see `parallel.scale_groups.GROUP_SIZE`."""


@triton.jit
def group_scale(words):
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def group_zero(words):
    return words >> 16
