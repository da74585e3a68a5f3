"""Which ep position should hold which experts, given how much each is used. Pure arithmetic, the same on every rank.

After the greedy balancer of DeepSeek-V3 (arXiv 2412.19437, section 3.4: redundant experts): give the experts that are used
most a second home, then lay the copies, heaviest first, where there is least. An expert's copies take its tokens in turn
(`HolderTable.choose`), so each is reckoned with an even part of its load.
"""

from collections.abc import Sequence

from parallel.axes import split
from parallel.expert_placement import ExpertPlacement, InvalidPlacement, balanced_placement

Loads = Sequence[float]
"""Tokens sent to each expert."""
Capacity = Sequence[int]
"""How many experts each ep position may hold. It never changes while a replica runs, so neither does its memory."""


def even_capacity(num_experts: int, ranks: int, redundant: int = 0) -> tuple[int, ...]:
    """An even share each, and ``redundant`` more where that is not the whole.

    num_experts=5, ranks=2:   3 2       with redundant=1:   4 3
    """
    return tuple(min(num_experts, len(split(num_experts, rank, ranks)) + redundant) for rank in range(ranks))


def place_experts(loads: Loads, room: Capacity) -> ExpertPlacement:
    """A placement that fills the room and evens out the loads; its heaviest position has no more than `balanced_placement`'s.

    Raises:
        InvalidPlacement: there is less room than experts.
    """
    even = balanced_placement(len(loads), len(room))
    if sum(room) < len(loads):
        raise InvalidPlacement(f"{len(loads)} experts do not fit into room for {list(room)}; every expert needs a place")
    found = _pack(loads, room, _num_copies(loads, room))
    fits = all(len(even.held_by(rank)) <= room[rank] for rank in range(len(room)))
    return even if fits and max(rank_loads(even, loads)) < max(rank_loads(found, loads)) else found


def rank_loads(placement: ExpertPlacement, loads: Loads) -> list[float]:
    """What each ep position computes."""
    total = [0.0] * placement.num_ranks
    for load, ranks in zip(loads, placement.holders, strict=True):
        for rank in ranks:
            total[rank] += load / len(ranks)
    return total


def imbalance(placement: ExpertPlacement, loads: Loads) -> float:
    """The heaviest position's load over the mean: 1 is perfect, and all others wait for it. 1 where nothing was computed."""
    per_rank = rank_loads(placement, loads)
    total = sum(per_rank)
    return max(per_rank) * len(per_rank) / total if total else 1.0


def relabelled(target: ExpertPlacement, current: ExpertPlacement, room: Capacity) -> ExpertPlacement:
    """``target`` with its positions renamed, so that as much as possible stays where it is. The loads are the same, differently named."""
    wanted = [set(target.held_by(rank)) for rank in range(target.num_ranks)]
    present = [set(current.held_by(rank)) for rank in range(current.num_ranks)]
    pairs = sorted(
        ((part, rank) for part in range(len(wanted)) for rank in range(len(present)) if room[part] == room[rank]),
        key=lambda pair: (-len(wanted[pair[0]] & present[pair[1]]), pair),
    )
    new_name: dict[int, int] = {}
    for part, rank in pairs:
        if part not in new_name and rank not in new_name.values():
            new_name[part] = rank
    return ExpertPlacement(target.num_ranks, tuple(tuple(sorted(new_name[rank] for rank in ranks)) for ranks in target.holders))


def _num_copies(loads: Loads, room: Capacity) -> list[int]:
    """One each, and what room is left to those whose copies still have most to do."""
    copies = [1] * len(loads)
    positions = sum(1 for places in room if places)
    for _ in range(sum(room) - len(loads)):
        candidates = [expert for expert, count in enumerate(copies) if count < positions]
        if not candidates:
            break
        copies[max(candidates, key=lambda expert: (loads[expert] / copies[expert], -copies[expert], -expert))] += 1
    return copies


def _pack(loads: Loads, room: Capacity, copies: Sequence[int]) -> ExpertPlacement:
    """First copies and further ones in one order, heaviest first, each to the lightest position that has room and not the same expert.

    A further copy for which only such positions are left is given up; a first copy always finds a place.
    """
    held: list[set[int]] = [set() for _ in room]
    filled = [0.0] * len(room)
    waiting = [(-loads[expert] / count, copy > 0, expert) for expert, count in enumerate(copies) for copy in range(count)]
    num_first = len(loads)
    for weight, is_further, expert in sorted(waiting):
        free = sum(room) - sum(map(len, held))
        open_to_it = [rank for rank, places in enumerate(room) if len(held[rank]) < places and expert not in held[rank]]
        if is_further and (not open_to_it or free <= num_first):
            continue
        rank = min(open_to_it, key=lambda rank: (filled[rank], rank))
        held[rank].add(expert)
        filled[rank] -= weight
        num_first -= not is_further
    holders = (tuple(rank for rank, experts in enumerate(held) if expert in experts) for expert in range(len(loads)))
    return ExpertPlacement(len(room), tuple(holders))
