"""Which tokens of a work the draft model must still compute when the work is done."""

from engine.draft.catch_up import tokens_to_catch_up
from engine.plan import Work


def work(*tokens: int, num_draft: int = 0, num_next_draft: int = 0) -> Work:
    return Work(0, 10, tokens, (), samples=True, num_draft=num_draft, num_next_draft=num_next_draft)


def test_the_whole_prompt_is_read() -> None:
    assert tokens_to_catch_up(work(1, 2, 3), (4,)) == (10, (1, 2, 3))


def test_the_sampled_token_is_read_if_a_next_draft_is_wanted() -> None:
    assert tokens_to_catch_up(work(3, num_next_draft=2), (4,)) == (10, (3, 4))


def test_of_an_accepted_draft_only_the_last_token_is_read() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (4, 5, 6)) == (12, (5, 6))
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2), (4, 5, 6)) == (12, (5,))


def test_after_a_rejected_draft_token_only_its_replacement_is_read() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (4, 9)) == (12, (9,))
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (8,)) == (11, (8,))


def test_after_a_rejected_draft_token_nothing_is_read_without_a_next_draft() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2), (8,)) == (11, ())


def test_after_a_fault_no_next_draft_is_read() -> None:
    assert tokens_to_catch_up(work(3, num_next_draft=4), ()) == (10, (3,))
    assert tokens_to_catch_up(work(3, 4, num_draft=1, num_next_draft=4), ()) == (11, ())
