"""Observers see each request once from its beginning to exactly one end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import pytest

from serve.errors import ServerStopped
from serve.request import ChatRequest, Message, TextEvent, Usage
from serve.request_observer import observe_events

REQUEST = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content="hi"),))
LAST = TextEvent(choice=0, finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


class Recorder:
    def __init__(self, refuses: Exception | None = None) -> None:
        self.seen: list[object] = []
        self._refuses = refuses

    def begin(self, request: ChatRequest) -> "Recorder":
        if self._refuses:
            raise self._refuses
        self.seen.append("begin")
        return self

    def event(self, event: TextEvent) -> None:
        self.seen.append("event")

    def ended(self) -> None:
        self.seen.append("ended")

    def failed(self, error: BaseException) -> None:
        self.seen.append(type(error))


async def events(*script: TextEvent | Exception) -> AsyncGenerator[TextEvent, None]:
    for item in script:
        if isinstance(item, Exception):
            raise item
        yield item


async def test_a_whole_answer() -> None:
    recorder = Recorder()
    assert [event async for event in observe_events(REQUEST, events(TextEvent(choice=0), LAST), [recorder])] == [TextEvent(choice=0), LAST]
    assert recorder.seen == ["begin", "event", "event", "ended"]


async def test_a_failure() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError):
        [event async for event in observe_events(REQUEST, events(TextEvent(choice=0), ValueError()), [recorder])]
    assert recorder.seen == ["begin", "event", ValueError]


async def test_a_reader_that_leaves_in_the_midst() -> None:
    recorder = Recorder()
    async with aclosing(observe_events(REQUEST, events(TextEvent(choice=0), LAST), [recorder])) as stream:
        await anext(stream)
    assert recorder.seen == ["begin", "event", GeneratorExit]


@pytest.mark.parametrize(
    ("script", "seen"), [((TextEvent(choice=0), LAST), ServerStopped), ((LAST,), "ended"), ((ValueError(),), ValueError)]
)
async def test_a_request_that_the_server_has_ended_is_told_from_one_whose_reader_left(script: tuple, seen: object) -> None:
    recorder = Recorder()
    async with aclosing(observe_events(REQUEST, events(*script), [recorder], requests_are_ended=lambda: True)) as stream:
        with suppress(ValueError):
            await anext(stream)
    assert recorder.seen[-1] == seen


async def test_a_reader_that_leaves_after_the_last_event_has_had_it_all() -> None:
    recorder = Recorder()
    async with aclosing(observe_events(REQUEST, events(LAST), [recorder])) as stream:
        await anext(stream)
    assert recorder.seen == ["begin", "event", "ended"]


async def test_one_that_is_cancelled_while_it_waits() -> None:
    async def never() -> AsyncGenerator[TextEvent, None]:
        await asyncio.Event().wait()
        yield LAST

    recorder = Recorder()
    task = asyncio.ensure_future(anext(observe_events(REQUEST, never(), [recorder])))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorder.seen == ["begin", asyncio.CancelledError]


async def test_an_observer_that_refuses_lets_nothing_be_computed() -> None:
    before, after, source = Recorder(), Recorder(), events(LAST)
    with pytest.raises(KeyError):
        await anext(observe_events(REQUEST, source, [before, Recorder(KeyError()), after]))
    assert before.seen == ["begin", KeyError]
    assert after.seen == []
