"""One data-parallel position of a replica as the scheduler sees it: its blocks, and the sequences that live in them."""

from engine.cohort import Cohort
from engine.executor import Capacity
from engine.kv.block_pool import BlockListener, BlockPool
from engine.kv.prefix_cache import PrefixCache
from engine.sequence import Sequence


class Shard:
    """A pool, the prefix cache over it, and its open sequences by their numbers. Shards share no block."""

    def __init__(self, index: int, capacity: Capacity, *, prefix_cache: bool, listener: BlockListener | None) -> None:
        self.index = index
        self.pool = BlockPool(capacity.num_blocks, listener)
        self.cache = PrefixCache(self.pool, capacity.block_tokens, enabled=prefix_cache)
        self.open: dict[int, Sequence] = {}
        self.cohort = Cohort(index, capacity.block_tokens)
        """Those of `open` that only go on decoding."""
        self.loose: dict[int, Sequence] = {}
        """The others of `open`."""

    def take_out(self, sequence: Sequence) -> None:
        """It is open no more."""
        assert sequence.number is not None
        self.cohort.leave(sequence)
        del self.open[sequence.number]
        self.loose.pop(sequence.number, None)

    def put_in(self, sequence: Sequence) -> None:
        assert sequence.number is not None
        self.open[sequence.number] = self.loose[sequence.number] = sequence

    def loosen(self, sequence: Sequence) -> None:
        """An open sequence that will be planned and recorded by itself."""
        assert sequence.number is not None
        if sequence.number not in self.loose:
            self.cohort.leave(sequence)
            self.loose[sequence.number] = sequence

    def loosen_all(self) -> None:
        """The whole cohort."""
        for sequence in self.cohort.members():
            self.loosen(sequence)

    def join(self, sequence: Sequence, *, end: int) -> None:
        """An open sequence that goes on with the others; see `Cohort.join`."""
        assert sequence.number is not None
        del self.loose[sequence.number]
        self.cohort.join(sequence, end=end)

    def __repr__(self) -> str:
        return f"<Shard {self.index} [{len(self.open)} open] {self.pool}>"
