"""What this machine could do at best: read bandwidth and multiplication rate, measured in the same run."""

import time
from dataclasses import dataclass

import torch

BUFFER_BYTES = 1 << 30
MATRIX = 2048
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    read_bytes_per_s: float
    flop_per_s: float


def measure_ceiling(dtype: torch.dtype, threads: int) -> Ceiling:
    """Best of a few runs on the CPU with `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Ceiling(read_bytes_per_s=_read_rate(), flop_per_s=_multiply_rate(dtype))
    finally:
        torch.set_num_threads(before)


def _read_rate() -> float:
    """A sum reads each byte once and writes none."""
    buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32)
    return max(BUFFER_BYTES / _seconds(lambda: buffer.sum()) for _ in range(REPEATS))


def _multiply_rate(dtype: torch.dtype) -> float:
    left, right = torch.randn(MATRIX, MATRIX).to(dtype), torch.randn(MATRIX, MATRIX).to(dtype)
    return max(2 * MATRIX**3 / _seconds(lambda: left @ right) for _ in range(REPEATS))


def _seconds(run: object) -> float:
    assert callable(run)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
