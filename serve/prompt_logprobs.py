"""Place 13 of a request: one choice computes the log-probabilities of a prompt, and all choices of that prompt report them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from engine.plan import TokenEvent, TokenLogprobs
from serve.choice import Choice

FAILED = ("error", "cancelled")


@dataclass(eq=False)
class SharedPromptLogprobs:
    """The log-probabilities of one prompt, once they are known."""

    scoring_choice: int
    """The choice that asks the engine for them. It cannot use the prefix cache; so that the others can, they do not ask."""
    _logprobs: tuple[TokenLogprobs, ...] = ()
    _known: asyncio.Event = field(default_factory=asyncio.Event)

    async def attach_to(self, choice: int, stream: AsyncGenerator[TokenEvent, None]) -> AsyncGenerator[TokenEvent, None]:
        """The events of a choice, with the log-probabilities in the first one.

        The events of the scoring choice bring them; those of the others wait for that. The waiting streams are read all the while: a
        stream that nobody reads counts as one of a client that does not read (`SlowReader`).
        """
        if choice == self.scoring_choice:
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


def shared_prompt_logprobs(choices: Sequence[Choice]) -> dict[int, SharedPromptLogprobs]:
    """By index of the prompt, for prompts whose log-probabilities are wanted. The first of a prompt's choices computes them."""
    shared: dict[int, SharedPromptLogprobs] = {}
    for choice in choices:
        if choice.settings.prompt:
            shared.setdefault(choice.settings.prompt_index, SharedPromptLogprobs(choice.settings.index))
    return shared
