"""Place 3 of a request, its end: the request to the engine, and how its events are awaited."""

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
"""The engine ends a request at its deadline. If it does not, the service does so this much later."""


class TokenSource(Protocol):
    """Answers engine requests with tokens: the router over a model's replicas, or a scripted fake."""

    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The choice's events in order of offset, none twice; the last one has a ``finish_reason``. ``aclose`` cancels the choice.

        A failure is either raised (an `EngineError`) or an event with ``finish_reason="error"``.
        """
        ...

    def ready(self) -> bool:
        """Whether a request sent now would be computed."""
        ...


def engine_request(
    request: AnyRequest, choice: int, prompt: tuple[int, ...], sampling: SamplingParams, *, committed: tuple[int, ...] = ()
) -> Request:
    """The engine's request for one choice. ``committed``: output tokens that the client already has."""
    return Request(
        id=request.request_id,
        choice=choice,
        prompt=prompt,
        committed=committed,
        sampling=sampling,
        salt=request.caller.salt,
        session=request.session,
        tenant=request.caller.id,
        share=request.caller.share,
        priority=request.priority,
        deadline_s=request.deadline_s,
    )


def check_deadline(deadline_s: float | None, clock: Callable[[], float]) -> None:
    """Raise if the deadline has passed.

    Raises:
        DeadlineExceeded: the deadline, in Unix time, has passed.
    """
    if deadline_s is not None and deadline_s <= clock():
        raise DeadlineExceeded("the deadline had passed when the request came")


async def next_event(stream: AsyncGenerator[TokenEvent, None], deadline_s: float | None, clock: Callable[[], float]) -> TokenEvent | None:
    """The next event; None at the end of the stream.

    Raises:
        DeadlineExceeded: none came until `DEADLINE_GRACE_S` after the deadline, in Unix time.
    """
    if deadline_s is None:
        return await anext(stream, None)
    try:
        async with asyncio.timeout(deadline_s + DEADLINE_GRACE_S - clock()):
            return await anext(stream, None)
    except TimeoutError as error:
        raise DeadlineExceeded("the deadline passed while the answer was computed") from error


def check_could_fit(texts: Iterable[str], tokenizer: Tokenizer, model: ModelFacts, *, param: str) -> None:
    """Refuses texts that are too long for the context whatever their tokens are: tokenizing megabytes takes seconds.

    Raises:
        ContextLengthExceeded
    """
    least, limit = sum(map(tokenizer.least_tokens, texts)), model.max_context_tokens
    if least > limit:
        raise ContextLengthExceeded(prompt_tokens=least, max_tokens=1, limit_tokens=limit, param=param)
