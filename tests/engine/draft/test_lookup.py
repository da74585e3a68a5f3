"""Prompt lookup: the last earlier occurrence of the suffix, and what followed it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.draft.lookup import PromptLookup
from engine.request import Request
from engine.sequence import Sequence


def sequence_of(*tokens: int) -> Sequence:
    return Sequence(Request(id="r", prompt=tokens), arrival=0)


def slow_twin(tokens: list[int], most: int, longest: int = 4, shortest: int = 2) -> tuple[int, ...]:
    for length in range(min(longest, len(tokens)), shortest - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                known = list(tokens)
                for at in range(start + length, start + length + most):
                    known.append(known[at])
                return tuple(known[len(tokens) :])
    return ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8))
def test_it_finds_what_a_plain_search_finds(tokens: list[int], most: int) -> None:
    assert PromptLookup().propose(sequence_of(*tokens), most) == slow_twin(tokens, most)


def test_it_is_updated_as_a_sequence_grows() -> None:
    lookup, sequence = PromptLookup(), sequence_of(7, 8, 9, 1)
    assert lookup.propose(sequence, 3) == ()
    sequence.tokens += [7, 8]
    assert lookup.propose(sequence, 3) == (9, 1, 7)


def test_a_match_across_token_boundaries_does_not_count() -> None:
    """256 is the bytes 0 1 0 0, and 65536 0 0 1 0: shifted by one they look alike."""
    assert PromptLookup(longest=1, shortest=1).propose(sequence_of(65536, 256), 1) == ()
    assert PromptLookup(longest=2, shortest=2).propose(sequence_of(1, 0, 0, 256, 0, 0, 256, 0), 1) == slow_twin(
        [1, 0, 0, 256, 0, 0, 256, 0], 1
    )


def test_a_sequence_that_is_gone_is_forgotten() -> None:
    lookup = PromptLookup()
    lookup.propose(sequence_of(1, 2, 3), 2)
    assert len(lookup._bytes) == 0


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (3, 0)])
def test_invalid_suffix_lengths_are_refused(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="cannot be looked for"):
        PromptLookup(longest=longest, shortest=shortest)
