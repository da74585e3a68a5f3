"""Kernels that begin while the one before them still runs (programmatic dependent launch, Hopper): a step of few rows is a chain of
launches that each wait for the one before, and what it multiplies by is known long before what is multiplied.

A kernel with ``PDL`` says at its first line that the next one may begin, which then does as soon as all programs of this one have
begun. Before `wait_for_previous` it may read what no kernel of a step writes, which is weights and nothing else, and may write nothing:
only then is all done that came before, reads of what is overwritten here as well. Every kernel that is launched so waits.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 64
"""With more rows, kernels have enough to do not to wait for each other, and programs that wait take the place of others."""
CAPABILITY = (9, 0)
"""Of CUDA devices: the first that can."""


_is_enabled = False


def enable(is_enabled: bool) -> None:
    """Whether this process's launches of few rows begin early from now on (`RunnerConfig.early_launches`); what was captured stays as it
    was."""
    global _is_enabled
    _is_enabled = is_enabled


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


def pdl_options(num_rows: int, x: Tensor) -> dict[str, Any]:
    """Arguments of a launch for so many rows on the device of ``x``."""
    begins_early = _is_enabled and num_rows <= MAX_ROWS and x.device.type == "cuda" and _can(x.device)
    return {"PDL": True, "launch_pdl": True} if begins_early else {"PDL": False}


@cache
def _can(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY
