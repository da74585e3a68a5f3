"""Step 7 of a request, its beginning: who waits, and who of them is opened next, on which shard."""

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from engine.executor import Capacity
from engine.policy import Policy, Rank
from engine.sequence import Sequence
from engine.shard_budget import ShardBudget

PREFIX_WORTH = 2
"""A sequence goes where its prefix is cached while that shard is busier than the least busy one by at most so many times the
tokens found: computing them again costs once, an uneven load in every step, for all shards wait for the slowest."""

KEPT_FREE = 12
"""One part of so many, of the places to run and of a shard's blocks, is not for who has been served more than others."""


@dataclass(frozen=True)
class Places:
    """How many sequences may run, and how many do."""

    total: int
    taken: int


@dataclass(frozen=True)
class Choice:
    """A shard that a waiting sequence could go to, and the blocks of its prefix that are there."""

    portion: ShardBudget
    found: list[int]

    def has_room(self, sequence: Sequence, capacity: Capacity, *, gives_way: bool = False) -> bool:
        """Whether the shard has blocks for all its known tokens, the kept ones not counted where it gives way to others."""
        pool = self.portion.shard.pool
        missing = capacity.blocks_for(len(sequence.tokens)) - len(self.found)
        kept = pool.num_blocks // KEPT_FREE if gives_way else 0
        return missing <= pool.num_available - pool.num_cached_of(self.found) - kept


def choices(sequence: Sequence, portions: Iterable[ShardBudget], block_tokens: int) -> list[Choice]:
    """Best first: the longest cached prefix among the shards that are not too busy for it, then the least busy."""
    found = [Choice(portion, portion.shard.cache.find(sequence)) for portion in portions]
    least = min((choice.portion.load_tokens for choice in found), default=0)

    def rank(choice: Choice) -> tuple[bool, int, int]:
        worth = PREFIX_WORTH * len(choice.found) * block_tokens
        return choice.portion.load_tokens - least > worth, -len(choice.found), choice.portion.load_tokens

    return sorted(found, key=rank)


class Admission:
    """The sequences without blocks, in the order of their ranks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.waiting: list[Sequence] = []
        self.num_tokens = 0
        """Known tokens of all that wait."""

    def arrive(self, sequence: Sequence) -> None:
        """For the first time."""
        self._policy.arrived(sequence, self.waiting)
        self.put(sequence)

    def put(self, sequence: Sequence) -> None:
        """It waits, perhaps again, at its rank."""
        bisect.insort(self.waiting, sequence, key=self._policy.rank)
        self.num_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.num_tokens -= len(sequence.tokens)

    def admit(
        self,
        portions: list[ShardBudget],
        capacity: Capacity,
        may_run: Callable[[Sequence], bool],
        places: Callable[[], Places],
        turn_of: Callable[[Rank], None],
    ) -> Iterator[tuple[Sequence, Choice]]:
        """Waiting sequences in the policy's order until one finds no room; whoever asks opens each before asking for the next.

        Each gets blocks for all its known tokens at once, so that no prompt is preempted half way; one whose next block another
        sequence is computing right now waits for it. ``turn_of`` is told the rank of each that is looked at, before it takes anything.
        """
        if not self.waiting:
            return
        for sequence in filter(may_run, self._policy.order(self.waiting)):
            turn_of(self._policy.rank(sequence))
            if not any(portion.budget for portion in portions):
                return
            now = places()
            gives_way = now.taken > 0 and self._policy.gives_way(sequence)
            if now.taken >= now.total - (now.total // KEPT_FREE if gives_way else 0):
                return
            wanted = choices(sequence, portions, capacity.block_tokens)
            first = wanted[0]
            if not first.portion.may_take(sequence) or first.portion.shard.cache.is_on_its_way(sequence, len(first.found)):
                continue  # waiting a little costs less than computing its prefix again elsewhere
            rooms = (choice for choice in wanted if choice.portion.may_take(sequence))
            choice = next((choice for choice in rooms if choice.has_room(sequence, capacity, gives_way=gives_way)), None)
            if choice is None:
                return
            self.remove(sequence)
            yield sequence, choice
