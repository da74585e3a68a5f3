"""The pipeline axis: which layers a stage computes, and how hidden states pass from one stage to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.axes import split
from parallel.collectives import PendingSend, begin_send, receive
from parallel.groups import Group


def stage_layers(num_layers: int, pp: int, rank: int) -> range:
    """The layers of one stage, contiguous and near-even; the earlier stages have the extra ones, as the last has the head.

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
    """Hands hidden states to the next stage, one step's at a time, while this stage goes on with the next step.

    Ranks send to the one with their own place in the next stage: nothing is sent twice to a rank.
    """

    def __init__(self, pp: Group) -> None:
        self._pp = pp
        self._sending: PendingSend | None = None

    def send(self, x: Tensor) -> None:
        """Begin to send ``x``, which must not be changed any more; what was sent before has arrived when this returns.

        A stage can so be one step ahead of the next one and no more, and a send that failed is raised at the following one.
        """
        if is_last_stage(self._pp):
            raise ValueError("the last stage has nobody to send hidden states to")
        if self._sending is not None:
            self._sending.wait()
        self._sending = begin_send(x, self._pp.rank + 1, self._pp)


def receive_hidden(shape: Sequence[int], pp: Group, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hidden states from the stage before. Both stages know the batch, so the shape need not travel."""
    if is_first_stage(pp):
        raise ValueError("the first stage has nobody to receive hidden states from")
    return receive(shape, pp.rank - 1, pp, dtype=dtype, device=device)
