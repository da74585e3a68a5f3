"""Kernels around the routed experts, one launch each: top-k routing, and adding the shared expert's output.

T tokens, E experts, A of them per token, D model width. In torch each takes several launches (softmax, top-k, sort, ...), which dominate
steps of few tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv, next_power_of_2


@quick
@triton.jit
def _select_experts_kernel(
    logits, ids, weights, num_experts, PER_TOKEN: tl.constexpr, RENORMALISE: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """One token: a softmax over all experts, then the most probable ones one after the other; ties go to the lower number."""
    token = tl.program_id(0).to(tl.int64)
    experts_E, indices_A = tl.arange(0, PADDED), tl.arange(0, PLACES)
    there_E = experts_E < num_experts
    logits_E = tl.load(logits + token * num_experts + experts_E, mask=there_E, other=float("-inf")).to(tl.float32)
    raised_E = tl.exp(logits_E - tl.max(logits_E, axis=0))
    probabilities_E = raised_E / tl.sum(raised_E, axis=0)
    # If logits are NaN, any experts will do as long as the ids are valid; the error is detected in the step's logits.
    left_E = tl.where(there_E, tl.where(probabilities_E == probabilities_E, probabilities_E, 2.0), -1.0)
    chosen_A, ids_A = tl.zeros([PLACES], tl.float32), tl.zeros([PLACES], tl.int32)
    for index in tl.static_range(PER_TOKEN):
        best = tl.max(left_E, axis=0)
        expert = tl.min(tl.where(left_E == best, experts_E, PADDED), axis=0)
        chosen_A = tl.where(indices_A == index, tl.sum(tl.where(experts_E == expert, probabilities_E, 0.0), axis=0), chosen_A)
        ids_A = tl.where(indices_A == index, expert, ids_A)
        left_E = tl.where(experts_E == expert, -1.0, left_E)
    if RENORMALISE:
        chosen_A = chosen_A / tl.sum(chosen_A, axis=0)
    at_A = token * PER_TOKEN + indices_A
    tl.store(ids + at_A, ids_A.to(tl.int64), mask=indices_A < PER_TOKEN)
    tl.store(weights + at_A, chosen_A.to(weights.dtype.element_ty), mask=indices_A < PER_TOKEN)


@quick
@triton.jit
def _add_shared_kernel(routed, gates, shared, out, width, BLOCK: tl.constexpr):
    """A block of one token's features, rounded where transformers rounds: the gate, the shared expert's contribution, the sum."""
    token = tl.program_id(0).to(tl.int64)
    dims_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_D = dims_D < width
    dtype = out.dtype.element_ty
    gate = tl.sigmoid(tl.load(gates + token).to(tl.float32)).to(dtype).to(tl.float32)
    shared_D = tl.load(shared + token * width + dims_D, mask=mask_D, other=0.0).to(tl.float32)
    routed_D = tl.load(routed + token * width + dims_D, mask=mask_D, other=0.0).to(tl.float32)
    tl.store(out + token * width + dims_D, (routed_D + (gate * shared_D).to(dtype).to(tl.float32)).to(dtype), mask=mask_D)


ADD_BLOCK = 1024


class CudaRouting:
    """Implements `parallel.elementwise_kernels.RoutingKernels`."""

    def choose(self, logits_TE: Tensor, per_token: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
        num_tokens, num_experts = logits_TE.shape
        ids_TA = torch.empty((num_tokens, per_token), dtype=torch.int64, device=logits_TE.device)
        weights_TA = logits_TE.new_empty((num_tokens, per_token))
        if num_tokens:
            _select_experts_kernel[(num_tokens,)](
                logits_TE.contiguous(), ids_TA, weights_TA, num_experts, PER_TOKEN=per_token, RENORMALISE=renormalise,
                PADDED=next_power_of_2(num_experts), PLACES=next_power_of_2(per_token), num_warps=1,
            )  # fmt: skip
        return ids_TA, weights_TA

    def add_shared(self, routed_TD: Tensor, gates_T1: Tensor, shared_TD: Tensor) -> Tensor:
        num_tokens, width = routed_TD.shape
        out_TD = torch.empty_like(routed_TD, memory_format=torch.contiguous_format)
        if num_tokens:
            _add_shared_kernel[(num_tokens, cdiv(width, ADD_BLOCK))](
                routed_TD.contiguous(), gates_T1.contiguous(), shared_TD.contiguous(), out_TD, width, BLOCK=ADD_BLOCK, num_warps=4
            )
        return out_TD
