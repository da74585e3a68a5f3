"""A draft that arrived with a step's result is for the next step only."""

from engine.draft.draft_model import DraftModelProposer
from engine.request import Request
from engine.sequence import Sequence


def opened() -> Sequence:
    sequence = Sequence(Request(id="r", prompt=(1, 2)), arrival=0)
    sequence.number = 7
    return sequence


def test_at_most_max_tokens_are_proposed() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3, 4, 5))
    assert proposer.propose(sequence, 2) == (3, 4)
    assert proposer.propose(sequence, 8) == (3, 4, 5)


def test_a_draft_is_dropped_when_another_token_follows() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3, 4, 5))
    sequence.tokens.append(9)
    assert proposer.propose(sequence, 8) == ()


def test_a_draft_is_dropped_when_the_sequence_is_reopened() -> None:
    proposer, sequence = DraftModelProposer(), opened()
    proposer.store(sequence, (3,))
    sequence.number = 8
    assert proposer.propose(sequence, 8) == ()


def test_an_unknown_sequence_has_no_draft() -> None:
    assert DraftModelProposer().propose(opened(), 4) == ()
