"""What a draft model still has to read of a work when that is done."""

from engine.draft.catch_up import tokens_to_catch_up
from engine.plan import Work


def work(*tokens: int, num_draft: int = 0, num_next_draft: int = 0) -> Work:
    return Work(0, 10, tokens, (), samples=True, num_draft=num_draft, num_next_draft=num_next_draft)


def test_of_a_prompt_all_is_read() -> None:
    assert tokens_to_catch_up(work(1, 2, 3), (4,)) == (10, (1, 2, 3))


def test_what_was_said_is_read_where_it_is_asked_what_follows() -> None:
    assert tokens_to_catch_up(work(3, num_next_draft=2), (4,)) == (10, (3, 4))


def test_guesses_were_read_while_they_were_made_but_for_the_last() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (4, 5, 6)) == (12, (5, 6))
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2), (4, 5, 6)) == (12, (5,))


def test_behind_a_wrong_guess_only_what_was_said_instead_is_read() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (4, 9)) == (12, (9,))
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2, num_next_draft=1), (8,)) == (11, (8,))


def test_where_nothing_follows_a_wrong_guess_nothing_is_read() -> None:
    assert tokens_to_catch_up(work(3, 4, 5, num_draft=2), (8,)) == (11, ())


def test_a_fault_leaves_nothing_to_ask_about() -> None:
    assert tokens_to_catch_up(work(3, num_next_draft=4), ()) == (10, (3,))
    assert tokens_to_catch_up(work(3, 4, num_draft=1, num_next_draft=4), ()) == (11, ())
