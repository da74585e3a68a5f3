"""Where every sequence of the engine is: waiting, or open on a shard under a number that the ranks know."""

from engine.admission import Admission, Choice
from engine.config import EngineConfig
from engine.executor import Capacity
from engine.kv.block_pool import BlockListener
from engine.policy import Policy
from engine.sequence import Sequence
from engine.shard import Shard


class SequenceTable:
    """NewSequence, closing and preempting, and what is counted of it."""

    def __init__(self, config: EngineConfig, capacity: Capacity, policy: Policy, listener: BlockListener | None) -> None:
        self._config, self._policy, self._listener = config, policy, listener
        self.admission = Admission(policy)
        self.closed: list[int] = []
        """Numbers that the ranks must still be told to forget."""
        self.num_preemptions = 0
        self._num_opened = 0
        self._counted_before = (0, 0)
        """Prefix tokens queried and found in caches that were lost."""
        self.shards: tuple[Shard, ...] = ()
        self.set_capacity(capacity)

    def set_capacity(self, capacity: Capacity) -> None:
        """Empty shards, as new workers have them."""
        self._counted_before = (self.prefix_queried_tokens, self.prefix_hit_tokens)  # counters never go back
        self.capacity = capacity
        self.shards = tuple(
            Shard(index, capacity, prefix_cache=self._config.prefix_cache, listener=self._listener) for index in range(capacity.num_shards)
        )

    @property
    def num_running(self) -> int:
        return sum(len(shard.open) for shard in self.shards)

    @property
    def prefill_tokens(self) -> int:
        """Known tokens that no step has been planned for, but for those of sequences that decode."""
        begun = sum(s.num_pending for shard in self.shards for s in shard.loose.values() if s.num_pending > 1)
        return self.admission.num_tokens + begun

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens looked up in prefix caches at admissions."""
        return self._counted_before[0] + sum(shard.cache.num_queried for shard in self.shards)

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of `prefix_queried_tokens` were found."""
        return self._counted_before[1] + sum(shard.cache.num_found for shard in self.shards)

    def all_open(self) -> list[Sequence]:
        return [sequence for shard in self.shards for sequence in shard.open.values()]

    def open(self, sequence: Sequence, choice: Choice) -> None:
        """Give a sequence that no longer waits its shard and blocks for all its known tokens."""
        shard, found = choice.portion.shard, choice.found
        shard.pool.share(found)
        sequence.shard = shard.index
        sequence.blocks = found + shard.pool.allocate(self.capacity.blocks_for(len(sequence.tokens)) - len(found))
        sequence.num_computed = sequence.num_planned = len(found) * self._config.block_tokens
        sequence.number = self._num_opened
        self._num_opened += 1
        shard.put_in(sequence)
        choice.portion.load_tokens += len(sequence.tokens)
        if sequence.num_cached_prompt is None:
            sequence.num_cached_prompt = min(sequence.num_computed, sequence.num_prompt)
            self._policy.opened(sequence)
        shard.cache.begin(sequence, len(found))

    def close(self, sequence: Sequence) -> None:
        """Take an open sequence from the ranks and its blocks from it."""
        assert sequence.number is not None
        shard = self.shards[sequence.shard]
        shard.cache.abandon(sequence)
        shard.take_out(sequence)
        self.closed.append(sequence.number)
        shard.pool.release(sequence.rewind())

    def preempt(self, sequence: Sequence) -> None:
        """Take its blocks away; it waits at its old rank, and what of it stays cached is found again."""
        self.num_preemptions += 1
        self.close(sequence)
        self.admission.put(sequence)

    def try_join_cohort(self, sequence: Sequence) -> None:
        """It has its first or next token. If that is all there is about it, it goes on with its shard's cohort."""
        sampling = sequence.request.sampling
        if sampling.grammar is None and sampling.logprobs is None and not sequence.isolation_tokens_left and not sequence.in_flight:
            end = min(sequence.num_prompt + sampling.max_tokens, self.capacity.max_context_tokens)
            self.shards[sequence.shard].join(sequence, end=end)
