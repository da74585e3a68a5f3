"""One key, one answer: requests that come again read along, get what is kept, or take over."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from serve.caller import ANONYMOUS
from serve.errors import InvalidRequest, TakenOver
from serve.idempotency import MIN_ANSWERS_KEPT, VECTOR_BYTES_PER_TOKEN, IdempotentService, parse_idempotency_key
from serve.limits import Limits
from serve.request import ChatRequest, EmbeddingRequest, EmbeddingResult, Message, SoFar, TextEvent, TextToken, Usage

WORDS = ("The", " sky", " is", " blue")
VECTORS = (b"0123" * VECTOR_BYTES_PER_TOKEN,) * 2


class Counted:
    """What is behind: answers in four words, and counts how often it is asked."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.asked: list[ChatRequest] = []
        self.num_open = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.fails = 0
        self.embedded: list[EmbeddingRequest] = []

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        self.embedded.append(request)
        self.num_open += 1
        try:
            await self.may_go_on.wait()
            return EmbeddingResult(request_id=request.request_id, vectors=VECTORS, usage=Usage(prompt_tokens=3, completion_tokens=0))
        finally:
            self.num_open -= 1

    async def chat(self, request: ChatRequest) -> AsyncGenerator[TextEvent, None]:
        self.asked.append(request)
        self.num_open += 1
        had = sum(len(one.tokens) for one in request.so_far)
        try:
            for place, word in list(enumerate(WORDS))[had:]:
                if place == 2:
                    await self.may_go_on.wait()
                    if self.fails:
                        self.fails -= 1
                        raise RuntimeError("lost")
                yield TextEvent(choice=0, text=word, tokens=(TextToken(id=place, text=word, raw=word.encode()),))
            yield TextEvent(choice=0, finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=4))
        finally:
            self.num_open -= 1


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def asked(key: str = "k", content: str = "Why?", **fields) -> ChatRequest:
    request = ChatRequest(request_id="r1", model="m", messages=(Message(role="user", content=content),), idempotency_key=key)
    return dataclasses.replace(request, **fields)


async def text_of(stream: AsyncGenerator[TextEvent, None]) -> str:
    async with aclosing(stream) as events:
        return "".join([event.text async for event in events])


ALL = "".join(WORDS)


async def test_ten_calls_of_one_key_are_one_computation_and_ten_answers() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    calls = [asyncio.create_task(text_of(offers.chat(asked(request_id=f"r{number}")))) for number in range(10)]
    await asyncio.sleep(0.01)
    inner.may_go_on.set()
    assert await asyncio.gather(*calls) == [ALL] * 10
    assert len(inner.asked) == 1


async def test_an_answer_that_was_lost_on_its_way_is_given_again() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    first = await offers.collect(asked())
    again = await offers.collect(asked(request_id="r2", arrived_s=5.0, deadline_s=9e9))
    assert (again.choices, again.usage, again.request_id) == (first.choices, first.usage, "r2")
    assert (await text_of(offers.chat(asked())), len(inner.asked)) == (ALL, 1)


async def test_requests_without_a_key_are_computed_each() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    assert [await text_of(offers.chat(asked(key=""))) for _ in range(2)] == [ALL, ALL]
    assert (len(inner.asked), offers.num_kept) == (2, 0)


async def test_a_key_is_its_callers_own() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    for caller in ("a", "b"):
        await offers.collect(asked(caller=dataclasses.replace(ANONYMOUS, id=caller)))
    assert len(inner.asked) == 2


@pytest.mark.parametrize("other", [{"content": "How?"}, {"priority": 1}])
async def test_a_key_that_was_used_for_another_request_is_refused(other: dict) -> None:
    offers = IdempotentService(Counted())
    await offers.collect(asked())
    with pytest.raises(InvalidRequest) as caught:
        await offers.collect(asked(**other))
    assert caught.value.param == "idempotency-key"


