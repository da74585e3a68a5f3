"""The cores, memory and arithmetic that this process may use."""

import os
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
"""Version 2 of the Linux control groups, where a container sees its own limits (kernel documentation, cgroup-v2)."""


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Physical cores for this process, limited by the host, its affinity and its container's CPU quota."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    quota = _read(cgroup / "cpu.max")
    if quota and quota[0] != "max":
        cores = min(cores, int(quota[0]) // int(quota[1]))
    return max(cores, 1)


def available_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that can be allocated without swapping and without exceeding the container's limit."""
    available: int = psutil.virtual_memory().available
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit and used and limit[0] != "max":
        available = min(available, int(limit[0]) - int(used[0]))
    return max(available, 0)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, so that half the bytes also take half the time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
