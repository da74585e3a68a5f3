"""Time code on a device: with CUDA events around many runs, or with the host's clock on a CPU."""

import statistics
import time
from collections.abc import Callable

import torch

Compute = Callable[[], object]


def median_s(compute: Compute, device: torch.device, *, repeats: int = 20, warm_up: int = 3) -> float:
    for _ in range(warm_up):
        compute()
    if device.type != "cuda":
        return statistics.median(_host_s(compute) for _ in range(min(repeats, 3)))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        compute()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1000


@torch.inference_mode()  # like other captures: torch keeps one tensor for all graphs of a device, in the mode of the first capture
def replayed_s(compute: Compute, device: torch.device, *, launches: int = 20) -> float:
    """Seconds per run, with ``launches`` runs captured in one CUDA graph, so that launch overhead is hidden. No graph on a CPU."""
    if device.type != "cuda":
        return median_s(compute, device)
    compute()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks the device for events meanwhile
        for _ in range(launches):
            compute()
    return median_s(graph.replay, device, repeats=10) / launches


def _host_s(compute: Compute) -> float:
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began
