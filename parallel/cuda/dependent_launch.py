"""Programmatic dependent launch (PDL, Hopper): a kernel may start while the previous one in the stream still runs.

A step of few rows is a chain of short kernels, and a matrix product can load its weights before its input is ready.

A kernel with ``PDL`` calls `launch_dependents` in its first line; the next kernel may start once all programs of this one have done so.
Before `wait_for_previous`, a kernel may only read tensors that no kernel of a step writes (weights), and may not write anything: only
after it have all previous kernels finished, including their reads of what is overwritten here. Every kernel launched with PDL must call it.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 64
"""With more rows, kernels fill the device and do not gain from overlap, and waiting programs occupy slots that others need."""
CAPABILITY = (9, 0)
"""The first CUDA capability with PDL."""


_is_enabled = False


def enable(is_enabled: bool) -> None:
    """Turn PDL on or off for this process's later launches of few rows (`RunnerConfig.early_launches`). Captured graphs are unchanged."""
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
    """The launch arguments for a kernel over ``num_rows`` rows on the device of ``x``."""
    begins_early = _is_enabled and num_rows <= MAX_ROWS and x.device.type == "cuda" and _can(x.device)
    return {"PDL": True, "launch_pdl": True} if begins_early else {"PDL": False}


@cache
def _can(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY
