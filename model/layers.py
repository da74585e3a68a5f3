"""The norm and the dense MLP of a decoder layer. T tokens, D model width, I inner width of the MLP (this rank's part), X = 2 I."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.axes import split, whole
from parallel.elementwise_kernels import elementwise_kernels_for
from parallel.groups import Group
from parallel.linear import Linear, ShapeMismatch, Slot
from parallel.packed_format import PackedFormat
from parallel.weight_format import StoredTensor, WeightFormat, uses_gemv


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), replicated on every rank. The mean is computed in float32."""

    is_streaming = True

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.eps, self.dtype = size, eps, dtype
        self.weight: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        yield Slot("", "weight", (self.size,))

    def allocate(self, device: torch.device) -> None:
        self.weight = torch.empty(self.size, dtype=self.dtype, device=device)

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        assert self.weight is not None
        if stored.shape != (self.size,):
            raise ShapeMismatch(stored.name, stored.shape, (self.size,))
        source = stored.read(slice(None))
        self.weight.copy_(source)
        return source.nbytes

    def finish(self) -> None:
        """Nothing to repack."""

    def forward(self, x_TD: Tensor) -> Tensor:
        assert self.weight is not None
        kernels = elementwise_kernels_for(x_TD)
        if kernels is not None:
            return kernels.add_norm(x_TD.contiguous(), None, self.weight, self.eps)
        x = x_TD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_TD.dtype)  # rounded before the weight is applied, as transformers does

    def add(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum ``x_TD + delta_TD`` (None: zero), possibly written over ``x_TD``, and its norm."""
        if delta_TD is None:
            return x_TD, self(x_TD)
        kernels = elementwise_kernels_for(x_TD)
        if kernels is None:
            x_TD = x_TD + delta_TD
            return x_TD, self(x_TD)
        assert self.weight is not None
        x_TD = x_TD.contiguous()
        return x_TD, kernels.add_norm(x_TD, delta_TD, self.weight, self.eps)


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202), with the inner width split over the ranks of ``tp``."""

    def __init__(self, *, hidden_size: int, inner_size: int, tp: Group, format: WeightFormat, dtype: torch.dtype) -> None:
        super().__init__()
        inner = split(inner_size, tp.rank, tp.size)
        self.up = Linear(in_share=whole(hidden_size), out_parts={"gate": inner, "up": inner}, bias=False, format=format, bias_dtype=dtype)
        self.down = Linear(in_share=inner, out_parts={"down": whole(hidden_size)}, bias=False, format=format, bias_dtype=dtype, reduce=tp)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D), summed over the ranks of ``tp``."""
        format = self.up.format
        fused_TD = format.gated(x_TD, self.up.tensors, self.down.tensors) if isinstance(format, PackedFormat) else None
        result: Tensor = self.down(self._gated(x_TD)) if fused_TD is None else self.down.summed(fused_TD)
        return result

    def _gated(self, x_TD: Tensor) -> Tensor:
        """(T, I): SwiGLU of this rank's part of gate and up."""
        if not uses_gemv(x_TD):
            return swiglu(self.up(x_TD))
        from parallel.cuda.gated_gemv import multiply  # imports triton, which may not be installed

        return multiply(x_TD, self.up.tensors, lambda: swiglu(self.up(x_TD)))


def swiglu(gate_up_TX: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate and up are the two halves of each row."""
    kernels = elementwise_kernels_for(gate_up_TX)
    if kernels is not None:
        return kernels.swiglu(gate_up_TX)
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI
