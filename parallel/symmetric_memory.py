"""All-reduce through CUDA symmetric memory, for ranks whose devices can access each other's memory; NCCL remains the fallback.

NCCL takes about 24 us for the few hundred KiB that a decoding step all-reduces twice a layer, most of it protocol overhead. torch's
symmetric memory (`torch.distributed._symmetric_memory`, alpha; the source of 2.11 to 2.13 was read) has kernels that read the peers'
buffers directly: each rank reads everything (one-shot, for small sizes), or each reduces a part and distributes it (two-shot), or the
NVSwitch reduces (multimem, with multicast). One-shot and two-shot sum in rank order, and multimem gives all ranks the same sum. So all
ranks should get identical bits, as replicated expert routers need; this is verified at startup for the sizes that are tried. A kernel
returns only when no rank reads the buffer any more, so the next all-reduce may use it at once.

It is used only after its sums were verified at startup, launched and replayed, on all ranks of the group; else the log says why. Its
kernels wait for the peers on the device, and no process group timeout ends that wait.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.shared_memory import gather_objects, host_of_this_process, pid_namespace

logger = logging.getLogger(__name__)

DTYPE = torch.bfloat16
"""The dtype that models on GPUs all-reduce. float32 goes to NCCL."""
BUFFER_BYTES = 8 * 2**20
"""Enough for 512 decoding rows of Qwen2-72B. For larger messages NCCL's protocol overhead does not matter."""
ONE_SHOT_BYTES = 256 * 1024
"""Up to this size, one-shot is cheaper than the second synchronisation of two-shot."""
WHOLE_BYTES = 16
"""The kernels load vectors of this size; other sizes go to NCCL."""
PATIENCE = timedelta(seconds=60)
"""How long to wait for the other ranks at startup."""
ROW_BYTES = 8192 * DTYPE.itemsize
"""A row of Qwen2-72B. The check at startup tries an odd number of such rows in each kernel's range."""
OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""torch identifies devices by ordinal. Ray shows each rank one device as ordinal 0, although they are different; this variable makes torch
accept that, without multicast."""

Prepare = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Turns a computation into a callable that runs it: directly, or as a graph replay."""


class Operations(Protocol):
    """The used part of `torch.ops.symm_mem`. ``buffer`` is a prefix of a symmetric tensor, of the same length on all ranks."""

    def one_shot_all_reduce(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...
    def two_shot_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...
    def multimem_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...


class SymmetricMemoryProvider(Protocol):
    """Allocates symmetric memory; tests replace it."""

    @property
    def operations(self) -> Operations: ...

    def obstacle(self, device: torch.device) -> str | None:
        """Why this rank cannot use symmetric memory, or None."""
        ...

    def identity(self, device: torch.device) -> tuple[int, str]:
        """The device's ordinal in this process, and its globally unique name."""
        ...

    def make(self, process_group: dist.ProcessGroup, count: int, device: torch.device) -> tuple[Tensor, bool]:
        """A buffer of ``count`` elements mapped by all ranks of the group, and whether it supports multicast. All ranks must call this.

        Raises:
            RuntimeError: it cannot be allocated.
        """
        ...


class TorchProvider:
    """torch's symmetric memory."""

    @property
    def operations(self) -> Operations:
        return torch.ops.symm_mem

    def obstacle(self, device: torch.device) -> str | None:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} has no kernels for it"
        missing = [name for name in vars(Operations) if name.endswith(("reduce", "reduce_")) and not hasattr(torch.ops.symm_mem, name)]
        return f"torch {torch.__version__} has no {missing[0]}" if missing else None

    def identity(self, device: torch.device) -> tuple[int, str]:
        return device.index or 0, str(torch.cuda.get_device_properties(device).uuid)

    def make(self, process_group: dist.ProcessGroup, count: int, device: torch.device) -> tuple[Tensor, bool]:
        import torch.distributed._symmetric_memory as symmetric  # alpha: imported only when used

        buffer = symmetric.empty(count, dtype=DTYPE, device=device)
        handle = symmetric.rendezvous(buffer, process_group)
        return buffer, bool(handle.multicast_ptr)


