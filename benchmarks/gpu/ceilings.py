"""Peak rates of this device (memory bandwidth, matrix products, kernel launches), measured together with everything else."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import median_s, replayed_s


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_s: float
    flop_per_s: float
    fp8_flop_per_s: float


GUESSED = Ceilings(read_bytes_per_s=4.3e12, flop_per_s=7.8e14, fp8_flop_per_s=1.4e15)
"""Used if they were not measured: the rates of an H200 (KINDS.md)."""


def found_in(results: Results) -> Ceilings:
    """The peak rates that this process or an earlier one has measured."""
    found = {one.name: one.value * 1e12 for one in results.figures if one.part == "ceilings" and one.unit in ("TB/s", "TFLOP/s")}
    products = [value for name, value in found.items() if name.startswith("torch.")]
    reads = [value for name, value in found.items() if name.startswith(("read", "copy"))]
    if not products or not reads:
        return GUESSED
    fp8 = [value for name, value in found.items() if name.startswith("fp8")]
    return Ceilings(max(reads), max(products), max(fp8, default=max(products)))


def measure(results: Results, device: torch.device, *, tiny: bool) -> None:
    """Measure all peak rates, with random inputs: matrix products of zeros are faster."""
    num_bytes, size = (1 << 22, 256) if tiny else (4 << 30, 8192)
    _memory(results, device, num_bytes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rate = 2 * size**3 / median_s(lambda: one @ other, device)
    results.add("ceilings", f"{dtype} product of {size}", rate / 1e12, "TFLOP/s")
    _launches(results, device)
    if device.type == "cuda":
        _fp8_rate(results, device, size)


def _memory(results: Results, device: torch.device, num_bytes: int) -> None:
    buffer = torch.randn(num_bytes // 4, device=device)
    half = buffer.numel() // 2
    copied = num_bytes / median_s(lambda: buffer[half:].copy_(buffer[:half]), device)
    summed = num_bytes / median_s(buffer.sum, device)
    matrices = buffer.view(torch.bfloat16).view(8, -1, 4096 if num_bytes > 1 << 24 else 64)
    row = torch.randn(1, matrices.shape[2], device=device).to(matrices.dtype)
    multiplied = num_bytes / median_s(lambda: [F.linear(row, matrix) for matrix in matrices], device)
    for name, rate in (("copy, read and written", copied), ("read by a sum", summed), ("read by a row times matrices", multiplied)):
        results.add("ceilings", name, rate / 1e12, "TB/s")


def _fp8_rate(results: Results, device: torch.device, size: int) -> None:
    one, other = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(1, device=device)
    seconds = median_s(lambda: torch._scaled_mm(one, other.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16), device)
    results.add("ceilings", f"fp8 product of {size}", 2 * size**3 / seconds / 1e12, "TFLOP/s")


def _launches(results: Results, device: torch.device) -> None:
    small = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(200):
            small.add_(1)

    results.add("ceilings", "a launch", median_s(many, device, repeats=5) / 200 * 1e6, "us")
    results.add("ceilings", "a launch in a graph", replayed_s(lambda: small.add_(1), device, launches=200) * 1e6, "us")
