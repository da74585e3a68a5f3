"""A source of tokens that plays what a test tells it, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from engine.plan import FinishReason, TokenEvent, TokenLogprobs
from engine.request import Request

Script = Callable[[Request], Sequence[TokenEvent | Exception | float]]
"""What one choice gets: events, an exception to raise, or seconds to wait."""


@dataclass(eq=False)
class ScriptedSource:
    script: Script
    requests: list[Request] = field(default_factory=list)
    open: set[tuple[str, int]] = field(default_factory=set)
    cancelled: list[int] = field(default_factory=list)
    """Choices whose stream was closed before its last event had been read."""
    is_ready: bool = True

    def ready(self) -> bool:
        return self.is_ready

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        self.open.add(request.key)
        complete = False
        try:
            for item in self.script(request):
                if isinstance(item, Exception):
                    complete = True
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                    continue
                complete = item.finish_reason is not None
                await asyncio.sleep(0)
                yield item
            complete = True
        finally:
            self.open.remove(request.key)
            if not complete:
                self.cancelled.append(request.choice)


def events_of(
    request: Request,
    groups: Sequence[Sequence[int]],
    *,
    finish: FinishReason | None = "length",
    stop_token: int | None = None,
    num_cached: int = 0,
    logprobs: bool = False,
) -> list[TokenEvent]:
    """The events of one choice whose tokens arrive in these groups; the last one ends it."""
    events, offset = [], 0
    for index, group in enumerate(groups):
        last = index == len(groups) - 1
        events.append(
            TokenEvent(
                request_id=request.id,
                choice=request.choice,
                attempt=0,
                offset=offset,
                tokens=tuple(group),
                logprobs=tuple(TokenLogprobs(logprob=-0.5, top=((token, -0.5), (0, -2.0))) for token in group) if logprobs else (),
                num_cached=num_cached,
                finish_reason=finish if last else None,
                stop_token=stop_token if last else None,
            )
        )
        offset += len(group)
    return events
