"""Place 7 of a request, first half: the waiting queue, and which sequence is admitted next on which shard."""

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from engine.executor import Capacity
from engine.policy import Policy, SortKey
from engine.sequence import Sequence
from engine.shard_budget import ShardBudget

PREFIX_WEIGHT = 2
"""A sequence goes to the shard that has its prefix cached unless that shard is busier than the least busy one by more than this many times
the cached tokens. Recomputing a prefix costs once; an uneven load costs in every step, because all shards wait for the slowest."""

RESERVE_DIVISOR = 12
"""The fraction (1 / this) of `max_running` and of a shard's blocks that is reserved; see `Policy.must_leave_reserve`."""


@dataclass(frozen=True)
class RunningLimit:
    """How many sequences may hold KV blocks, and how many do."""

    max_running: int
    num_running: int


@dataclass(frozen=True)
class Candidate:
    """A shard that a waiting sequence could go to, and the blocks there that hold a prefix of it."""

    budget: ShardBudget
    cached_blocks: list[int]

    def has_room(self, sequence: Sequence, capacity: Capacity, *, leave_reserve: bool = False) -> bool:
        """Whether the shard has blocks for all known tokens of the sequence, and the reserve besides if that is to be left."""
        pool = self.budget.shard.pool
        missing = capacity.blocks_for(len(sequence.tokens)) - len(self.cached_blocks)
        reserve = pool.num_blocks // RESERVE_DIVISOR if leave_reserve else 0
        return missing <= pool.num_available - pool.num_cached_of(self.cached_blocks) - reserve


def candidates(sequence: Sequence, budgets: Iterable[ShardBudget], block_tokens: int) -> list[Candidate]:
    """Best first: the longest cached prefix among the shards that are not too busy for it, then the least busy shard."""
    found = [Candidate(budget, budget.shard.cache.find(sequence)) for budget in budgets]
    least_load = min((candidate.budget.load_tokens for candidate in found), default=0)

    def sort_key(candidate: Candidate) -> tuple[bool, int, int]:
        load, num_cached = candidate.budget.load_tokens, len(candidate.cached_blocks)
        return load - least_load > PREFIX_WEIGHT * num_cached * block_tokens, -num_cached, load

    return sorted(found, key=sort_key)


class WaitingQueue:
    """The sequences without blocks, sorted by the policy's key."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.sequences: list[Sequence] = []
        self.num_tokens = 0
        """Known tokens of all waiting sequences."""

    def add_new(self, sequence: Sequence) -> None:
        """Add a sequence that has just arrived."""
        self._policy.on_arrival(sequence, self.sequences)
        self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence that waits, perhaps once more."""
        bisect.insort(self.sequences, sequence, key=self._policy.sort_key)
        self.num_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self.num_tokens -= len(sequence.tokens)

    def admit(
        self,
        budgets: list[ShardBudget],
        capacity: Capacity,
        may_run: Callable[[Sequence], bool],
        running_limit: Callable[[], RunningLimit],
        before_key: Callable[[SortKey], None],
    ) -> Iterator[tuple[Sequence, Candidate]]:
        """Yield sequences to admit, in the policy's order, until one finds no room. The caller opens each before asking for the next.

        Each gets blocks for all its known tokens at once, so that no prompt is preempted half way. A sequence whose next block is being
        computed by another sequence right now is skipped and waits for that block. ``before_key`` is called with the key of each sequence
        looked at, before the sequence takes anything.
        """
        if not self.sequences:
            return
        for sequence in filter(may_run, self._policy.admission_order(self.sequences)):
            before_key(self._policy.sort_key(sequence))
            if not any(budget.tokens for budget in budgets):
                return
            limit = running_limit()
            leave_reserve = limit.num_running > 0 and self._policy.must_leave_reserve(sequence)
            if limit.num_running >= limit.max_running - (limit.max_running // RESERVE_DIVISOR if leave_reserve else 0):
                return
            ordered = candidates(sequence, budgets, capacity.block_tokens)
            best = ordered[0]
            if not best.budget.can_take(sequence) or best.budget.shard.cache.is_being_computed(sequence, len(best.cached_blocks)):
                continue  # waiting a little costs less than computing its prefix again elsewhere
            possible = (candidate for candidate in ordered if candidate.budget.can_take(sequence))
            chosen = next((one for one in possible if one.has_room(sequence, capacity, leave_reserve=leave_reserve)), None)
            if chosen is None:
                return
            self.remove(sequence)
            yield sequence, chosen
