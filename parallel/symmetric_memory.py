"""Sums of ranks whose devices see each other's memory: through a buffer that all of them map, in one kernel, NCCL behind.

NCCL takes two dozen microseconds for the few hundred KiB that a decoding step adds up twice a layer; most of that is its protocol. torch's
symmetric memory (`torch.distributed._symmetric_memory`, in alpha state; read in 2.11 to 2.13) has kernels that read the others' buffers
themselves: each rank everything (one shot, for little), or each a part and hands it on (two shots), or the switch adds up (multimem, where
it multicasts). One-shot and two-shot add up in rank order and multimem hands one sum to all: so all ranks should have the same bits, as
replicated routers of experts must, and at the sizes that are tried at the start it is seen. A kernel is left only when no rank reads the
buffer any more, so the next sum may use it at once.

It is believed only after it has been seen to add up, launched and replayed, on all ranks of the group; else the log says why not. Its
kernels wait for the other ranks on the device, and no timeout of a process group ends that.
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

log = logging.getLogger(__name__)

DTYPE = torch.bfloat16
"""What models on GPUs add up. float32 goes to NCCL."""
BUFFER_BYTES = 8 * 2**20
"""The sums of 512 decoding rows of Qwen2-72B; what is larger takes so long that NCCL's protocol does not count."""
ONE_SHOT_BYTES = 256 * 1024
"""Up to here that everybody reads everything costs less than a second round."""
WHOLE_BYTES = 16
"""Vectors that the kernels load; what does not divide into them goes to NCCL."""
PATIENCE = timedelta(seconds=60)
"""For the others at the start."""
ROW_BYTES = 8192 * DTYPE.itemsize
"""Of Qwen2-72B. Of such rows odd numbers are tried, one of each kernel's range."""
OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""torch takes ordinals for devices. Ray shows each rank one device, as number 0: they are different ones all the same. It then does
without multicast."""

Prepare = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Makes of what is to be computed what computes it."""


class Operations(Protocol):
    """Of `torch.ops.symm_mem`. ``buffer`` is a beginning of a symmetric tensor, the same on all ranks."""

    def one_shot_all_reduce(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...
    def two_shot_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...
    def multimem_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor: ...


class SymmetricMemoryProvider(Protocol):
    """Where symmetric memory comes from."""

    @property
    def operations(self) -> Operations: ...

    def obstacle(self, device: torch.device) -> str | None:
        """Why this rank can have none."""
        ...

    def identity(self, device: torch.device) -> tuple[int, str]:
        """The ordinal by which this process knows its device, and what no other device is called."""
        ...

    def make(self, process_group: dist.ProcessGroup, count: int, device: torch.device) -> tuple[Tensor, bool]:
        """A buffer of so many numbers that all ranks of the group map, and whether the switch can add up. All ranks must call this.

        Raises:
            RuntimeError: it cannot be had.
        """
        ...


class TorchProvider:
    """torch's own."""

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
        import torch.distributed._symmetric_memory as symmetric  # in alpha state: not to be imported where nobody wants it

        buffer = symmetric.empty(count, dtype=DTYPE, device=device)
        handle = symmetric.rendezvous(buffer, process_group)
        return buffer, bool(handle.multicast_ptr)


@dataclass(frozen=True, eq=False)
class SymmetricMemory:
    """One group's."""

    buffer: Tensor
    group_name: str
    has_multicast: bool
    operations: Operations

    def __str__(self) -> str:
        return f"symmetric memory, {'multimem' if self.has_multicast else 'two-shot'} above {ONE_SHOT_BYTES >> 10} KiB"

    def takes(self, x: Tensor) -> bool:
        """The same on all ranks, as all have the same to add up."""
        return x.dtype == DTYPE and 0 < x.nbytes <= BUFFER_BYTES and x.nbytes % WHOLE_BYTES == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's contiguous ``x``, which may be overwritten."""
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
    """And which numbering of processes: handles travel by it."""
    ordinal: int
    device: str


def open_symmetric_memory(
    process_group: dist.ProcessGroup, device: torch.device, *, name: str, store: Any = None, maker: SymmetricMemoryProvider | None = None
) -> SymmetricMemory | None:
    """The symmetric memory of a group's ranks, or None on every one of them if any cannot take part or a sum came out wrong: see the log,
    which calls them ``name``.

    All members must call this at the same time. ``store`` is the replica's, whose patience is bounded while this lasts.
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
        # It chooses the kernel, so one rank without it is enough for all to do without.
        memory = replace(memory, has_multicast=all(has for (has,) in gather_objects((memory.has_multicast,), process_group)))
        problem = _what_is_wrong(memory, process_group, device)
    if problem is not None or memory is None:
        if process_group.rank() == 0:
            log.warning("%s add up over NCCL alone, not through symmetric memory: %s", name, problem)
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
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:  # what an interface in alpha state may come to
        return f"{type(error).__name__}: {error}", None
    return None, SymmetricMemory(buffer, process_group.group_name, has_multicast, maker.operations)


def _first_of_all(problem: str | None, process_group: dist.ProcessGroup) -> str | None:
    problems = gather_objects((problem,), process_group)
    return next((f"rank {rank}: {one}" for rank, (one,) in enumerate(problems) if one is not None), None)


@contextmanager
def _patience(store: Any) -> Iterator[None]:
    """A rendezvous that never comes about must not take the time that loading may."""
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
    """Sums of every kind against the process group's, two in a row, launched and on CUDA replayed as well; the same answer on all ranks.

    Whatever one rank finds in a sum, it goes on with the others to the end. Where one cannot capture, none replays. A launch that fails
    on one rank alone leaves the others waiting in theirs: by the group's timeout the comparison behind it ends, and the start with it.
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
    """And what stood in the way."""
    try:
        return prepare(compute, device), None
    except RuntimeError as error:
        return compute, f"sums are not captured: {error}"


def _launched(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    return compute


def _replayed(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As decoding steps are; on a CPU there is no such thing."""
    if device.type != "cuda":
        return compute
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay


def _difference(x: Tensor, found: Tensor, process_group: dist.ProcessGroup) -> str | None:
    """In what a sum differs by more than roundings from the process group's, or from that of another rank. All ranks must call this."""
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
