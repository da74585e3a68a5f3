"""What the ranks of a group do together. On a group of one every function is the identity and copies nothing.

All members call the same functions in the same order. Sums are taken in rank order with one rounding at the end for
half-precision types on CPU, whatever the shape: the value of a row does not depend on what else is in the batch, nor
on the rank that reads it. (On CUDA the order is another for other sizes.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.groups import Group
from parallel.last_collective import record
from parallel.native.shared_memory_collectives import DTYPES, SharedMemoryCollectives
from parallel.transport import Transport

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By the name that it has had since torch 2.13; GPU machines that are lent for `benchmarks.gpu` may have an older one."""
GATHER_BELOW_BYTES = 64 * 1024
"""An all-reduce of three or more ranks over gloo takes one exchange up to this size, two of less volume above."""


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of everyone's ``x``, on everyone. ``x`` may be overwritten: use what is returned, and ``x`` no more."""
    if group.transport is None or x.numel() == 0:
        return x
    record("all_reduce", group.axis, x.numel())
    x = x.contiguous()
    memory = group.transport.shared_memory
    if memory is not None and x.dtype in DTYPES:
        return memory.all_reduce_(x)
    symmetric = group.transport.symmetric_memory
    if symmetric is not None and symmetric.takes(x):
        return symmetric.all_reduce(x)
    if group.transport.backend == "nccl" or group.size == 2:  # two summands have one order
        dist.all_reduce(x, group=group.transport.process_group)
        return x
    return _sum_over_gloo(x, group.transport, group.size)