@dataclass(frozen=True, eq=False)
class SymmetricMemory:
    """The symmetric memory of one group."""

    buffer: Tensor
    group_name: str
    has_multicast: bool
    operations: Operations

    def __str__(self) -> str:
        return f"symmetric memory, {'multimem' if self.has_multicast else 'two-shot'} above {ONE_SHOT_BYTES >> 10} KiB"

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` can be all-reduced here; the same on all ranks, as their shapes and dtypes agree."""
        return x.dtype == DTYPE and 0 < x.nbytes <= BUFFER_BYTES and x.nbytes % WHOLE_BYTES == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' contiguous ``x``, which may be overwritten."""
        part = self.buffer[: x.numel()]
        part.copy_(x.view(-1))
        if x.nbytes <= ONE_SHOT_BYTES:
            return self.operations.one_shot_all_reduce(part, "sum", self.group_name).view(x.shape)
        add_up = self.operations.multimem_all_reduce_ if self.has_multicast else self.operations.two_shot_all_reduce_
        add_up(part, "sum", self.group_name)
        return x.copy_(part.view(x.shape))


@dataclass(frozen=True)
class _Offer:
    obstacle: str | None
    host: tuple[str, str]
    """Host and PID namespace: handles are passed between processes by PID."""
    ordinal: int
    device: str


def open_symmetric_memory(
    process_group: dist.ProcessGroup, device: torch.device, *, name: str, store: Any = None, maker: SymmetricMemoryProvider | None = None
) -> SymmetricMemory | None:
    """Open symmetric memory for a group; None on every rank, with a warning about ``name``, if any rank cannot take part or a sum is wrong.

    All members must call this at the same time. ``store`` is the replica's store; its timeout is reduced meanwhile.
    """
    maker = maker or TorchProvider()
    offers = gather_objects(_offer(device, maker), process_group)
    problem = _obstacle(offers)
    memory: SymmetricMemory | None = None
    if problem is None:
        if len({offer.ordinal for offer in offers}) < len(offers):
            os.environ[OVERLAPPING] = "1"
        with _patience(store):
            problem, memory = _made(process_group, device, maker)
        problem = _first_of_all(problem, process_group)
    if problem is None and memory is not None:
        # It selects the kernel, so it is used only if all ranks have it.
        memory = replace(memory, has_multicast=all(has for (has,) in gather_objects((memory.has_multicast,), process_group)))
        problem = _what_is_wrong(memory, process_group, device)
    if problem is not None or memory is None:
        if process_group.rank() == 0:
            logger.warning("%s add up over NCCL alone, not through symmetric memory: %s", name, problem)
        return None
    return memory


def _offer(device: torch.device, maker: SymmetricMemoryProvider) -> _Offer:
    host = (host_of_this_process(), pid_namespace())
    try:
        return _Offer(maker.obstacle(device), host, *maker.identity(device))
    except (RuntimeError, AttributeError) as error:
        return _Offer(str(error), host, 0, "")


def _obstacle(offers: list[_Offer]) -> str | None:
    for rank, offer in enumerate(offers):
        if offer.obstacle is not None:
            return f"rank {rank}: {offer.obstacle}"
        if offer.host != offers[0].host:
            return f"rank {rank} is not on the host of rank 0, or not in its container"
    if len({offer.device for offer in offers}) < len(offers):
        return "two ranks share a device"
    return None


def _made(
    process_group: dist.ProcessGroup, device: torch.device, maker: SymmetricMemoryProvider
) -> tuple[str | None, SymmetricMemory | None]:
    try:
        buffer, has_multicast = maker.make(process_group, BUFFER_BYTES // DTYPE.itemsize, device)
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:  # the interface is alpha and may change
        return f"{type(error).__name__}: {error}", None
    return None, SymmetricMemory(buffer, process_group.group_name, has_multicast, maker.operations)


def _first_of_all(problem: str | None, process_group: dist.ProcessGroup) -> str | None:
    problems = gather_objects((problem,), process_group)
    return next((f"rank {rank}: {one}" for rank, (one,) in enumerate(problems) if one is not None), None)


@contextmanager
def _patience(store: Any) -> Iterator[None]:
    """Limit the store's timeout: a rendezvous that fails must not take as long as loading may."""
    if store is None:
        yield
        return
    before = store.timeout
    store.set_timeout(PATIENCE)
    try:
        yield
    finally:
        store.set_timeout(before)


def _what_is_wrong(memory: SymmetricMemory, process_group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Check sums of every kernel against the process group's, two in a row, launched and on CUDA also replayed. Same result on all ranks.

    A rank that finds a wrong sum still takes part in the remaining checks. If one rank cannot capture, none replays. If a launch fails on
    one rank only, the others hang in theirs; the comparison behind it then ends by the group's timeout, and with it the startup.
    """
    generator, wrong = torch.Generator().manual_seed(process_group.rank()), list[str]()
    one_shot, larger = (WHOLE_BYTES, 7 * ROW_BYTES, ONE_SHOT_BYTES), (ONE_SHOT_BYTES + WHOLE_BYTES, 23 * ROW_BYTES, BUFFER_BYTES)
    for num_bytes in one_shot + larger:
        inputs = [torch.zeros(num_bytes // DTYPE.itemsize, dtype=DTYPE, device=device) for _ in range(2)]
        outputs = [torch.zeros_like(x) for x in inputs]

        def add_up(inputs: list[Tensor] = inputs, outputs: list[Tensor] = outputs) -> None:
            for x, out in zip(inputs, outputs, strict=True):
                out.copy_(memory.all_reduce(x.clone()))

        for prepare in (_launched, _replayed):
            for x in inputs:
                x.copy_(torch.randn(x.shape, generator=generator))
            compute, obstacle = _prepared(prepare, add_up, device)
            if (problem := _first_of_all(obstacle, process_group)) is not None:
                return problem
            try:
                compute()
            except RuntimeError as error:
                wrong.append(f"sums of {num_bytes} bytes raise {error}")
            differences = [_difference(x, out, process_group) for x, out in zip(inputs, outputs, strict=True)]
            wrong += [f"sums of {num_bytes} bytes {one}" for one in differences if one is not None]
    return _first_of_all(wrong[0] if wrong else None, process_group)


def _prepared(prepare: Prepare, compute: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], str | None]:
    """The prepared computation, and the obstacle if it could not be prepared."""
    try:
        return prepare(compute, device), None
    except RuntimeError as error:
        return compute, f"sums are not captured: {error}"


def _launched(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    return compute


def _replayed(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture and replay in a CUDA graph, as decoding steps are; on a CPU run directly."""
    if device.type != "cuda":
        return compute
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay


def _difference(x: Tensor, found: Tensor, process_group: dist.ProcessGroup) -> str | None:
    """How a sum differs from the process group's by more than rounding, or from another rank's; None if it does not. All ranks must call
    this."""
    wanted, sizes, most, least = x.float(), x.float().abs(), found.float(), found.float()
    for tensor, operation in (
        (wanted, dist.ReduceOp.SUM),
        (sizes, dist.ReduceOp.SUM),
        (most, dist.ReduceOp.MAX),
        (least, dist.ReduceOp.MIN),
    ):
        dist.all_reduce(tensor, operation, group=process_group)
    rounding = process_group.size() * torch.finfo(DTYPE).eps / 2
    if not bool(((found.float() - wanted).abs() <= rounding * sizes).all()):
        return "differ from NCCL's"
    return None if bool((most == least).all()) else "differ from rank to rank"
