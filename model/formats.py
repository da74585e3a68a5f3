"""Chooses the formats in which a rank holds its weights."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from model.quantisation import QuantisedKind
from parallel.native.library import available_kinds
from parallel.native.linear import Kind
from parallel.onednn_format import OneDnnFormat, runs_here
from parallel.packed_format import PackedFormat
from parallel.quantisation import FP8_MIN_CAPABILITY
from parallel.quantised_format import QuantisedFormat, has_triton
from parallel.weight_format import Dense, WeightFormat

logger = logging.getLogger(__name__)

QuantizeName = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True)
class Formats:
    """The format of the layers' large matrices, and that of embedding and head."""

    matrices: WeightFormat
    table: WeightFormat

    @property
    def rounds_activations(self) -> bool:
        """Whether products on a CPU round activations; attention may then do so too."""
        return isinstance(self.matrices, PackedFormat) and self.matrices.rounds_rows


def choose_formats(
    device: torch.device,
    dtype: torch.dtype,
    stored: Iterable[torch.dtype],
    quantize: QuantizeName | QuantisedKind | None = None,
    *,
    rounds_activations: bool = False,
    common_kinds: frozenset[str] | None = None,
) -> Formats:
    """The fastest formats that lose nothing, or those for ``quantize``: as configured, or as the matrices are stored.

    ``stored`` are the dtypes of the checkpoint's matrices. With ``rounds_activations`` products on a CPU may also round activations if the
    processor multiplies the rounded ones natively: to bfloat16 with matrices stored in bfloat16, to 8 bits with quantised ones. If experts
    move between ranks, ``common_kinds`` are the kinds of weights for which all of these ranks have kernels (`parallel.common_kinds`), so
    that all choose the same formats. With 4 bits, embedding and head are held in int8, with fp8 they are not quantised: they are the most
    sensitive to rounding.

    Raises:
        ValueError: this device does not support the format.
    """
    found = set(stored)
    raw = next(iter(found)) if len(found) == 1 else torch.float32
    if device.type != "cpu":
        return _on_cuda(device, dtype, raw, quantize)
    if quantize == "fp8":
        raise ValueError("CPUs do not multiply fp8: quantise to int8 or int4 here")
    kinds = available_kinds() if common_kinds is None else common_kinds
    if quantize is not None:
        if not kinds:
            logger.warning("%s without the CPU kernels is slow: weights are unpacked at every step", quantize)
        return Formats(_rounded(quantize, raw, rounds_activations, kinds), _rounded("int8", raw, rounds_activations, kinds))
    in_bfloat16 = dtype == torch.bfloat16 or found == {torch.bfloat16}
    rounds_activations = in_bfloat16 and (rounds_activations or dtype == torch.bfloat16)
    packed = PackedFormat("bf16_dot" if rounds_activations and "bf16_dot" in kinds else "bf16", torch.bfloat16)
    if rounds_activations and common_kinds is None and not kinds and runs_here(torch.bfloat16):
        # oneDNN's packed matrices cannot be sent to another rank
        return Formats(OneDnnFormat(torch.bfloat16), Dense(dtype))
    if kinds and in_bfloat16:
        return Formats(packed, packed)
    if kinds and dtype == torch.float32:
        packed = PackedFormat("fp32", raw)
        return Formats(packed, packed)
    return Formats(Dense(dtype), Dense(dtype))


def _rounded(quantize: QuantisedKind, stored: torch.dtype, rounds_activations: bool, kinds: frozenset[str]) -> PackedFormat:
    dots: dict[QuantisedKind, Kind] = {"int8": "int8_dot", "int4": "int4_dot", "int4_zeros": "int4_zeros_dot"}
    return PackedFormat(dots[quantize] if rounds_activations and dots[quantize] in kinds else quantize, stored)


def _on_cuda(device: torch.device, dtype: torch.dtype, raw: torch.dtype, quantize: QuantizeName | QuantisedKind | None) -> Formats:
    if quantize is None:
        return Formats(Dense(dtype), Dense(dtype))
    if quantize == "fp8" and (capability := torch.cuda.get_device_capability(device)) < FP8_MIN_CAPABILITY:
        name, known = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ValueError(f"{name} (compute capability {known}) does not multiply fp8, which needs 8.9: quantise to int8 or int4 here")
    if not has_triton():
        logger.warning("%s without Triton is slow: weights are unpacked at every step", quantize)
    return Formats(QuantisedFormat(quantize, raw), Dense(dtype) if quantize == "fp8" else QuantisedFormat("int8", raw))
