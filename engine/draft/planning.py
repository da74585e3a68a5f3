"""Guessed tokens as the scheduler sees them: how many, and the blocks for them."""

from engine.draft.room import room_for_draft, room_for_guesses
from engine.draft.speculator import Speculator
from engine.executor import Capacity
from engine.sequence import Sequence
from engine.shard_budget import ShardBudget


def plan_draft(sequence: Sequence, portion: ShardBudget, capacity: Capacity, speculator: Speculator) -> tuple[int, ...]:
    """Guesses behind its last known token, and blocks for them. (A grammar's state knows no guesses yet.)"""
    if sequence.request.sampling.grammar is not None or sequence.request.pooling is not None:
        return ()
    room = room_for_draft(sequence, portion, capacity)
    draft = speculator.draft(sequence, room=room, num_sequences=len(portion.shard.open)) if room > 0 else ()
    missing = capacity.blocks_for(len(sequence.tokens) + len(draft)) - len(sequence.blocks)
    if missing > 0:
        sequence.blocks += portion.shard.pool.allocate(missing)
    portion.max_drafted -= len(draft)
    return draft


def plan_next_draft(sequence: Sequence, num_draft: int, portion: ShardBudget, capacity: Capacity, speculator: Speculator) -> int:
    """How many guesses the ranks' draft model is asked for, behind what the sequence's last known token and its draft give, and blocks
    for them: its keys and values lie in the same."""
    if not speculator.asks_ranks or sequence.request.sampling.grammar is not None or sequence.request.pooling is not None:
        return 0
    room = room_for_guesses(sequence, num_draft, portion, capacity)
    count = speculator.length(sequence, room=room, num_sequences=len(portion.shard.open))
    missing = capacity.blocks_for(len(sequence.tokens) + num_draft + count) - len(sequence.blocks) if count else 0
    if missing > 0:
        sequence.blocks += portion.shard.pool.allocate(missing)
    return count
