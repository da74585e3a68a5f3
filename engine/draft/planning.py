"""Speculative decoding as the planner sees it: how many draft tokens a step takes, and the KV blocks for them.

Draft tokens only use room that no other sequence needs.
"""

from engine.draft.speculator import Speculator
from engine.executor import Capacity
from engine.sequence import Sequence
from engine.shard_budget import ShardBudget


def plan_draft(sequence: Sequence, budget: ShardBudget, capacity: Capacity, speculator: Speculator) -> tuple[int, ...]:
    """Draft tokens to verify behind the sequence's last known token, which the step computes. Allocates the blocks for them.

    Never for a sequence with a grammar: the state of a grammar cannot look ahead over a draft.
    """
    if sequence.request.sampling.grammar is not None or sequence.request.pooling is not None:
        return ()
    room = _draft_room(sequence, budget, capacity)
    draft = speculator.draft(sequence, room=room, num_sequences=len(budget.shard.open)) if room > 0 else ()
    _allocate(len(sequence.tokens) + len(draft), sequence, budget, capacity)
    budget.max_draft_tokens -= len(draft)
    return draft


def plan_next_draft(sequence: Sequence, num_draft: int, budget: ShardBudget, capacity: Capacity, speculator: Speculator) -> int:
    """How many tokens the ranks' draft model should propose for the next step, after what this step yields for the sequence.

    Allocates the blocks for them, because the draft model keeps its KV in the same blocks as the model. ``num_draft`` is the length of the
    draft in this step.
    """
    if not speculator.uses_draft_model or sequence.request.sampling.grammar is not None or sequence.request.pooling is not None:
        return 0
    room = _next_draft_room(sequence, num_draft, budget, capacity)
    count = speculator.draft_length(sequence, room=room, num_sequences=len(budget.shard.open))
    if count:
        _allocate(len(sequence.tokens) + num_draft + count, sequence, budget, capacity)
    return count


def _allocate(num_tokens: int, sequence: Sequence, budget: ShardBudget, capacity: Capacity) -> None:
    missing = capacity.blocks_for(num_tokens) - len(sequence.blocks)
    if missing > 0:
        sequence.blocks += budget.shard.pool.allocate(missing)


def _draft_room(sequence: Sequence, budget: ShardBudget, capacity: Capacity) -> int:
    """The longest draft behind the last known token.

    Bounded by the length of the answer and of the context, by what the step can still compute once every decoding sequence has its token,
    by the rows of logits that memory was reserved for, and by the blocks left over if every open sequence gets one more.
    """
    return min(
        sequence.request.sampling.max_tokens - sequence.num_output - 1,
        capacity.max_context_tokens - len(sequence.tokens) - 1,
        budget.tokens - 1 - budget.max_decodes,
        budget.max_draft_tokens,
        _room_in_blocks(sequence, budget, capacity),
    )


def _next_draft_room(sequence: Sequence, num_draft: int, budget: ShardBudget, capacity: Capacity) -> int:
    """The longest draft of the next step, as far as it is known now: at least one token comes before it."""
    return min(
        sequence.request.sampling.max_tokens - sequence.num_output - 2,
        capacity.max_context_tokens - len(sequence.tokens) - num_draft - 2,
        _room_in_blocks(sequence, budget, capacity) - num_draft,
    )


def _room_in_blocks(sequence: Sequence, budget: ShardBudget, capacity: Capacity) -> int:
    """Tokens behind the known ones that fit into the sequence's blocks and into those left over if every open sequence gets one more."""
    pool = budget.shard.pool
    in_own_blocks = len(sequence.blocks) * capacity.block_tokens - len(sequence.tokens)
    spare = max(pool.num_available - len(budget.shard.open), 0) * capacity.block_tokens
    return in_own_blocks + spare
