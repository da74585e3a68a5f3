"""What is asked and when: decided by the seed alone."""

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from serve.load.workloads import WORKLOADS, Conversation, Shape


def made(name: str, requests: int = 200, **more: float) -> list[Conversation]:
    return WORKLOADS[name].conversations(Shape(requests=requests, rate=5.0, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_asks_the_same_and_another_does_not(name: str) -> None:
    assert made(name, 20) == made(name, 20)
    assert made(name, 20) != made(name, 20, seed=1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_there_are_as_many_as_wanted_in_the_order_of_their_times(name: str) -> None:
    times = [conversation.at_s for conversation in made(name, 30)]
    assert len(times) == 30
    assert times == sorted(times)


def test_arrivals_come_at_the_rate_and_bursts_are_uneven() -> None:
    def gaps(name: str) -> list[float]:
        return [later.at_s - earlier.at_s for earlier, later in pairwise(made(name, 4000))]

    even, bursts = gaps("W3"), gaps("W7")
    assert fmean(even) == pytest.approx(0.2, rel=0.1)
    assert pstdev(even) / fmean(even) == pytest.approx(1.0, rel=0.1)
    assert pstdev(bursts) / fmean(bursts) > 3


def test_nine_of_ten_prefixes_came_before() -> None:
    starts = [conversation.turns[0].prompt[:200] for conversation in made("W5", 500)]
    known = sum(start in starts[:i] for i, start in enumerate(starts))
    assert 0.85 < known / len(starts) < 0.95


def test_one_client_in_five_goes_away() -> None:
    leaving = sum(conversation.turns[0].cancel_after_tokens is not None for conversation in made("W10", 1000))
    assert 150 < leaving < 250


def test_a_scale_shortens_prompts_and_answers() -> None:
    whole, tenth = made("W4", 5), made("W4", 5, scale=0.1)
    for long, short in zip(whole, tenth, strict=True):
        assert len(short.turns[0].prompt.split()) == pytest.approx(len(long.turns[0].prompt.split()) / 10, abs=1)
        assert short.turns[0].max_tokens == pytest.approx(long.turns[0].max_tokens / 10, abs=1)
