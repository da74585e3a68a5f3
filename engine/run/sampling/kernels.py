"""What a CUDA device with Triton samples with, in a few launches; elsewhere plain torch does the same in forty."""

from types import ModuleType

from torch import Tensor

from parallel.quantised_format import has_triton


def kernels_for(logits_RV: Tensor) -> ModuleType | None:
    """`parallel.cuda.draws`, where it can be used."""
    if logits_RV.device.type != "cuda" or not has_triton():
        return None
    from parallel.cuda import draws  # triton: not to be imported where there is no such device

    return draws
