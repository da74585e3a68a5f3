"""Chooses the attention backend of a rank."""

import logging
from importlib.util import find_spec
from typing import Literal

import torch

from model.attention.backend import AttentionBackend, AttentionConfig
from model.attention.cpu import CpuAttention
from model.attention.native import NativeAttention
from model.attention.reference import ReferenceAttention
from parallel.native.library import HOW_TO_BUILD, native

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "reference", "cpu", "native", "cuda", "flashinfer"]


def choose_backend(
    device: torch.device, config: AttentionConfig, name: BackendName = "auto", dtype: torch.dtype = torch.bfloat16
) -> AttentionBackend:
    """The backend called ``name``; "auto" chooses the fastest that runs on ``device``. ``dtype`` is the dtype of the computation.

    Raises:
        ValueError: that backend does not run on this device, or not in this dtype.
    """
    if device.type == "cuda":
        return _choose_for_cuda(device, config, name, dtype)
    library = native()
    suits = library is not None and config.head_dim % library.lanes == 0
    if name == "auto":
        name = "native" if suits else "cpu"
    if name == "reference":
        return ReferenceAttention(config)
    if device.type != "cpu" or name in ("cuda", "flashinfer"):
        raise _not_on(device, name)
    if name == "native":
        if library is None:
            raise ValueError(f"the attention backend 'native' is not built; {HOW_TO_BUILD}, or choose 'auto'")
        if not suits:
            raise ValueError(
                f"the attention backend 'native' needs heads whose width is a multiple of {library.lanes}, not {config.head_dim}"
            )
        return NativeAttention(config, library)
    return CpuAttention(config)


def _choose_for_cuda(device: torch.device, config: AttentionConfig, name: BackendName, dtype: torch.dtype) -> AttentionBackend:
    if name == "auto" and find_spec("triton") is None:
        logger.warning("triton is not installed, so attention uses the slow reference")
        name = "reference"
    match name:
        case "reference":
            return ReferenceAttention(config)
        case "auto" | "cuda":
            from model.attention.cuda import CudaAttention  # imports triton, which exists only where there is a CUDA device

            return CudaAttention(config, device)
        case "flashinfer":
            if find_spec("flashinfer") is None:
                raise ValueError(
                    "attention_backend is flashinfer, which is not installed here: pip install flashinfer-python, or choose 'auto'"
                )
            from model.attention.flashinfer import DTYPES, FlashInferAttention

            if dtype not in DTYPES:
                raise ValueError(
                    f"the attention backend 'flashinfer' computes in bfloat16 or float16, not in {dtype}; choose one of them, or 'auto'"
                )
            return FlashInferAttention(config, device)
    raise _not_on(device, name)


def _not_on(device: torch.device, name: BackendName) -> ValueError:
    return ValueError(f"the attention backend '{name}' does not run on {device}; choose 'auto' or 'reference'")
