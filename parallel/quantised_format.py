"""Weight formats for CUDA devices: a plain checkpoint matrix is quantised to 8 or 4 bits while it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import zero_points
from parallel.axes import IN, OUT
from parallel.quantisation import LEVELS, quantise_fp8, quantise_groups
from parallel.scale_groups import GROUP_SIZE, PADDED_TO
from parallel.weight_format import TensorSpec
from parallel.weight_format import has_triton as has_triton

Kind = Literal["int8", "int4", "int4_zeros", "fp8"]
BYTES: dict[Kind, float] = {
    "int8": 1 + 2 / GROUP_SIZE["int8"],
    "int4": 1 / 2 + 2 / GROUP_SIZE["int4"],
    "int4_zeros": 1 / 2 + 4 / GROUP_SIZE["int4_zeros"],
    "fp8": 1,
}
"""Bytes per weight, including scales and zero points. FP8's scales, four bytes per output, are negligible."""
IN_PAIRS = 32
"""int4 layout: so many consecutive features are in the low nibbles of as many bytes, and the next ones in their high nibbles."""
PIECE_OUTPUTS = 4096
"""Outputs quantised at a time, so that no float32 copy of a large matrix is needed."""


@dataclass(frozen=True)
class QuantisedFormat:
    """A plain matrix in the checkpoint, held as ``numbers`` and ``scales``. Products accumulate in float32.

    ``int8`` and ``int4`` are quantised as `PackedFormat` does on CPUs, with one float16 scale per 128 or 32 input features; activations
    are not quantised. The same goes for ``int4_zeros``, whose groups of 128 have a zero point each (`parallel.zero_points`). ``fp8`` has
    one scale per output, and activations are quantised to FP8 with one scale per row, so that FP8 tensor cores are used (W8A8,
    arXiv 2209.05433).
    """

    kind: Kind
    stored: torch.dtype
    """Dtype of the matrix in the checkpoint."""

    @property
    def bytes_per_weight(self) -> float:
        return BYTES[self.kind]

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.stored)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``numbers`` (N, padded K; for int4 half as many bytes) and ``scales`` (N, groups), for fp8 (N)."""
        pieces = [_rounded(self.kind, piece) for piece in tensors.pop("weight").split(PIECE_OUTPUTS)]
        numbers, scales = zip(*pieces, strict=True)
        return {"numbers": torch.cat(numbers), "scales": torch.cat(scales)}

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cuda" and has_triton():
            from parallel.cuda.quantised_matmul import multiply  # imports triton, which may not be installed

            y = multiply(rows, tensors, bias)
        else:
            y = multiply_reference(rows, tensors, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        picked = {name: tensor[outputs.flatten()] for name, tensor in tensors.items() if name != "bias"}
        return unpack(picked)[:, :width].view(*outputs.shape, width)


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """The kind of `QuantisedFormat` tensors, from their dtypes."""
    if tensors["numbers"].dtype == torch.uint8:
        return "int4_zeros" if tensors["scales"].dtype == torch.int32 else "int4"
    return "int8" if tensors["numbers"].dtype == torch.int8 else "fp8"


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix (N, padded K) dequantised to float32."""
    kind, numbers, scales = kind_of(tensors), tensors["numbers"], tensors["scales"]
    if kind == "fp8":
        return numbers.float() * scales.unsqueeze(-1)
    if numbers.dtype == torch.uint8:
        pairs_NPC = numbers.unflatten(-1, (-1, IN_PAIRS))
        numbers = torch.stack((pairs_NPC & 15, pairs_NPC >> 4), dim=2).flatten(1).to(torch.int8)
    grouped_NGC = numbers.unflatten(-1, (scales.shape[-1], -1))
    if kind == "int4_zeros":
        scales, zeros_NG = zero_points.unpack_words(scales)
        grouped_NGC = grouped_NGC - zeros_NG.unsqueeze(-1)
    elif kind == "int4":
        grouped_NGC = grouped_NGC - 8
    matrix_NK: Tensor = (grouped_NGC.float() * scales.float().unsqueeze(-1)).flatten(1)
    return matrix_NK


def multiply_reference(x_TK: Tensor, tensors: Mapping[str, Tensor], bias_N: Tensor | None) -> Tensor:
    """Reference for `parallel.cuda.quantised_matmul.multiply` in plain torch, computed in float32."""
    wide_TK = x_TK.float()
    if kind_of(tensors) == "fp8":
        numbers_TK, scales_T = quantise_fp8(x_TK)
        wide_TK = numbers_TK.float() * scales_T.unsqueeze(-1)
    return F.linear(wide_TK, unpack(tensors)[:, : x_TK.shape[-1]], None if bias_N is None else bias_N.float()).to(x_TK.dtype)


def _rounded(kind: Kind, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "fp8":
        return quantise_fp8(weight_NK)
    filled_NK = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % PADDED_TO[kind]))
    grouped_NGC = filled_NK.unflatten(-1, (-1, GROUP_SIZE[kind]))
    if kind == "int4_zeros":
        numbers_NGC, scales_NG = zero_points.quantise_groups(grouped_NGC)
    else:
        numbers_NGC, scales_NG = quantise_groups(grouped_NGC, LEVELS[kind])
    if kind == "int8":
        return numbers_NGC.flatten(1), scales_NG
    numbers_NGC = numbers_NGC if kind == "int4_zeros" else (numbers_NGC + 8).to(torch.uint8)
    low_NPC, high_NPC = numbers_NGC.flatten(1).unflatten(1, (-1, 2, IN_PAIRS)).unbind(2)
    return (low_NPC | high_NPC << 4).flatten(1), scales_NG
