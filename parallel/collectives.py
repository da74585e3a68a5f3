"""Collectives over the ranks of a group. On a group of one, every function is the identity and copies nothing.

All members must call the same functions in the same order. On CPU, sums are taken in rank order whatever the shape, with one rounding
at the end for half precision: a row's value depends neither on the rest of the batch nor on the rank. (On CUDA the order of summation
depends on the size.)
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
"""Named all_gather_single since torch 2.13; the GPU machines used for `benchmarks.gpu` may have an older torch."""
GATHER_BELOW_BYTES = 64 * 1024
"""An all-reduce of three or more ranks over gloo is one all-gather up to this size, and two exchanges of less volume above."""


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' ``x``, on every rank. ``x`` may be overwritten: use only the returned tensor."""
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
    """All ranks' ``x`` concatenated along ``dim`` in rank order, on every rank.

    ``sizes`` are the lengths of ``dim`` on each rank; None: all as on this rank. The other dims must agree.
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
    """This rank's part, along ``dim``, of the sum of all ranks' ``x``.

    ``sizes`` are the lengths of the parts; None: equal parts.
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
    """Exchange rows of ``x``: send ``send_sizes[r]`` rows to rank r and receive ``receive_sizes[r]`` from it, in rank order."""
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
    """The ``x`` of the member at position ``root``, on every rank. Overwrites ``x`` if it is contiguous."""
    if group.transport is None:
        return x
    x = x.contiguous()
    if x.numel():
        record("broadcast", group.axis, x.numel())
        dist.broadcast(x, group=group.transport.process_group, group_src=root)
    return x


@dataclass(frozen=True)
class PendingSend:
    """Handle of a `begin_send`. Keeps the tensor alive until it has arrived."""

    x: Tensor
    work: dist.Work | None

    def wait(self) -> None:
        """Block until the receiver has it (on CUDA: only the current stream waits)."""
        if self.work is not None:
            self.work.wait()


def begin_send(x: Tensor, to: int, group: Group) -> PendingSend:
    """Start sending ``x`` to the member at position ``to``, which must call `receive` with the same shape and dtype."""
    transport = _with_others(group)
    record("send", group.axis, x.numel())
    x = x.contiguous()
    return PendingSend(x, dist.isend(x, group=transport.process_group, group_dst=to) if x.numel() else None)


def send(x: Tensor, to: int, group: Group) -> None:
    """As `begin_send`, but blocks until ``x`` has arrived."""
    begin_send(x, to, group).wait()


def receive(shape: Sequence[int], source: int, group: Group, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Receive a tensor from the member at position ``source``."""
    transport = _with_others(group)
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    if x.numel():
        record("receive", group.axis, x.numel())
        dist.recv(x, group=transport.process_group, group_src=source)
    return x


def barrier(group: Group) -> None:
    """Block until every member has called this."""
    if group.transport is not None:
        record("barrier", group.axis, 0)
        dist.barrier(group=group.transport.process_group)


def _gather_through(memory: SharedMemoryCollectives, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    joined = x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
    row_bytes = _count(x.shape[dim + 1 :]) * x.element_size()
    memory.all_gather(x, joined, _count(x.shape[:dim]), [size * row_bytes for size in sizes])
    return joined


def _sum_over_gloo(x: Tensor, transport: Transport, size: int) -> Tensor:
    """All-reduce in rank order. Gloo's own ring sums each chunk in a different order and rounds half precision at every addition."""
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
    """Sum over the first dim in order; half precision is accumulated in float32 and rounded once."""
    half = parts_N.dtype in (torch.bfloat16, torch.float16)
    total = parts_N[0].to(torch.float32) if half else parts_N[0].clone()
    for part in parts_N[1:]:
        total += part
    return total.to(parts_N.dtype)


def _with_others(group: Group) -> Transport:
    if group.transport is None:
        raise ValueError(f"no peer to send to: the {group.axis} group has one member")
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
