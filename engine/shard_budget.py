"""A shard's part of a step in the making: how much it may still take."""

from dataclasses import dataclass

from engine.sequence import Sequence
from engine.shard import Shard

MICRO_STEP_TOKENS = 128
"""With pipeline stages prompts are cut so that every stage has a part; smaller parts than this would take hardly less time,
as every step reads all weights."""


@dataclass
class ShardBudget:
    """What is left for a shard in the step that is being planned."""

    shard: Shard
    budget: int
    """Tokens that it may still compute in this step."""
    max_decodes: int
    """Sequences with one token each that it may still take into this step."""
    load_tokens: int
    """Of its open sequences: about what a step costs there when all of them decode. 0 where there is no other shard."""
    max_drafted: int = 0
    """Guessed tokens that it may still take into this step."""
    has_preempted: bool = False
    uncut_budget: int = 0
    """What a step could hold beyond what is planned, for prompts that cannot be cut: `budget` is less where stages want equal parts, or
    streams go on beside them."""

    def may_take(self, sequence: Sequence) -> bool:
        """Whether some of it may be in this step, or all of it where it cannot be cut."""
        return self.budget > 0 and (not sequence.is_whole or len(sequence.tokens) <= self.uncut_budget)

    def take(self, num_tokens: int) -> None:
        self.budget = max(self.budget - num_tokens, 0)
        self.uncut_budget -= num_tokens


def num_decoding(shard: Shard) -> int:
    """Sequences whose next step computes one token, or whose last one does now."""
    return len(shard.cohort) + sum(sequence.num_pending <= 1 and not sequence.ended for sequence in shard.loose.values())


def shard_budget(
    shard: Shard, *, budget: int, max_tokens: int, max_running: int, num_stages: int, num_shards: int, waiting_tokens: int
) -> ShardBudget:
    """As many steps as there are stages shall have about equal parts of what is to do.

    ``max_tokens`` and ``max_running`` are what a step and a replica may hold at most, ``budget`` what the step should hold of prompts
    that can be cut, ``waiting_tokens`` what will come to this shard.
    """
    alive, together = [sequence for sequence in shard.loose.values() if not sequence.ended], len(shard.cohort)
    if num_stages > 1:
        unanswered = together + sum(len(sequence.tokens) - sequence.num_computed for sequence in alive)
        budget = min(budget, max(MICRO_STEP_TOKENS, -(-(unanswered + waiting_tokens) // num_stages)))
    load_tokens = shard.cohort.num_tokens + sum(len(sequence.tokens) for sequence in alive) if num_shards > 1 else 0
    decoding = together + sum(sequence.num_pending <= 1 for sequence in alive)
    return ShardBudget(
        shard,
        budget=budget,
        max_decodes=-(-decoding // num_stages),
        load_tokens=load_tokens,
        max_drafted=max_running - together - len(alive),
        uncut_budget=max_tokens,
    )
