"""Guesses that came with an answer are for the next step, and for no other."""

from engine.draft.draft_model import DraftModelProposer
from engine.request import Request
from engine.sequence import Sequence


def opened() -> Sequence:
    sequence = Sequence(Request(id="r", prompt=(1, 2)), arrival=0)
    sequence.number = 7
    return sequence


def test_as_many_are_proposed_as_there_is_room_for() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3, 4, 5))
    assert proposer.propose(sequence, 2) == (3, 4)
    assert proposer.propose(sequence, 8) == (3, 4, 5)


def test_behind_another_token_they_are_worth_nothing() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3, 4, 5))
    sequence.tokens.append(9)
    assert proposer.propose(sequence, 8) == ()


def test_in_new_blocks_they_are_worth_nothing() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3,))
    sequence.number = 8
    assert proposer.propose(sequence, 8) == ()


def test_of_a_sequence_that_nothing_was_told_of_there_are_none() -> None:
    assert DraftModelProposer().propose(opened(), 4) == ()
