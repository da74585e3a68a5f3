"""Selects the kernels that draw tokens. Plain torch does the same in some forty operations, and is the reference."""

from types import ModuleType

import torch
from torch import Tensor

from parallel.native.library import Native, native
from parallel.quantised_format import has_triton


def sampling_kernels_for(logits_RV: Tensor) -> ModuleType | None:
    """`parallel.cuda.sampling` if it can be used here, else None."""
    if logits_RV.device.type != "cuda" or not has_triton():
        return None
    from parallel.cuda import sampling  # imports triton, which exists only where there is a CUDA device

    return sampling


def cpu_kernels_for(logits_RV: Tensor) -> Native | None:
    """Our CPU kernels if they are built and read such logits, else None."""
    supported = logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
    return native() if supported else None
