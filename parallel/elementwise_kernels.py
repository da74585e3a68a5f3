"""Elementwise and row-wise operations between matrix products: fused kernels where the device has them.

T rows, D model width, I width of an MLP, X heads, K head width, F = K / 2 frequencies.
"""

from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from parallel.native.elementwise import NativeElementwise
from parallel.native.library import native


class ElementwiseKernels(Protocol):
    """Fused kernels for one kind of device. Without them, callers compute the same with torch in more passes over memory."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        """``x_TD += delta_TD`` in place; returns the RMS norm of the sum. ``x_TD`` is contiguous."""
        ...

    def swiglu(self, gate_up_TX: Tensor) -> Tensor:
        """(T, I): ``silu(gate) * up`` of (T, 2 I)."""
        ...

    def apply_rope(self, x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
        """Rotary embedding of all heads. Tokens of ``x_TXK`` may be strided; the heads of a token are contiguous."""
        ...


class RoutingKernels(Protocol):
    """Kernels around the routed experts, for one kind of device. E experts, A of them per token."""

    def choose(self, logits_TE: Tensor, per_token: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
        """Top-k routing: expert ids (T, A), int64, most probable first, and weights (T, A) in the logits' dtype from a softmax over all
        experts; with ``renormalise`` they sum to 1 over the chosen ones."""
        ...

    def add_shared(self, routed_TD: Tensor, gates_T1: Tensor, shared_TD: Tensor) -> Tensor:
        """``routed + sigmoid(gates) * shared``."""
        ...


def routing_kernels_for(x: Tensor) -> RoutingKernels | None:
    """The kernels for tensors with the device of ``x``, if there are any."""
    return _routing_for_cuda() if x.device.type == "cuda" else None


def elementwise_kernels_for(x: Tensor) -> ElementwiseKernels | None:
    """The kernels for tensors with the device and dtype of ``x``, if there are any."""
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
    from parallel.cuda.elementwise import CudaElementwise  # imports triton

    return CudaElementwise()


@cache
def _routing_for_cuda() -> RoutingKernels | None:
    if find_spec("triton") is None:
        return None
    from parallel.cuda.routing import CudaRouting  # imports triton

    return CudaRouting()
