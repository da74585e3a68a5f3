"""Who is served first, and who has to give way when blocks run out."""

from typing import Protocol

from engine.sequence import Sequence

Rank = tuple[int, ...]


class Policy(Protocol):
    def rank(self, sequence: Sequence) -> Rank:
        """Lower is admitted first and preempted last. It must not change while the sequence lives, and no two may be equal."""
        ...


class FirstCome:
    """By priority, then by arrival."""

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.request.priority, sequence.arrival)


class ShortestPromptFirst:
    """By priority, then the shorter prompt: the least mean wait where prompts differ much and no one minds being overtaken."""

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.request.priority, sequence.num_prompt, sequence.arrival)
