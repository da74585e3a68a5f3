"""Where every sequence of the engine is: waiting, or open on a shard under a number that the ranks know."""

from engine.admission import Candidate, WaitingQueue
from engine.config import EngineConfig
from engine.executor import Capacity
from engine.kv.block_pool import BlockListener
from engine.policy import Policy
from engine.sequence import Sequence
from engine.shard import Shard


class SequenceTable:
    """Opens, closes and preempts sequences, and counts that."""

    def __init__(self, config: EngineConfig, capacity: Capacity, policy: Policy, listener: BlockListener | None) -> None:
        self._config, self._policy, self._listener = config, policy, listener
        self.waiting = WaitingQueue(policy)
        self.closed: list[int] = []
        """Numbers that the ranks must still be told to forget."""
        self.num_preemptions = 0
        self._num_opened = 0
        self._counted_before = (0, 0)
        """Prefix tokens queried and hit in the caches of earlier workers."""
        self.shards: tuple[Shard, ...] = ()
        self.set_capacity(capacity)

    def set_capacity(self, capacity: Capacity) -> None:
        """Start over with empty shards, as new workers have them."""
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
        """Known tokens that no step has been planned for, not counting those of sequences that decode."""
        started = sum(s.num_pending for shard in self.shards for s in shard.individual.values() if s.num_pending > 1)
        return self.waiting.num_tokens + started

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens looked up in the prefix caches at admission."""
        return self._counted_before[0] + sum(shard.cache.num_queried for shard in self.shards)

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of `prefix_queried_tokens` were found."""
        return self._counted_before[1] + sum(shard.cache.num_hits for shard in self.shards)

    def all_open(self) -> list[Sequence]:
        return [sequence for shard in self.shards for sequence in shard.open.values()]

    def open(self, sequence: Sequence, candidate: Candidate) -> None:
        """Give a sequence, which was removed from the waiting queue, its shard and blocks for all its known tokens."""
        shard, cached = candidate.budget.shard, candidate.cached_blocks
        shard.pool.share(cached)
        sequence.shard = shard.index
        sequence.blocks = cached + shard.pool.allocate(self.capacity.blocks_for(len(sequence.tokens)) - len(cached))
        sequence.num_computed = sequence.num_planned = len(cached) * self._config.block_tokens
        sequence.number = self._num_opened
        self._num_opened += 1
        shard.add(sequence)
        candidate.budget.load_tokens += len(sequence.tokens)
        if sequence.num_cached_prompt is None:
            sequence.num_cached_prompt = min(sequence.num_computed, sequence.num_prompt)
            self._policy.on_admission(sequence)
        shard.cache.begin(sequence, len(cached))

    def close(self, sequence: Sequence) -> None:
        """Release the blocks of an open sequence and have the ranks forget it."""
        assert sequence.number is not None
        shard = self.shards[sequence.shard]
        shard.cache.abandon(sequence)
        shard.remove(sequence)
        self.closed.append(sequence.number)
        shard.pool.release(sequence.rewind())

    def preempt(self, sequence: Sequence) -> None:
        """Close a sequence and put it back into the waiting queue. Those of its blocks that stay cached are found again."""
        self.num_preemptions += 1
        self.close(sequence)
        self.waiting.add(sequence)

    def try_join_cohort(self, sequence: Sequence) -> None:
        """Move a sequence that has just got a token into its shard's cohort, if nothing about it needs individual handling."""
        sampling = sequence.request.sampling
        if sampling.grammar is None and sampling.logprobs is None and not sequence.isolation_tokens_left and not sequence.in_flight:
            end = min(sequence.num_prompt + sampling.max_tokens, self.capacity.max_context_tokens)
            self.shards[sequence.shard].join_cohort(sequence, end=end)
