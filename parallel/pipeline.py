"""Pipeline parallelism: which layers a stage computes, and how hidden states are sent from one stage to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.axes import split
from parallel.collectives import PendingSend, begin_send, receive
from parallel.groups import Group


def stage_layers(num_layers: int, pp: int, rank: int) -> range:
    """The layers of one stage, contiguous and near-even. Earlier stages get the extra layers, as the last one computes the LM head.

    num_layers=28, pp=3:  10 | 9 | 9

    Raises:
        ValueError: there are more stages than layers.
    """
    if pp > num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {pp} stages; use pp={num_layers} at most")
    (span,) = split(num_layers, rank, pp).spans
    return span


def is_first_stage(pp: Group) -> bool:
    """Whether this stage embeds tokens instead of receiving hidden states."""
    return pp.rank == 0


def is_last_stage(pp: Group) -> bool:
    """Whether this stage computes logits instead of sending hidden states."""
    return pp.rank == pp.size - 1


class HiddenSender:
    """Sends hidden states to the next stage asynchronously, one step at a time, while this stage computes the next step.

    Each rank sends to the rank at its own position in the next stage, so every rank receives them once.
    """

    def __init__(self, pp: Group) -> None:
        self._pp = pp
        self._sending: PendingSend | None = None

    def send(self, x: Tensor) -> None:
        """Start sending ``x``, which must not be changed any more, after the previous send has completed.

        So a stage is at most one step ahead of the next one, and the error of a failed send is raised by the following call.
        """
        if is_last_stage(self._pp):
            raise ValueError("the last stage has no next stage to send hidden states to")
        if self._sending is not None:
            self._sending.wait()
        self._sending = begin_send(x, self._pp.rank + 1, self._pp)


def receive_hidden(shape: Sequence[int], pp: Group, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Receive hidden states from the previous stage. Both stages know the batch, so the shape is not sent."""
    if is_first_stage(pp):
        raise ValueError("the first stage has no previous stage to receive hidden states from")
    return receive(shape, pp.rank - 1, pp, dtype=dtype, device=device)
