"""Who is admitted first, who has to give way when blocks run out, and whose request still finds a place in the queue."""

from collections.abc import Iterable
from collections.abc import Sequence as Listed
from typing import Protocol

from engine.request import Request
from engine.sequence import Sequence

Rank = tuple[float, ...]


class Waits(Protocol):
    """Whoever has a place in the queue."""

    @property
    def request(self) -> Request: ...


class Policy(Protocol):
    """Asked and told by the scheduler, from the engine's thread; `may_wait` from any, about a queue as it was a moment ago. See
    `engine.fair_share` for one whose ranks change."""

    def rank(self, sequence: Sequence) -> Rank:
        """As of now. Lower is planned first and preempted last; no two may be equal."""
        ...

    def order(self, waiting: Listed[Sequence]) -> Iterable[Sequence]:
        """The waiting ones as they shall be admitted. Read one by one; the scheduler tells of each admission in between."""
        ...

    def gives_way(self, sequence: Sequence) -> bool:
        """Whether the last places and blocks are not for it: they are kept for somebody who may come."""
        ...

    def may_wait(self, request: Request, waiting: Listed[Waits], limit: int) -> bool:
        """Whether a place in a queue of about ``limit`` is left for it."""
        ...

    def arrived(self, sequence: Sequence, waiting: Listed[Sequence]) -> None:
        """It is about to be put to the ``waiting``."""
        ...

    def opened(self, sequence: Sequence) -> None:
        """It is admitted for the first time, and what of its prompt is cached has been found."""
        ...

    def sampled(self, request: Request, num_tokens: int) -> None:
        """Answers have grown by so many tokens together: its own, or those of several requests of the same tenant and share."""
        ...


class FixedRank:
    """What policies have in common whose ranks never change."""

    def rank(self, sequence: Sequence) -> Rank:
        raise NotImplementedError

    def order(self, waiting: Listed[Sequence]) -> Iterable[Sequence]:
        return list(waiting)  # the scheduler keeps them in the order of their ranks

    def gives_way(self, sequence: Sequence) -> bool:
        return False

    def may_wait(self, request: Request, waiting: Listed[Waits], limit: int) -> bool:
        return len(waiting) < limit

    def arrived(self, sequence: Sequence, waiting: Listed[Sequence]) -> None:
        pass

    def opened(self, sequence: Sequence) -> None:
        pass

    def sampled(self, request: Request, num_tokens: int) -> None:
        pass


class FirstCome(FixedRank):
    """By priority, then by arrival."""

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.request.priority, sequence.arrival)


class ShortestPromptFirst(FixedRank):
    """By priority, then the shorter prompt: the least mean wait where prompts differ much and no one minds being overtaken."""

    def rank(self, sequence: Sequence) -> Rank:
        return (sequence.request.priority, sequence.num_prompt, sequence.arrival)
