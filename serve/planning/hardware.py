"""Known GPUs: memory, speed and links. Figures are from the makers' data sheets; rates are dense (not sparse)."""

import re
from dataclasses import dataclass

from serve.planning.errors import PlanError
from serve.planning.memory import GIB

READ_FRACTION = 4.6 / 4.8
"""Fraction of a data sheet's memory bandwidth that a read-only kernel can reach."""
MATRIX_FRACTION = 780 / 989
"""Fraction of a data sheet's matrix rate that a large matrix product can reach within the power limit."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between ranks: bandwidth in one direction, and latency of the smallest message."""

    bytes_per_s: float
    latency_s: float

    def all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        return self.latency_s + 2 * (ranks - 1) / ranks * num_bytes / self.bytes_per_s if ranks > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Achievable rates of one GPU, and its link to other GPUs of the host."""

    read_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    """The bf16 rate if the matrix units do not multiply fp8."""
    link: Link


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: int
    speed: Speed | None
    """None: only the memory size is known, so floors cannot be given."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """``hosts`` machines, each with ``gpus_per_host`` GPUs of one kind."""

    gpu: Gpu
    gpus_per_host: int
    hosts: int = 1
    network: Link

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_host * self.hosts

    def __str__(self) -> str:
        each = f"{self.gpus_per_host} x {self.gpu.name}"
        return each if self.hosts == 1 else f"{self.hosts} hosts of {each}"


def network(gbit_per_s: float) -> Link:
    """The network link between hosts; bandwidth per GPU."""
    return Link(bytes_per_s=gbit_per_s / 8 * 1e9, latency_s=15e-6)


def _nvlink(gb_per_s: float) -> Link:
    return Link(bytes_per_s=gb_per_s * 1e9, latency_s=3e-6)


PCIE_4 = Link(bytes_per_s=25e9, latency_s=10e-6)


def _speed(read_gb_per_s: float, bf16: float, fp8: float | None, link: Link) -> Speed:
    """Rates in TFLOP/s."""
    return Speed(
        read_bytes_per_s=read_gb_per_s * 1e9 * READ_FRACTION,
        bf16_flops=bf16 * 1e12 * MATRIX_FRACTION,
        fp8_flops=(fp8 or bf16) * 1e12 * MATRIX_FRACTION,
        link=link,
    )


def _gpu(name: str, gib: float, read_gb_per_s: float, bf16: float, fp8: float | None, link: Link) -> Gpu:
    """``gib``: memory as the driver reports it to programs."""
    return Gpu(name=name, memory_bytes=int(gib * GIB), speed=_speed(read_gb_per_s, bf16, fp8, link))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A10-24G", 22.0, 600, 125, None, PCIE_4),
        _gpu("L4-24G", 22.0, 300, 121, 242, PCIE_4),
        _gpu("RTX3090-24G", 23.6, 936, 71, None, PCIE_4),
        _gpu("RTX4090-24G", 23.6, 1_008, 165, 330, PCIE_4),
        _gpu("A100-40G", 39.4, 1_555, 312, None, _nvlink(300)),
        _gpu("L40S-48G", 44.4, 864, 362, 733, PCIE_4),
        _gpu("A100-80G", 79.2, 2_039, 312, None, _nvlink(300)),
        _gpu("H100-80G", 79.1, 3_350, 989, 1_979, _nvlink(450)),
        _gpu("H20-96G", 95.1, 4_000, 148, 296, _nvlink(450)),
        _gpu("H200-141G", 139.8, 4_800, 989, 1_979, _nvlink(450)),
        _gpu("B200-180G", 178.3, 7_700, 2_250, 4_500, _nvlink(900)),
    )
}
TYPICAL_SPEED = _speed(2_039, 312, None, _nvlink(300))
"""Speed of an A100. Used to rank layouts of GPUs whose speed is unknown, never to report a floor."""

COUNT = re.compile(r"(?:(?P<count>\d+)\s*[x*]\s*)?(?P<kind>[A-Za-z0-9.-]+)", re.IGNORECASE)
PLAIN_MEMORY = re.compile(r"(?P<gb>\d+(?:\.\d+)?)GB?", re.IGNORECASE)


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Parse ``8xH100-80G``, ``8xH100``, ``A100-40G``, or a plain memory size in 10^9 bytes: ``4x24G``. Returns (count, GPU).

    Raises:
        PlanError: invalid count, GPU or memory size.
    """
    found = COUNT.fullmatch(text.strip())
    if found is None:
        raise PlanError(f"--gpus {text!r} is not understood; write for example 8xH100-80G or, by memory alone, 4x24G")
    count = int(found["count"] or 1)
    if not 1 <= count <= 64:
        raise PlanError(f"--gpus {text!r} asks for {count} GPUs in one host; give 1 to 64, and --hosts for more")
    return count, _find_gpu(found["kind"])


def _find_gpu(kind: str) -> Gpu:
    if plain := PLAIN_MEMORY.fullmatch(kind):
        gigabytes = float(plain["gb"])
        if gigabytes < 1:
            raise PlanError(f"{kind} is too little memory to plan with; give at least 1G")
        return Gpu(name=f"{plain['gb']}G", memory_bytes=int(gigabytes * 1e9), speed=None)
    matching = [gpu for name, gpu in GPUS.items() if name.lower() == kind.lower()]
    matching = matching or [gpu for name, gpu in GPUS.items() if name.lower().startswith(f"{kind.lower()}-")]
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(gpu.name for gpu in matching or GPUS.values())
    which = "could be several" if matching else "is not in the table"
    raise PlanError(f"GPU {kind!r} {which}; give one of {known}, or its memory alone, such as 48G")
