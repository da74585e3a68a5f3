"""How much one shard may still put into the step that is being planned."""

from dataclasses import dataclass

from engine.sequence import Sequence
from engine.shard import Shard

MIN_MICRO_STEP_TOKENS = 128
"""With pipeline stages, prompts are cut into micro-steps so that every stage has work. Smaller micro-steps than this would take hardly
less time, because every step reads all weights."""


@dataclass
class ShardBudget:
    """What is left for one shard in the step that is being planned."""

    shard: Shard
    tokens: int
    """Tokens the shard may still compute in this step."""
    max_decodes: int
    """Decoding sequences (one token each) it may still take into this step."""
    load_tokens: int
    """Known tokens of its open sequences: roughly what a step costs there once all of them decode. 0 if there is only one shard."""
    max_draft_tokens: int = 0
    """Draft tokens it may still take into this step."""
    has_preempted: bool = False
    """Blocks ran out here: no new sequence is admitted to this shard in this step."""
    whole_prompt_tokens: int = 0
    """Tokens left in the step for prompts that cannot be cut. More than `tokens` where that was lowered for the sake of pipeline stages or
    of streams that decode."""

    def can_take(self, sequence: Sequence) -> bool:
        """Whether the step can hold part of the sequence, or all of it if it cannot be cut."""
        return self.tokens > 0 and (not sequence.is_unsplittable or len(sequence.tokens) <= self.whole_prompt_tokens)

    def take(self, num_tokens: int) -> None:
        self.tokens = max(self.tokens - num_tokens, 0)
        self.whole_prompt_tokens -= num_tokens


def num_decoding(shard: Shard) -> int:
    """Sequences whose next step computes one token, or whose step in flight computes their last known one."""
    return len(shard.cohort) + sum(sequence.num_pending <= 1 and not sequence.ended for sequence in shard.individual.values())


def make_shard_budget(
    shard: Shard, *, tokens: int, max_step_tokens: int, max_running: int, num_stages: int, num_shards: int, waiting_tokens: int
) -> ShardBudget:
    """With ``num_stages`` steps in flight at once, each gets about an equal part of what is to be computed.

    ``max_step_tokens`` and ``max_running`` are the hard limits of a step and a replica; ``tokens`` is what this step should hold, counting
    only prompts that can be cut; ``waiting_tokens`` are the tokens still to be admitted to this shard.
    """
    alive, in_cohort = [sequence for sequence in shard.individual.values() if not sequence.ended], len(shard.cohort)
    if num_stages > 1:
        uncomputed = in_cohort + sum(len(sequence.tokens) - sequence.num_computed for sequence in alive)
        tokens = min(tokens, max(MIN_MICRO_STEP_TOKENS, -(-(uncomputed + waiting_tokens) // num_stages)))
    load_tokens = shard.cohort.num_tokens + sum(len(sequence.tokens) for sequence in alive) if num_shards > 1 else 0
    decoding = in_cohort + sum(sequence.num_pending <= 1 for sequence in alive)
    return ShardBudget(
        shard,
        tokens=tokens,
        max_decodes=-(-decoding // num_stages),
        load_tokens=load_tokens,
        max_draft_tokens=max_running - in_cohort - len(alive),
        whole_prompt_tokens=max_step_tokens,
    )
