"""One data-parallel position of a replica as the scheduler sees it: its KV blocks and the sequences that live in them."""

from engine.cohort import Cohort
from engine.executor import Capacity
from engine.kv.block_pool import BlockListener, BlockPool
from engine.kv.prefix_cache import PrefixCache
from engine.sequence import Sequence


class Shard:
    """A block pool, the prefix cache over it, and the open sequences by number. Shards share no blocks."""

    def __init__(self, index: int, capacity: Capacity, *, prefix_cache: bool, listener: BlockListener | None) -> None:
        self.index = index
        self.pool = BlockPool(capacity.num_blocks, listener)
        self.cache = PrefixCache(self.pool, capacity.block_tokens, enabled=prefix_cache)
        self.open: dict[int, Sequence] = {}
        """Every sequence that holds blocks here: each is either in `cohort` or in `individual`."""
        self.cohort = Cohort(index, capacity.block_tokens)
        """Sequences that only decode, handled together."""
        self.individual: dict[int, Sequence] = {}
        """Sequences that are planned and recorded one by one."""

    def add(self, sequence: Sequence) -> None:
        """A sequence was opened here. It starts outside the cohort."""
        assert sequence.number is not None
        self.open[sequence.number] = self.individual[sequence.number] = sequence

    def remove(self, sequence: Sequence) -> None:
        """A sequence was closed."""
        assert sequence.number is not None
        self.cohort.leave(sequence)
        del self.open[sequence.number]
        self.individual.pop(sequence.number, None)

    def join_cohort(self, sequence: Sequence, *, end: int) -> None:
        """From now on the sequence is planned with the cohort; see `Cohort.join`."""
        assert sequence.number is not None
        del self.individual[sequence.number]
        self.cohort.join(sequence, end=end)

    def leave_cohort(self, sequence: Sequence) -> None:
        """From now on the sequence is planned individually. Does nothing if it already is."""
        assert sequence.number is not None
        if sequence.number not in self.individual:
            self.cohort.leave(sequence)
            self.individual[sequence.number] = sequence

    def dissolve_cohort(self) -> None:
        """From now on all sequences are planned individually."""
        for sequence in self.cohort.members():
            self.leave_cohort(sequence)

    def __repr__(self) -> str:
        return f"<Shard {self.index} [{len(self.open)} open] {self.pool}>"
