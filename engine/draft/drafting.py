"""Guessed tokens as the scheduler sees them: how many, and the blocks for them."""

from engine.draft.room import room_for_draft
from engine.draft.speculator import Speculator
from engine.executor import Capacity
from engine.portion import Portion
from engine.sequence import Sequence


def draft_for(sequence: Sequence, portion: Portion, capacity: Capacity, speculator: Speculator) -> tuple[int, ...]:
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
