"""The small operations between matrices, each one pass over memory where this device has a kernel for that. T rows, D model width,
I width of an MLP, X heads, K head width, F = K / 2 frequencies.
"""

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from parallel.native.elementwise import NativeElementwise
from parallel.native.library import native


class ElementwiseKernels(Protocol):
    """For one kind of device. Who has none of them computes the same with torch, in more passes."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        """``x_TD += delta_TD`` in place, and the root mean square norm of that. ``x_TD`` is contiguous."""
        ...

    def swiglu(self, gate_up_TX: Tensor) -> Tensor:
        """(T, I): ``silu(gate) * up`` of (T, 2 I)."""
        ...

    def apply_rope(self, x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
        """Heads turned by their token's angles. Tokens of ``x_TXK`` may lie apart, a token's heads may not."""
        ...


class RoutingKernels(Protocol):
    """What stands around routed experts, for one kind of device. E experts, A of them per token."""

    def choose(self, logits_TE: Tensor, per_token: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
        """Expert ids (T, A), int64, the likeliest first, and weights (T, A) in the logits' dtype: of a softmax over all experts, with
        ``renormalise`` over those that were chosen."""
        ...

    def add_shared(self, routed_TD: Tensor, gates_T1: Tensor, shared_TD: Tensor) -> Tensor:
        """``routed + sigmoid(gates) * shared``."""
        ...


def routing_kernels_for(x: Tensor) -> RoutingKernels | None:
    """The kernels, if there are some that take tensors such as ``x``."""
    return _routing_for_cuda() if x.device.type == "cuda" else None


def elementwise_kernels_for(x: Tensor) -> ElementwiseKernels | None:
    """The kernels, if there are some that take tensors such as ``x``."""
    if x.device.type == "cuda":
        return _for_cuda()
    return _for_cpu() if x.dtype == torch.float32 and x.device.type == "cpu" else None


@cache
def _for_cpu() -> ElementwiseKernels | None:
    library = native()
    return None if library is None else NativeElementwise(library)


@cache
def _for_cuda() -> ElementwiseKernels | None:
    if find_spec("triton") is None:
        return None
    from parallel.cuda.elementwise import CudaElementwise  # triton: not to be imported where there is no such device

    return CudaElementwise()


@cache
def _routing_for_cuda() -> RoutingKernels | None:
    if find_spec("triton") is None:
        return None
    from parallel.cuda.routing import CudaRouting  # triton: not to be imported where there is no such device

    return CudaRouting()
