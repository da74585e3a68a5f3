"""Which position on the ``ep`` axis holds which routed experts, and the lookup table for dispatch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.axes import split


class InvalidPlacement(ValueError):
    """An expert has no position, or one that does not exist."""


@dataclass(frozen=True)
class ExpertPlacement:
    """``holders[expert]``: the ep positions that hold it, ascending. The tokens of an expert with several holders are split among them.

    5 experts over 2 positions, expert 0 held twice:  ((0, 1), (0,), (0,), (1,), (1,))
    """

    num_ranks: int
    holders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for expert, ranks in enumerate(self.holders):
            if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 0 or ranks[-1] >= self.num_ranks:
                raise InvalidPlacement(f"expert {expert} is held by {ranks}; give ascending positions from 0 to {self.num_ranks - 1}")

    @property
    def num_experts(self) -> int:
        return len(self.holders)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """The experts at one ep position, ascending."""
        return tuple(expert for expert, ranks in enumerate(self.holders) if rank in ranks)

    def table(self, device: torch.device) -> "HolderTable":
        copies = max((len(ranks) for ranks in self.holders), default=1)
        rows = [[ranks[copy % len(ranks)] for copy in range(copies)] for ranks in self.holders]
        return HolderTable(
            torch.tensor(rows, dtype=torch.int64, device=device).view(-1, copies),
            torch.tensor([len(ranks) for ranks in self.holders], dtype=torch.int64, device=device),
        )

    def __repr__(self) -> str:
        counts = [len(self.held_by(rank)) for rank in range(self.num_ranks)]
        return f"<ExpertPlacement [{self.num_experts} experts | {counts} per ep rank]>"


@dataclass(frozen=True)
class HolderTable:
    """A placement as tensors: holders (E, max copies) and the number of copies of each expert (E)."""

    holders: Tensor
    num_copies: Tensor

    def choose(self, expert_ids_TA: Tensor, first: int = 0) -> Tensor:
        """(T, A): the ep position that computes each assignment. Copies of an expert take its tokens in turn.

        ``first`` is the turn of the first token: ranks with few tokens each should not all begin with the same copy.
        """
        if self.holders.shape[1] == 1:
            return self.holders.view(-1)[expert_ids_TA]
        turn_T1 = torch.arange(first, first + expert_ids_TA.shape[0], device=expert_ids_TA.device).unsqueeze(1)
        return self.holders[expert_ids_TA, turn_T1 % self.num_copies[expert_ids_TA]]


def balanced_placement(num_experts: int, ranks: int) -> ExpertPlacement:
    """Every expert once, in contiguous, near-even ranges.

    num_experts=5, ranks=2:  experts 0 1 2 | 3 4
    """
    holders = {expert: rank for rank in range(ranks) for span in split(num_experts, rank, ranks).spans for expert in span}
    return ExpertPlacement(ranks, tuple((holders[expert],) for expert in range(num_experts)))
