"""What is known of one rank's process and its host. Gathered by `cluster.doctor.gather`, judged by `cluster.doctor.checks`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """One GPU that the process sees."""

    index: int
    name: str
    total_bytes: int
    """0: nvidia-smi does not say, as of a part of a GPU (MIG)."""
    used_bytes: int
    """By anyone, before this process took any."""


@dataclass(frozen=True, kw_only=True)
class InterfaceFacts:
    """The network interface that has the host's address in the cluster."""

    name: str
    address: str
    is_up: bool
    speed_mbit: int
    """0: it does not say."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One rank's process on its host."""

    host: str
    rank: int
    python: str
    versions: dict[str, str]
    """Of the libraries that must agree: torch, ray, nccl, ... by name; one that is not installed is not there."""
    driver: str | None
    """Of NVIDIA; None: there is none."""
    gpus: tuple[GpuFacts, ...]
    interface: InterfaceFacts | None
    cores: int
    memory_available_bytes: int
    shm_total_bytes: int
    shm_free_bytes: int
    cache_folder: str
    cache_free_bytes: int
    open_files_limit: int
    compiler: str | None
    shared_memory_built: bool
    """Whether the CPU kernels, which bring the collectives through shared memory, were compiled on this host."""
    triton_launcher_problem: str | None = None
    """Why Triton cannot build here what it launches kernels by, as it does once on a host of GPUs."""
    checkpoint_problem: str | None = None
    """Why the checkpoint cannot be opened from here."""
    clock_ahead_at_least_s: float = 0.0
    """How far this host's clock is provably off the asker's (negative: behind)."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the ranks are going to want."""

    device: str = "cpu"
    """"cpu" or "cuda"."""
    gpus_per_rank: float = 0.0
    weights_bytes: int = 0
    """Of the fullest rank, as it will hold them."""
    cache_bytes: int = 0
    """On the disk of the cache folder."""


def clock_ahead(*, asked_s: float, began_s: float, ended_s: float, answered_s: float) -> float:
    """How far another clock is provably ahead of ours, from a question asked and answered at times of our clock.

    The other side began after we asked and ended before we had the answer; what its clock says beyond that is its error.
    """
    if began_s < asked_s:
        return began_s - asked_s
    return max(0.0, ended_s - answered_s)
