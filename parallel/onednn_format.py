"""Weights prepacked by oneDNN, for CPUs that multiply bfloat16 natively and have no kernels of ours."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import IN, OUT
from parallel.weight_format import TensorSpec

TYPICAL_ROWS = 16
"""Number of rows for which oneDNN chooses the layout; products are correct for any number."""


@dataclass(frozen=True)
class OneDnnFormat:
    """An unquantised matrix, reordered once at loading; `F.linear` would reorder it in every step."""

    dtype: torch.dtype

    @property
    def bytes_per_weight(self) -> float:
        return self.dtype.itemsize

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.dtype)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors.pop("weight")
        if weight.numel() == 0:
            return {"weight": weight}
        return {"reordered": torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)}

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if "weight" in tensors or x.numel() == 0:
            weight = tensors.get("weight")
            return x.new_zeros(*x.shape[:-1], tensors["reordered"].shape[0]) if weight is None else F.linear(x, weight.to(x.dtype), bias)
        bias = None if bias is None else bias.to(self.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), tensors["reordered"], bias, "none", [], "")
        return y.to(x.dtype)

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        raise NotImplementedError("rows cannot be looked up in oneDNN's layout; hold such a table unpacked")


def runs_here(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype natively and correctly on this processor. Tested by running it, as its operators are private
    to torch."""
    capabilities = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16 and not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    weight = torch.linspace(-1, 1, 64 * 48).view(64, 48).to(dtype)
    x = torch.linspace(1, -1, 3 * 48).view(3, 48).to(dtype)
    form = OneDnnFormat(dtype)
    try:
        found = form.multiply(x, form.prepare({"weight": weight.clone()}), None)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return torch.allclose(found.float(), x.float() @ weight.float().T, atol=0.1)
