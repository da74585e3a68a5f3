"""Fused elementwise and row-wise kernels between matrix products: RMS norm, SwiGLU, rotary embedding.

T tokens, D model width, I inner width of an MLP, H query heads, G KV heads, K head width, F = K / 2 frequencies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.dependent_launch import launch_dependents, pdl_options, wait_for_previous
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2
from parallel.quantisation import FP8, FP8_MAX


@quick
@triton.jit
def _rms_norm_kernel(x, residual, weight, out, eps, width, HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """One token. The residual stream is updated in place."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    dims_D = tl.arange(0, WIDTH)
    mask_D = dims_D < width
    weight_D = tl.load(weight + dims_D, mask=mask_D, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    dtype = out.dtype.element_ty
    wide_D = tl.load(x + row + dims_D, mask=mask_D, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        sum_D = (wide_D + tl.load(residual + row + dims_D, mask=mask_D, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + row + dims_D, sum_D, mask=mask_D)
        wide_D = sum_D.to(tl.float32)  # norm the rounded sum, as later layers will read it
    scale = tl.rsqrt(tl.sum(wide_D * wide_D, axis=0) / width + eps)
    normed_D = (wide_D * scale).to(dtype).to(tl.float32)  # rounded before multiplying by the weight, as in transformers
    tl.store(out + row + dims_D, (normed_D * weight_D).to(dtype), mask=mask_D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``; the reference is `model.layers.RmsNorm`."""
    out_TD = torch.empty_like(x_TD)
    _launch_norm(x_TD, None, weight_D, out_TD, eps)
    return out_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Adds ``x`` to the residual stream in place and returns the norm of the sum."""
    out_TD = torch.empty_like(x_TD)
    _launch_norm(x_TD, residual_TD, weight_D, out_TD, eps)
    return out_TD


def _launch_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, out_TD: Tensor, eps: float) -> None:
    num_tokens, width = x_TD.shape
    if num_tokens == 0:
        return
    assert all(x.is_contiguous() for x in (x_TD, residual_TD) if x is not None)
    _rms_norm_kernel[(num_tokens,)](
        x_TD, x_TD if residual_TD is None else residual_TD, weight_D, out_TD, eps, width,
        HAS_RESIDUAL=residual_TD is not None, WIDTH=next_power_of_2(width),
        num_warps=8 if width > 2048 else 4, **pdl_options(num_tokens, x_TD),
    )  # fmt: skip


@triton.jit
def silu(gate, dtype: tl.constexpr):
    """``gate * sigmoid(gate)`` in float32, rounded to ``dtype`` before the product with up, as torch does."""
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@quick
@triton.jit
def _swiglu_kernel(gate_up, out, width, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A block of one token's inner features. A row holds gate, then up."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = dims < width
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * row_stride + dims, mask=mask, other=0.0).to(tl.float32)
    silu_gate = silu(gate, dtype)
    up = tl.load(gate_up + row * row_stride + width + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + dims, (silu_gate * up).to(dtype), mask=mask)


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """``silu(gate) * up``, where a row is (gate, up), each half of its width (arXiv 2002.05202)."""
    num_tokens, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    out_TI = gate_up_TI.new_empty((num_tokens, width))
    if out_TI.numel():
        _swiglu_kernel[(num_tokens, cdiv(width, SWIGLU_BLOCK))](
            gate_up_TI, out_TI, width, gate_up_TI.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4, **pdl_options(num_tokens, out_TI)
        )
    return out_TI


SWIGLU_BLOCK = 1024


@quick
@triton.jit
def _rope_and_write_kv_kernel(
    heads, cos, sin, slots, q_out, keys, values,
    row_stride, num_heads, num_kv_heads, token_stride, head_stride,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, KV_IN_FP8: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token: queries are rotated, keys are rotated and written to the cache, values are written to the cache."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims_F = tl.arange(0, PADDED_HALF)
    mask_F = dims_F < HALF
    source = heads + token * row_stride + head * 2 * HALF + dims_F
    first_F = tl.load(source, mask=mask_F, other=0.0)
    second_F = tl.load(source + HALF, mask=mask_F, other=0.0)
    is_value = head >= num_heads + num_kv_heads
    if not is_value:
        cos_F = tl.load(cos + token * HALF + dims_F, mask=mask_F, other=0.0).to(tl.float32)
        sin_F = tl.load(sin + token * HALF + dims_F, mask=mask_F, other=0.0).to(tl.float32)
        one_F, other_F = first_F.to(tl.float32), second_F.to(tl.float32)
        first_F = (one_F * cos_F - other_F * sin_F).to(first_F.dtype)
        second_F = (other_F * cos_F + one_F * sin_F).to(second_F.dtype)
    if head < num_heads:
        turned = q_out + (token * num_heads + head) * 2 * HALF + dims_F
        tl.store(turned, first_F, mask=mask_F)
        tl.store(turned + HALF, second_F, mask=mask_F)
    else:
        slot = tl.load(slots + token)
        offset = slot.to(tl.int64) * token_stride + dims_F
        written_F = mask_F & (slot >= 0)  # the padding tokens of a captured step have no slot
        if is_value:
            target = values + offset + (head - num_heads - num_kv_heads) * head_stride
        else:
            target = keys + offset + (head - num_heads) * head_stride
        dtype = keys.dtype.element_ty
        if KV_IN_FP8:  # round to nearest, saturating
            tl.store(target, tl.minimum(tl.maximum(first_F.to(tl.float32), -MOST), MOST).to(dtype), mask=written_F)
            tl.store(target + HALF, tl.minimum(tl.maximum(second_F.to(tl.float32), -MOST), MOST).to(dtype), mask=written_F)
        else:
            tl.store(target, first_F, mask=written_F)
            tl.store(target + HALF, second_F, mask=written_F)


def apply_rope(x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    """Rotary embedding of all heads. Tokens of ``x_TXK`` may be strided, their heads may not; reference: `model.rope.Rotation.apply`."""
    num_tokens, num_heads, head_dim = x_TXK.shape
    if x_TXK.stride()[1:] != (head_dim, 1):
        x_TXK = x_TXK.contiguous()
    out_TXK = x_TXK.new_empty((num_tokens, num_heads, head_dim))
    if num_tokens:
        _rope_and_write_kv_kernel[(num_tokens, num_heads)](
            x_TXK, cos_T1F, sin_T1F, cos_T1F, out_TXK, x_TXK, x_TXK, x_TXK.stride(0), num_heads, 0, 0, 0,
            HALF=head_dim // 2, PADDED_HALF=next_power_of_2(head_dim // 2),
            KV_IN_FP8=False, MOST=FP8_MAX, num_warps=1, **pdl_options(num_tokens, x_TXK),
        )  # fmt: skip
    return out_TXK


def rope_and_write_kv(
    heads_TXK: Tensor,
    cos_T1F: Tensor,
    sin_T1F: Tensor,
    slots_T: Tensor,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
    num_heads: int,
    q_THK: Tensor | None = None,
) -> Tensor:
    """Rotary embedding and KV cache write for fused heads (query, key, value). Returns the rotated queries (T, H, K), in ``q_THK`` if
    given; rotated keys and values are written to their slots of the cache.

    A negative slot is not written. The references are `model.rope.Rotation.apply` and `model.attention.write_kv.write_kv`.
    """
    num_tokens, num_all, head_dim = heads_TXK.shape
    num_kv_heads = keys_NBGK.shape[2]
    if q_THK is None:
        q_THK = heads_TXK.new_empty((num_tokens, num_heads, head_dim))
    if num_tokens:
        _rope_and_write_kv_kernel[(num_tokens, num_all)](
            heads_TXK, cos_T1F, sin_T1F, slots_T, q_THK, keys_NBGK, values_NBGK,
            heads_TXK.stride(0), num_heads, num_kv_heads, keys_NBGK.stride(1), keys_NBGK.stride(2),
            HALF=head_dim // 2, PADDED_HALF=next_power_of_2(head_dim // 2),
            KV_IN_FP8=keys_NBGK.dtype == FP8, MOST=FP8_MAX, num_warps=1, **pdl_options(num_tokens, heads_TXK),
        )  # fmt: skip
    return q_THK


class CudaElementwise:
    """Implements `parallel.elementwise_kernels.ElementwiseKernels` for any floating dtype."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        if delta_TD is None:
            return rms_norm(x_TD.contiguous(), weight_D, eps)
        return add_rms_norm(delta_TD.contiguous(), x_TD, weight_D, eps)

    def swiglu(self, gate_up_TX: Tensor) -> Tensor:
        return swiglu(gate_up_TX.contiguous())

    def apply_rope(self, x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
        return apply_rope(x_TXK, cos_T1F.contiguous(), sin_T1F.contiguous())
