"""Step 13 of a request: the log-probabilities of a prompt come with one of its choices and are told by all."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.plan import TokenEvent, TokenLogprobs
from serve.choice import Choice


@dataclass(eq=False)
class PromptScores:
    """Those of one prompt."""

    scorer: int
    """The choice that asks the engine for them. The others find the prompt in the prefix cache, which one that asks must not use."""
    _logprobs: tuple[TokenLogprobs, ...] = ()
    _known: asyncio.Event = field(default_factory=asyncio.Event)

    async def told_by(self, choice: Choice, event: TokenEvent) -> TokenEvent:
        """The first event of a choice, with them: the scorer's brings them, all others wait for that."""
        if choice.plan.index == self.scorer:
            self._logprobs = event.prompt_logprobs
            self._known.set()
            return event
        await self._known.wait()
        return replace(event, prompt_logprobs=self._logprobs)


def scores_of(choices: Sequence[Choice]) -> dict[int, PromptScores]:
    """By number of the prompt, where choices that run are to tell of it: the first of them asks."""
    scores: dict[int, PromptScores] = {}
    for choice in choices:
        if choice.plan.prompt:
            scores.setdefault(choice.plan.prompt_index, PromptScores(choice.plan.index))
    return scores
