"""The checker itself: what must not pass does not pass."""

from collections.abc import Callable

import pytest

from tests.history import Golden, GoldenChoice, History, violations

GOLDEN = Golden((GoldenChoice((1, 2, 3), "abc", "length", (-0.5, -0.5, -0.5)),), prompt_tokens=4)


def whole(history: History) -> None:
    history.token(0, 0, [1, 2], [-0.5, -0.5], "ab")
    history.token(0, 2, [3], [-0.5], "c")
    history.finish(0, "length")
    history.usage(3, 4)
    history.complete()


def checked(*doings: Callable[[History], None], **options: object) -> list[str]:
    history = History("r")
    for do in doings:
        do(history)
    return violations(history, GOLDEN, **options)  # type: ignore[arg-type]


def test_a_whole_answer_passes() -> None:
    assert checked(whole) == []


@pytest.mark.parametrize(
    ("doings", "says"),
    [
        ([], "0 ends"),
        ([whole, lambda h: h.complete()], "2 ends"),
        ([whole, lambda h: h.token(0, 3, [9])], "after the end"),
        ([lambda h: h.token(0, 0, [1]), lambda h: h.token(0, 0, [1])], "a gap or a repeat"),
        ([lambda h: h.token(0, 1, [2])], "a gap or a repeat"),
        ([lambda h: h.token(0, 0, [1, 7])], "token 1 differs"),
        ([lambda h: h.token(0, 0, [1], [-0.6])], "log-probability 0 differs"),
        ([lambda h: h.token(0, 0, [1], text="x")], "text 'x' differs"),
        ([lambda h: h.token(0, 0, [1], text="a"), lambda h: h.finish(0, "length"), lambda h: h.complete()], "ended with 1 tokens of 3"),
        ([lambda h: h.complete()], "complete with choices []"),
        ([lambda h: h.token(0, 0, [1]), lambda h: h.usage(2), lambda h: h.complete()], "usage counts 2 tokens"),
        ([lambda h: h.failed("ReplicaLost")], "nothing explains"),
        ([lambda h: h.broken("cut")], "broken"),
        ([lambda h: h.token(1, 0, [1])], "was not asked for"),
    ],
)
def test_whatever_breaks_a_promise_is_named(doings: list[Callable[[History], None]], says: str) -> None:
    assert any(says in one for one in checked(*doings)), checked(*doings)


def test_an_error_that_is_expected_and_a_client_that_left_pass() -> None:
    assert checked(lambda h: h.token(0, 0, [1], text="a"), lambda h: h.failed("ReplicaLost"), may_fail={"ReplicaLost"}) == []
    assert checked(lambda h: h.token(0, 0, [1, 2], text="ab"), lambda h: h.left()) == []
