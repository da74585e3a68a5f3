"""One choice has the prompt scored, the others wait for it; what they are told meanwhile does not pile up unread."""

import asyncio
from collections.abc import AsyncGenerator

from engine.plan import TokenEvent, TokenLogprobs
from serve.prompt_logprobs import SharedPromptLogprobs

SCORES = (TokenLogprobs(logprob=-1.5, top=()),)
LENGTH = 100


async def read(stream: AsyncGenerator[TokenEvent, None]) -> list[TokenEvent]:
    return [event async for event in stream]


async def test_a_choice_that_waits_for_anothers_scores_is_read_all_the_while() -> None:
    prompt_logprobs, was_read = SharedPromptLogprobs(scoring_choice=3), asyncio.Event()

    async def scoring_choice() -> AsyncGenerator[TokenEvent, None]:
        await was_read.wait()
        yield TokenEvent("r", 3, 0, 0, tokens=(7,), prompt_logprobs=SCORES)
        yield TokenEvent("r", 3, 0, 1, finish_reason="stop")

    async def other() -> AsyncGenerator[TokenEvent, None]:
        for offset in range(LENGTH):
            yield TokenEvent("r", 4, 0, offset, tokens=(offset,))
        was_read.set()
        yield TokenEvent("r", 4, 0, LENGTH, finish_reason="length")

    async with asyncio.timeout(30):
        told = await asyncio.gather(read(prompt_logprobs.attach_to(4, other())), read(prompt_logprobs.attach_to(3, scoring_choice())))
    for events, length in zip(told, (LENGTH + 1, 2), strict=True):
        assert [event.offset for event in events] == list(range(length))
        assert [event.prompt_logprobs for event in events] == [SCORES] + [()] * (length - 1)


async def test_a_choice_that_fails_meanwhile_says_so_at_once() -> None:
    async def failing() -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent("r", 4, 0, 0, tokens=(1,))
        yield TokenEvent("r", 4, 0, 1, finish_reason="error", error_kind="QueueFull")

    async with asyncio.timeout(30):
        (event,) = await read(SharedPromptLogprobs(scoring_choice=3).attach_to(4, failing()))
    assert event.finish_reason == "error"
