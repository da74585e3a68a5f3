"""How many guessed tokens there is room for without taking any from somebody."""

from engine.executor import Capacity
from engine.sequence import Sequence
from engine.shard_budget import ShardBudget


def room_for_draft(sequence: Sequence, portion: ShardBudget, capacity: Capacity) -> int:
    """Behind the sequence's last known token, which is about to be computed alone.

    Within the answer's and the context's length, what the step may still compute when every decoding sequence has had its token, the
    rows of logits that memory was set aside for, and blocks that leave one to each open sequence.
    """
    return min(
        sequence.request.sampling.max_tokens - sequence.num_output - 1,
        capacity.max_context_tokens - len(sequence.tokens) - 1,
        portion.budget - 1 - portion.max_decodes,
        portion.max_drafted,
        _room_in_blocks(sequence, portion, capacity),
    )


def room_for_guesses(sequence: Sequence, num_draft: int, portion: ShardBudget, capacity: Capacity) -> int:
    """Behind the token that comes next at least: what a draft of the next step could hold, as far as that is known now."""
    return min(
        sequence.request.sampling.max_tokens - sequence.num_output - 2,
        capacity.max_context_tokens - len(sequence.tokens) - num_draft - 2,
        _room_in_blocks(sequence, portion, capacity) - num_draft,
    )


def _room_in_blocks(sequence: Sequence, portion: ShardBudget, capacity: Capacity) -> int:
    """Behind its known tokens, in blocks that it has and in those beyond one for each open sequence."""
    pool = portion.shard.pool
    held = len(sequence.blocks) * capacity.block_tokens - len(sequence.tokens)
    spare = max(pool.num_available - len(portion.shard.open), 0) * capacity.block_tokens
    return held + spare
