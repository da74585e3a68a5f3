"""Moves experts from one placement to another: plans the order of moves, and sends the weights.

A position never holds more than one expert beyond its capacity, and only one position at a time does.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import receive, send
from parallel.expert_placement import ExpertPlacement, InvalidPlacement
from parallel.groups import Group

Tensors = dict[str, Tensor]
"""All tensors of one expert on one rank, by names that are the same on all ranks."""


@dataclass(frozen=True)
class Move:
    """``source`` sends a copy of ``expert`` to ``target``."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class Drop:
    """``rank`` drops ``expert``, which others hold."""

    expert: int
    rank: int


def plan_moves(current: ExpertPlacement, target: ExpertPlacement) -> Iterator[Move | Drop]:
    """The moves and drops that turn ``current`` into ``target``, in order.

    A position drops an expert that it does not keep as soon as one of its keepers has it. If a position holds one too many, such an
    expert of it is moved next. So a position needs capacity for what it holds before or after, whichever is more, plus one.

    experts 0 1 | 2 3  ->  2 1 | 0 3:   0 moves right, left drops 0, 2 moves left, right drops 2
    """
    if (current.num_experts, current.num_ranks) != (target.num_experts, target.num_ranks):
        raise InvalidPlacement(f"{current!r} cannot become {target!r}")
    held = [set(current.held_by(rank)) for rank in range(current.num_ranks)]
    room = [max(len(held[rank]), len(target.held_by(rank))) for rank in range(current.num_ranks)]
    pending = [(expert, rank) for expert, ranks in enumerate(target.holders) for rank in ranks if expert not in held[rank]]

    def next_move() -> Move:
        too_full = next((rank for rank, experts in enumerate(held) if len(experts) > room[rank]), None)
        if too_full is not None:
            expert = min(expert for expert in held[too_full] if too_full not in target.holders[expert])
            return Move(expert, too_full, target.holders[expert][0])  # no keeper has it yet, else it would have been dropped
        expert, rank = next((move for move in pending if len(held[move[1]]) < room[move[1]]), pending[0])
        holders = [holder for holder, experts in enumerate(held) if expert in experts]
        return Move(expert, min(holders, key=lambda holder: (holder not in target.holders[expert], holder)), rank)

    def drops() -> Iterator[Drop]:
        for rank, experts in enumerate(held):
            for expert in sorted(experts):
                keepers = target.holders[expert]
                if rank not in keepers and any(expert in held[keeper] for keeper in keepers):
                    experts.remove(expert)
                    yield Drop(expert, rank)

    yield from drops()
    while pending:
        move = next_move()
        pending.remove((move.expert, move.target))
        held[move.target].add(move.expert)
        yield move
        yield from drops()


def send_expert(tensors: Tensors, to: int, group: Group) -> None:
    """Send all tensors of one expert, each as one message of bytes, to another member, which must call `receive_expert`."""
    device = next(iter(tensors.values())).device
    layout = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _by_stride(tensor)) for name, tensor in tensors.items()]
    header = torch.tensor(list(json.dumps(layout).encode()), dtype=torch.uint8, device=device)
    send(torch.tensor([header.numel()], dtype=torch.int64, device=device), to, group)
    send(header, to, group)
    for tensor, (_, _, _, order) in zip(tensors.values(), layout, strict=True):
        send(tensor.permute(order).contiguous().view(-1).view(torch.uint8), to, group)


def receive_expert(source: int, group: Group, device: torch.device) -> Tensors:
    """Receive the tensors of `send_expert`: same names, dtypes, shapes and memory layout, which some formats depend on."""
    (length,) = receive((1,), source, group, dtype=torch.int64, device=device).tolist()
    header = receive((length,), source, group, dtype=torch.uint8, device=device)
    tensors: Tensors = {}
    for name, dtype_name, shape, order in json.loads(bytes(header.tolist())):
        dtype: torch.dtype = getattr(torch, dtype_name)
        in_order = [shape[dim] for dim in order]
        num_bytes = dtype.itemsize * torch.Size(in_order).numel()
        raw = receive((num_bytes,), source, group, dtype=torch.uint8, device=device)
        back = [order.index(dim) for dim in range(len(order))]
        tensors[name] = raw.view(dtype).view(in_order).permute(back)
    return tensors


def _by_stride(tensor: Tensor) -> list[int]:
    """The dims in memory order, so that a transposed tensor arrives transposed."""
    strides: tuple[int, ...] = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