def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Everyone's ``x`` concatenated along ``dim``, in rank order, on everyone.

    ``sizes`` are the lengths of ``dim`` on each rank; None: all are as long as this rank's. Other dims must agree.
    """
    if group.transport is None:
        return x
    dim %= x.dim()
    sizes = [x.shape[dim]] * group.size if sizes is None else sizes
    _check_sizes(sizes, group, x.shape[dim])
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    counts = [_count(shape) for shape in shapes]
    longest = max(counts)
    if longest == 0:
        return x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
    record("all_gather", group.axis, x.numel())
    if group.transport.shared_memory is not None:
        return _gather_through(group.transport.shared_memory, x.contiguous(), dim, sizes)
    flat = x.contiguous().view(-1)
    if flat.numel() < longest:  # torch gathers equal lengths only
        flat = torch.cat((flat, flat.new_zeros(longest - flat.numel())))
    gathered = x.new_empty(group.size, longest)
    _gather_into(gathered.view(-1), flat, group=group.transport.process_group)
    if dim == 0 and len(set(sizes)) == 1:
        return gathered.view(sum(sizes), *x.shape[1:])
    pieces = [row[:count].view(shape) for row, count, shape in zip(gathered, counts, shapes, strict=True)]
    return torch.cat(pieces, dim=dim)


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part, along ``dim``, of the sum of everyone's ``x``.

    ``sizes`` says how long each rank's part is; None: equal parts.
    """
    if group.transport is None:
        return x
    length = x.shape[dim]
    if sizes is None:
        if length % group.size:
            raise ValueError(f"a dim of {length} does not divide into {group.size} equal parts; give the sizes")
        sizes = [length // group.size] * group.size
    if sum(sizes) != length or len(sizes) != group.size:
        raise ValueError(f"sizes {list(sizes)} do not share out a dim of {length} over {group.size} ranks")
    mine = sizes[group.rank]
    parts = all_to_all(x.movedim(dim, 0).contiguous(), sizes, [mine] * group.size, group)
    return _sum_in_rank_order(parts.view(group.size, mine, *parts.shape[1:])).movedim(0, dim)


def all_to_all(x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group) -> Tensor:
    """Rows of ``x`` to everyone: ``send_sizes[r]`` rows go to rank r, ``receive_sizes[r]`` come from it, in rank order."""
    if group.transport is None:
        return x
    _check_sizes(send_sizes, group)
    _check_sizes(receive_sizes, group)
    if sum(send_sizes) != x.shape[0]:
        raise ValueError(f"send sizes {list(send_sizes)} do not add up to the {x.shape[0]} rows given")
    record("all_to_all", group.axis, x.numel())
    received = x.new_empty(sum(receive_sizes), *x.shape[1:])
    if group.transport.shared_memory is not None:
        row_bytes = _count(x.shape[1:]) * x.element_size()
        sends, receives = ([size * row_bytes for size in sizes] for sizes in (send_sizes, receive_sizes))
        group.transport.shared_memory.all_to_all(x.contiguous(), received, sends, receives)
        return received
    dist.all_to_all_single(received, x.contiguous(), list(receive_sizes), list(send_sizes), group=group.transport.process_group)
    return received


def broadcast(x: Tensor, root: int, group: Group) -> Tensor:
    """The ``x`` of the member at position ``root`` of the group, on everyone; written over ``x`` if it is contiguous."""
    if group.transport is None:
        return x
    x = x.contiguous()
    if x.numel():
        record("broadcast", group.axis, x.numel())
        dist.broadcast(x, group=group.transport.process_group, group_src=root)
    return x


@dataclass(frozen=True)
class PendingSend:
    """A tensor on its way. It is kept here until it has arrived."""

    x: Tensor
    work: dist.Work | None

    def wait(self) -> None:
        """Return when the receiver has it (on CUDA: when what the device does next may count on that)."""
        if self.work is not None:
            self.work.wait()


def begin_send(x: Tensor, to: int, group: Group) -> PendingSend:
    """Begin to send ``x`` to the member at position ``to``, which must call `receive` with the same shape and dtype."""
    transport = _with_others(group)
    record("send", group.axis, x.numel())
    x = x.contiguous()
    return PendingSend(x, dist.isend(x, group=transport.process_group, group_dst=to) if x.numel() else None)


def send(x: Tensor, to: int, group: Group) -> None:
    """``x`` to the member at position ``to``, as `begin_send`; when this returns it has arrived."""
    begin_send(x, to, group).wait()


def receive(shape: Sequence[int], source: int, group: Group, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from the member at position ``source``."""
    transport = _with_others(group)
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if x.numel():
        record("receive", group.axis, x.numel())
        dist.recv(x, group=transport.process_group, group_src=source)
    return x


def barrier(group: Group) -> None:
    """Return when every member has called this."""
    if group.transport is not None:
        record("barrier", group.axis, 0)
        dist.barrier(group=group.transport.process_group)


def _gather_through(memory: SharedMemoryCollectives, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    joined = x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
    row_bytes = _count(x.shape[dim + 1 :]) * x.element_size()
    memory.all_gather(x, joined, _count(x.shape[:dim]), [size * row_bytes for size in sizes])
    return joined


def _sum_over_gloo(x: Tensor, transport: Transport, size: int) -> Tensor:
    """Gloo's own ring sums each stretch of a tensor in another order, and rounds half precision at every addition."""
    flat = x.view(-1)
    if flat.numel() * flat.element_size() <= GATHER_BELOW_BYTES:
        everyones = flat.new_empty(size, flat.numel())
        _gather_into(everyones.view(-1), flat, group=transport.process_group)
        return _sum_in_rank_order(everyones).view(x.shape)
    part = -(-flat.numel() // size)
    padded = torch.cat((flat, flat.new_zeros(part * size - flat.numel()))) if flat.numel() % size else flat
    mine = torch.empty_like(padded)
    dist.all_to_all_single(mine, padded, group=transport.process_group)
    summed = padded.new_empty(part * size)
    _gather_into(summed, _sum_in_rank_order(mine.view(size, part)), group=transport.process_group)
    return summed[: flat.numel()].view(x.shape)


def _sum_in_rank_order(parts_N: Tensor) -> Tensor:
    """Sum over the first dim, one summand after the other; half precision is added up in float32 and rounded once."""
    half = parts_N.dtype in (torch.bfloat16, torch.float16)
    total = parts_N[0].to(torch.float32) if half else parts_N[0].clone()
    for part in parts_N[1:]:
        total += part
    return total.to(parts_N.dtype)


def _with_others(group: Group) -> Transport:
    if group.transport is None:
        raise ValueError(f"nobody to talk to: the {group.axis} group has one member")
    return group.transport


def _check_sizes(sizes: Sequence[int], group: Group, mine: int | None = None) -> None:
    if len(sizes) != group.size:
        raise ValueError(f"{len(sizes)} sizes for a group of {group.size}")
    if mine is not None and sizes[group.rank] != mine:
        raise ValueError(f"rank {group.rank} of {group.axis} has {mine} elements, and the sizes say {sizes[group.rank]}")


def _count(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
