"""Selects Triton's sampling kernels on a CUDA device. Elsewhere plain torch does the same in some forty launches instead of a few."""

from types import ModuleType

from torch import Tensor

from parallel.quantised_format import has_triton


def sampling_kernels_for(logits_RV: Tensor) -> ModuleType | None:
    """`parallel.cuda.sampling` if it can be used here, else None."""
    if logits_RV.device.type != "cuda" or not has_triton():
        return None
    from parallel.cuda import sampling  # imports triton, which exists only where there is a CUDA device

    return sampling
