"""Step 13 of a request: the log-probabilities of a prompt come with one of its choices and are told by all."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from engine.plan import TokenEvent, TokenLogprobs
from serve.choice import Choice

FAILED = ("error", "cancelled")


@dataclass(eq=False)
class PromptScores:
    """Those of one prompt."""

    scorer: int
    """The choice that asks the engine for them. The others find the prompt in the prefix cache, which one that asks must not use."""
    _logprobs: tuple[TokenLogprobs, ...] = ()
    _known: asyncio.Event = field(default_factory=asyncio.Event)

    async def told_by(self, choice: int, stream: AsyncGenerator[TokenEvent, None]) -> AsyncGenerator[TokenEvent, None]:
        """A choice's events, the first of them with the scores: the scorer's brings them, the others' wait for that. They are read all the
        while, as a choice whose tokens nobody takes is one whose client does not read."""
        if choice == self.scorer:
            async for event in stream:
                if event.offset == 0 and event.finish_reason not in FAILED:
                    self._logprobs = event.prompt_logprobs
                    self._known.set()
                yield event
            return
        waiting: list[TokenEvent] = []
        async for event in stream:
            waiting.append(event)
            if event.finish_reason in FAILED:
                waiting = [event]
            elif event.finish_reason is not None:
                await self._known.wait()
            elif not self._known.is_set():
                continue
            for each in waiting:
                yield replace(each, prompt_logprobs=self._logprobs) if each.offset == 0 else each
            waiting = []


def scores_of(choices: Sequence[Choice]) -> dict[int, PromptScores]:
    """By number of the prompt, where choices that run are to tell of it: the first of them asks."""
    scores: dict[int, PromptScores] = {}
    for choice in choices:
        if choice.plan.prompt:
            scores.setdefault(choice.plan.prompt_index, PromptScores(choice.plan.index))
    return scores
