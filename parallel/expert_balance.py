"""Expert load balancing: which ep position should hold which experts, given their loads. Pure arithmetic, the same on every rank.

After the greedy balancer of DeepSeek-V3 (arXiv 2412.19437, section 3.4: redundant experts): replicate the most used experts, then place
the copies, heaviest first, on the least loaded position. Copies of an expert take its tokens in turn (`HolderTable.choose`), so each
counts with an equal part of its load.
"""

from collections.abc import Sequence

from parallel.axes import split
from parallel.expert_placement import ExpertPlacement, InvalidPlacement, balanced_placement

Loads = Sequence[float]
"""Tokens sent to each expert."""
Capacity = Sequence[int]
"""How many experts each ep position may hold. Fixed while a replica runs, and so is its memory."""


def even_capacity(num_experts: int, ranks: int, redundant: int = 0) -> tuple[int, ...]:
    """An even share of the experts for each position plus ``redundant`` more, at most all.

    num_experts=5, ranks=2:   3 2       with redundant=1:   4 3
    """
    return tuple(min(num_experts, len(split(num_experts, rank, ranks)) + redundant) for rank in range(ranks))


def place_experts(loads: Loads, max_experts: Capacity) -> ExpertPlacement:
    """A placement that fills the capacity and balances the loads; its heaviest position is no heavier than `balanced_placement`'s.

    Raises:
        InvalidPlacement: there are more experts than capacity.
    """
    even = balanced_placement(len(loads), len(max_experts))
    if sum(max_experts) < len(loads):
        raise InvalidPlacement(f"{len(loads)} experts do not fit into room for {list(max_experts)}; every expert needs a place")
    found = _pack(loads, max_experts, _num_copies(loads, max_experts))
    fits = all(len(even.held_by(rank)) <= max_experts[rank] for rank in range(len(max_experts)))
    return even if fits and max(rank_loads(even, loads)) < max(rank_loads(found, loads)) else found


def rank_loads(placement: ExpertPlacement, loads: Loads) -> list[float]:
    """The load of each ep position."""
    total = [0.0] * placement.num_ranks
    for load, ranks in zip(loads, placement.holders, strict=True):
        for rank in ranks:
            total[rank] += load / len(ranks)
    return total


def imbalance(placement: ExpertPlacement, loads: Loads) -> float:
    """The heaviest position's load over the mean: 1 is perfect, as all others wait for the heaviest. 1 if nothing was computed."""
    per_rank = rank_loads(placement, loads)
    total = sum(per_rank)
    return max(per_rank) * len(per_rank) / total if total else 1.0


def relabelled(target: ExpertPlacement, current: ExpertPlacement, max_experts: Capacity) -> ExpertPlacement:
    """``target`` with its positions permuted so that as many experts as possible stay where they are. The balance is unchanged."""
    wanted = [set(target.held_by(rank)) for rank in range(target.num_ranks)]
    present = [set(current.held_by(rank)) for rank in range(current.num_ranks)]
    pairs = sorted(
        ((part, rank) for part in range(len(wanted)) for rank in range(len(present)) if max_experts[part] == max_experts[rank]),
        key=lambda pair: (-len(wanted[pair[0]] & present[pair[1]]), pair),
    )
    new_name: dict[int, int] = {}
    for part, rank in pairs:
        if part not in new_name and rank not in new_name.values():
            new_name[part] = rank
    return ExpertPlacement(target.num_ranks, tuple(tuple(sorted(new_name[rank] for rank in ranks)) for ranks in target.holders))


def _num_copies(loads: Loads, max_experts: Capacity) -> list[int]:
    """Copies of each expert: one each, then remaining capacity to the experts with the highest load per copy."""
    copies = [1] * len(loads)
    positions = sum(1 for capacity in max_experts if capacity)
    for _ in range(sum(max_experts) - len(loads)):
        candidates = [expert for expert, count in enumerate(copies) if count < positions]
        if not candidates:
            break
        copies[max(candidates, key=lambda expert: (loads[expert] / copies[expert], -copies[expert], -expert))] += 1
    return copies


def _pack(loads: Loads, max_experts: Capacity, copies: Sequence[int]) -> ExpertPlacement:
    """Place all copies, heaviest first, each on the lightest position that has capacity and does not hold the expert yet.

    A redundant copy for which no such position is left is dropped; a first copy always finds one.
    """
    held: list[set[int]] = [set() for _ in max_experts]
    filled = [0.0] * len(max_experts)
    waiting = [(-loads[expert] / count, copy > 0, expert) for expert, count in enumerate(copies) for copy in range(count)]
    num_first = len(loads)
    for weight, is_further, expert in sorted(waiting):
        free = sum(max_experts) - sum(map(len, held))
        open_to_it = [rank for rank, capacity in enumerate(max_experts) if len(held[rank]) < capacity and expert not in held[rank]]
        if is_further and (not open_to_it or free <= num_first):
            continue
        rank = min(open_to_it, key=lambda rank: (filled[rank], rank))
        held[rank].add(expert)
        filled[rank] -= weight
        num_first -= not is_further
    holders = (tuple(rank for rank, experts in enumerate(held) if expert in experts) for expert in range(len(loads)))
    return ExpertPlacement(len(max_experts), tuple(holders))
