"""Step 3 of a request, its end: what is put to the engine, and how its events are waited for."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Protocol

from engine.errors import DeadlineExceeded
from engine.plan import TokenEvent
from engine.request import Request, SamplingParams
from serve.errors import ContextLengthExceeded
from serve.model_facts import ModelFacts
from serve.request import AnyRequest
from serve.text.tokenizer import Tokenizer

DEADLINE_GRACE_S = 0.5
"""The engine ends a request at its deadline; the service does so this much later if the engine did not."""


class TokenSource(Protocol):
    """Answers engine requests with tokens: the router over replicas, or a scripted fake."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The choice's events in order of offset, none twice; the last one has a ``finish_reason``. ``aclose`` cancels the choice.

        A failure is either raised (an `EngineError`) or told by an event with ``finish_reason="error"``.
        """
        ...

    def ready(self) -> bool:
        """Whether a request sent now would be computed."""
        ...


def engine_request(
    asked: AnyRequest, choice: int, prompt: tuple[int, ...], sampling: SamplingParams, *, committed: tuple[int, ...] = ()
) -> Request:
    return Request(
        id=asked.request_id,
        choice=choice,
        prompt=prompt,
        committed=committed,
        sampling=sampling,
        salt=asked.caller.salt,
        session=asked.session,
        tenant=asked.caller.id,
        share=asked.caller.share,
        priority=asked.priority,
        deadline_s=asked.deadline_s,
    )


def must_be_in_time(deadline_s: float | None, clock: Callable[[], float]) -> None:
    """
    Raises:
        DeadlineExceeded: the deadline, in Unix time, has passed.
    """
    if deadline_s is not None and deadline_s <= clock():
        raise DeadlineExceeded("the deadline had passed when the request came")


async def next_event(stream: AsyncGenerator[TokenEvent, None], deadline_s: float | None, clock: Callable[[], float]) -> TokenEvent | None:
    """None at the end of the stream.

    Raises:
        DeadlineExceeded: it has not come when the deadline, in Unix time, is over for a while.
    """
    if deadline_s is None:
        return await anext(stream, None)
    try:
        async with asyncio.timeout(deadline_s + DEADLINE_GRACE_S - clock()):
            return await anext(stream, None)
    except TimeoutError as error:
        raise DeadlineExceeded("the deadline passed while the answer was computed") from error


def may_fit(texts: Iterable[str], tokenizer: Tokenizer, model: ModelFacts, *, param: str) -> None:
    """Megabytes that cannot fit are refused before they are tokenized, which takes seconds.

    Raises:
        ContextLengthExceeded
    """
    least, limit = sum(map(tokenizer.least_tokens, texts)), model.max_context_tokens
    if least > limit:
        raise ContextLengthExceeded(prompt_tokens=least, max_tokens=1, limit_tokens=limit, param=param)
