"""Shared parts of the kernel checks. Every kernel is compared with float64, at Qwen2's sizes, with new random inputs in every call and
outputs filled with NaN before; and it is timed.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import replayed_s


@dataclass(frozen=True)
class Sizes:
    """Sizes to check: those of Qwen2 on a device, tiny ones (`TINY`) in Triton's interpreter."""

    heads: Sequence[tuple[int, int, int]] = ((28, 4, 128), (14, 2, 64), (64, 8, 128))
    contexts: Sequence[int] = (1, 15, 16, 17, 640, 5000)
    prompts: Sequence[tuple[int, int]] = ((0, 700), (513, 130), (0, 33))
    """(behind, new)"""
    few: Sequence[tuple[int, int]] = ((5000, 5), (640, 2), (17, 8), (0, 3), (31, 2))
    """(behind, new)"""
    timed_prompts: Sequence[tuple[int, int]] = ((0, 8192), (0, 2048), (2048, 2048), (8000, 512))
    """(behind, new)"""
    timed: Sequence[tuple[int, int]] = ((1, 1024), (1, 30000), (32, 1024), (128, 1024))
    """(sequences, context)"""
    width: int = 3584
    inner: int = 18944
    rows: Sequence[int] = (1, 7, 32, 256)
    matrices: Sequence[tuple[int, int]] = ((18944, 3584), (3584, 18944), (1152, 896))
    """(outputs, inputs) for products of one and two rows"""
    rows_of_tiles: Sequence[int] = (8, 512, 4096)
    """Numbers of rows for which experts have different tiles"""
    tiles: int = 99
    """How many candidate tiles are checked"""
    experts: tuple[int, int, int] = (64, 8, 2560)
    """(experts, chosen, inner width)"""
    vocab_size: int = 151_936
    undecided: int = 16


TINY = Sizes(
    heads=((4, 2, 16),), contexts=(1, 17), prompts=((3, 20),), few=((3, 5), (20, 2)), timed_prompts=((3, 20),), timed=((1, 20),),
    width=64, inner=96, rows=(1, 5), matrices=((6, 200),), rows_of_tiles=(3, 70), tiles=1, experts=(4, 2, 32), vocab_size=300, undecided=2,
)  # fmt: skip


class Checks:
    """Checks on one device. On a CPU, Triton's interpreter must be enabled, and dtype is float32: it does not support bfloat16."""

    def __init__(self, results: Results, device: torch.device, ceilings: Ceilings, sizes: Sizes) -> None:
        self.results, self.device, self.ceilings, self.sizes = results, device, ceilings, sizes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.most = 1e-2 if device.type == "cuda" else 1e-4
        """Maximum relative error: bfloat16 rounding adds up to between 1e-3 and 1e-2."""
        self.wrong: list[str] = []
        """Errors so far. They are reported at the end, so that one error does not stop the other checks."""

    def random(self, *shape: int) -> Tensor:
        """Normally distributed numbers on the device."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def judge(self, name: str, found: Tensor, wanted: Tensor, most: float | None = None, where: str = "") -> None:
        """Record the error of a kernel's output, and whether it exceeds ``most``. ``wanted`` is in float64."""
        error = error_of(found, wanted)
        self.results.add("kernels", f"{name}: error", error, "relative")
        self.expect(error < (most or self.most), f"{name}{where} is wrong by {error:.2g}")  # NaN is not below anything

    def expect(self, holds: bool, otherwise: str) -> None:
        """Record the error ``otherwise`` if the condition does not hold."""
        if not holds:
            self.wrong.append(otherwise)

    def timed(self, name: str, compute: Callable[[], object], num_bytes: int) -> None:
        """Record the bandwidth, in bytes read and written per second."""
        rate = num_bytes / replayed_s(compute, self.device)
        self.results.add("kernels", name, rate / 1e12, "TB/s", self.ceilings.read_bytes_per_s / 1e12)


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the L2 norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors contain NaN or the largest integer, so that elements that a kernel does not write are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
