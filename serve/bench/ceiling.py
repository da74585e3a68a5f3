"""Peak rates of this machine, measured in the same run: memory read bandwidth and matrix multiplication rate (the roofline's ceilings)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.run.host_resources import multiplies_bfloat16
from parallel.native.library import native
from parallel.native.linear import Packed, multiply

BUFFER_BYTES = 1 << 30
MATRIX = 2048
INPUTS = 1024
"""Input features of the matrix for measuring read bandwidth."""
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    read_bytes_per_s: float
    flop_per_s: float
    copy_bytes_per_s: float = 0.0
    """Bytes read plus bytes written."""


def measure_ceiling(dtype: torch.dtype, device: torch.device, threads: int) -> Ceiling:
    """Best of a few runs; on a CPU with `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read, copied = _memory_rates(device)
        return Ceiling(read_bytes_per_s=read, copy_bytes_per_s=copied, flop_per_s=_multiply_rate(dtype, device))
    finally:
        torch.set_num_threads(before)


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """(read, copy) bandwidth in bytes/s. A sum reads each byte once and writes nothing, as does our own product with one row, which is
    faster on some CPUs; a copy reads and writes each byte."""
    buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    half = buffer.numel() // 2
    copied = BUFFER_BYTES / _best_seconds(lambda: buffer[half:].copy_(buffer[:half]), device)
    read = BUFFER_BYTES / _best_seconds(buffer.sum, device)
    library = native() if device.type == "cpu" else None
    if library is not None:
        matrix = Packed("fp32", buffer.view(-1, INPUTS, 2 * library.lanes), None, buffer.numel() // INPUTS)
        row = torch.ones(1, INPUTS)
        read = max(read, BUFFER_BYTES / _best_seconds(lambda: multiply(library, row, matrix, None), device))
    return read, copied


def _multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    if device.type == "cpu" and dtype != torch.bfloat16 and multiplies_bfloat16(device):
        return max(_rate_in(dtype, device), _rate_in(torch.bfloat16, device))
    return _rate_in(dtype, device)


def _rate_in(dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / _best_seconds(lambda: left @ right, device)


def _best_seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    return min(_seconds(run, device) for _ in range(REPEATS))


def _seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