async def test_a_reader_that_leaves_leaves_the_others_theirs_and_the_last_ends_the_work() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    first, second = (asyncio.create_task(text_of(offers.chat(asked()))) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.wait([first])
    assert inner.num_open == 1
    second.cancel()
    await asyncio.wait([second])
    assert (inner.num_open, offers.num_kept) == (0, 0)
    inner.may_go_on.set()
    assert await text_of(offers.chat(asked())) == ALL
    assert len(inner.asked) == 2


async def test_the_first_event_is_not_waited_for_by_whoever_comes_later() -> None:
    """Who comes in the midst gets at once what there is."""
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    first = asyncio.create_task(text_of(offers.chat(asked())))
    await asyncio.sleep(0.01)
    async with aclosing(offers.chat(asked())) as late:
        assert [(await anext(late)).text for _ in range(2)] == ["The", " sky"]
        inner.may_go_on.set()
        assert [event.text async for event in late] == [" is", " blue", ""]
    assert await first == ALL


async def test_a_failure_is_told_to_all_and_not_kept() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.fails = 1
    both = await asyncio.gather(*(text_of(offers.chat(asked())) for _ in range(2)), return_exceptions=True)
    assert [str(error) for error in both] == ["lost", "lost"]
    assert (await text_of(offers.chat(asked())), len(inner.asked)) == (ALL, 2)


async def test_whoever_asks_for_the_rest_takes_over_and_who_waited_for_it_is_told() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    first = asyncio.create_task(text_of(offers.chat(asked())))
    await asyncio.sleep(0.01)
    rest = asked(so_far=(SoFar(choice=0, tokens=(0, 1)),))
    second, third = (asyncio.create_task(text_of(offers.chat(rest))) for _ in range(2))
    with pytest.raises(TakenOver):
        await first
    inner.may_go_on.set()
    assert await asyncio.gather(second, third) == [" is blue", " is blue"]
    assert (len(inner.asked), inner.num_open) == (2, 0)


async def test_answers_are_kept_for_their_time_and_no_longer() -> None:
    inner, clock = Counted(Limits(remembered_s=60.0)), Clock()
    offers = IdempotentService(inner, clock=clock)
    await offers.collect(asked())
    clock.now_s = 60.0
    await offers.collect(asked())
    assert len(inner.asked) == 1
    clock.now_s = 60.1
    await offers.collect(asked())
    assert (len(inner.asked), offers.num_kept) == (2, 1)


async def test_only_so_many_tokens_are_kept_the_oldest_make_room() -> None:
    inner = Counted(Limits(remembered_tokens=4 * MIN_ANSWERS_KEPT))
    offers = IdempotentService(inner)
    for number in range(MIN_ANSWERS_KEPT + 1):
        await offers.collect(asked(key=f"k{number}"))
    assert offers.num_kept == MIN_ANSWERS_KEPT
    await offers.collect(asked(key=f"k{MIN_ANSWERS_KEPT}"))
    assert len(inner.asked) == MIN_ANSWERS_KEPT + 1
    await offers.collect(asked(key="k0"))
    assert len(inner.asked) == MIN_ANSWERS_KEPT + 2
    for number in range(MIN_ANSWERS_KEPT, 3 * MIN_ANSWERS_KEPT):
        await offers.collect(asked(key=f"k{number}"))
    assert offers.num_kept == MIN_ANSWERS_KEPT


async def test_an_answer_too_long_to_keep_is_read_to_its_end_and_then_forgotten() -> None:
    inner = Counted(Limits(remembered_tokens=3 * MIN_ANSWERS_KEPT))
    offers = IdempotentService(inner)
    assert await text_of(offers.chat(asked())) == ALL
    assert await text_of(offers.chat(asked())) == ALL
    assert (len(inner.asked), offers.num_kept, inner.num_open) == (2, 0, 0)


def embedding(key: str = "k", text: str = "sea", **fields) -> EmbeddingRequest:
    return EmbeddingRequest(request_id="e1", model="m", inputs=(text,), idempotency_key=key, **fields)


async def test_vectors_are_computed_once_for_all_who_ask_under_one_key() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    calls = [asyncio.create_task(offers.embed(dataclasses.replace(embedding(), request_id=f"e{number}"))) for number in range(5)]
    await asyncio.sleep(0.01)
    calls[0].cancel()  # others are left
    inner.may_go_on.set()
    answers = await asyncio.gather(*calls[1:])
    assert [(one.request_id, one.vectors) for one in answers] == [(f"e{number}", VECTORS) for number in range(1, 5)]
    assert (await offers.embed(embedding())).vectors == VECTORS
    assert (len(inner.embedded), offers.num_kept) == (1, 1)
    for other in (embedding(text="sky"), embedding(dimensions=2)):
        with pytest.raises(InvalidRequest, match="another request"):
            await offers.embed(other)
    with pytest.raises(InvalidRequest, match="another request"):
        await offers.collect(asked())
    assert [await offers.embed(embedding(key="")) for _ in range(2)]
    assert len(inner.embedded) == 3


async def test_vectors_that_nobody_waits_for_are_not_computed_on_and_not_kept() -> None:
    inner = Counted()
    offers = IdempotentService(inner)
    inner.may_go_on.clear()
    call = asyncio.create_task(offers.embed(embedding()))
    await asyncio.sleep(0.01)
    assert inner.num_open == 1
    call.cancel()
    await asyncio.wait([call])
    assert (inner.num_open, offers.num_kept) == (0, 0)


async def test_vectors_count_by_their_bytes() -> None:
    size = 2 * 4
    for most, kept in ((size, 1), (size - 1, 0)):
        inner = Counted(Limits(remembered_tokens=most * MIN_ANSWERS_KEPT))
        offers = IdempotentService(inner)
        assert (await offers.embed(embedding())).vectors == VECTORS
        assert offers.num_kept == kept


@pytest.mark.parametrize("said", ["", "a b", "x" * 129, "ключ"])
def test_a_key_is_an_identifier(said: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_idempotency_key(said, Limits())
    assert parse_idempotency_key("x" * 128, Limits()) == "x" * 128
    assert parse_idempotency_key(None, Limits()) == ""
