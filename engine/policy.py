"""Scheduling policies: who is admitted first, who is preempted when KV blocks run out, and whose request the queue still accepts."""

from collections.abc import Collection, Iterable
from typing import Protocol

from engine.request import Request
from engine.sequence import Sequence

SortKey = tuple[float, ...]


class QueuedRequest(Protocol):
    """Anything with a place in the waiting queue."""

    @property
    def request(self) -> Request: ...


class Policy(Protocol):
    """Called by the scheduler on the engine's thread. `may_queue` is called from any thread, with a queue that may be slightly out of date.

    `engine.fair_share` is a policy whose sort keys change over time.
    """

    def sort_key(self, sequence: Sequence) -> SortKey:
        """The current key. Lower is planned first and preempted last; no two sequences may have equal keys."""
        ...

    def admission_order(self, waiting: Collection[Sequence]) -> Iterable[Sequence]:
        """The waiting sequences in the order of admission. Read one at a time; `on_admission` may be called in between."""
        ...

    def must_leave_reserve(self, sequence: Sequence) -> bool:
        """Whether the last of `max_running` and of the KV blocks are reserved for others, and may not be given to this sequence."""
        ...

    def may_queue(self, request: Request, waiting: Collection[QueuedRequest], limit: int) -> bool:
        """Whether the waiting queue, of about ``limit`` requests at most, accepts this request."""
        ...

    def on_arrival(self, sequence: Sequence, waiting: Collection[Sequence]) -> None:
        """The sequence is about to be added to ``waiting`` for the first time."""
        ...

    def on_admission(self, sequence: Sequence) -> None:
        """The sequence was admitted for the first time. `Sequence.num_computed` already counts its cached prefix."""
        ...

    def on_sampled(self, request: Request, num_tokens: int) -> None:
        """``num_tokens`` output tokens were sampled for this request, or together for several of the same tenant and share."""
        ...


class StaticPolicy:
    """Base for policies whose sort keys never change and that reserve nothing."""

    def sort_key(self, sequence: Sequence) -> SortKey:
        raise NotImplementedError

    def admission_order(self, waiting: Collection[Sequence]) -> Iterable[Sequence]:
        return list(waiting)  # the waiting queue is already sorted by key

    def must_leave_reserve(self, sequence: Sequence) -> bool:
        return False

    def may_queue(self, request: Request, waiting: Collection[QueuedRequest], limit: int) -> bool:
        return len(waiting) < limit

    def on_arrival(self, sequence: Sequence, waiting: Collection[Sequence]) -> None:
        pass

    def on_admission(self, sequence: Sequence) -> None:
        pass

    def on_sampled(self, request: Request, num_tokens: int) -> None:
        pass


class FirstComeFirstServed(StaticPolicy):
    """By priority, then by arrival."""

    def sort_key(self, sequence: Sequence) -> SortKey:
        return (sequence.request.priority, sequence.arrival)


class ShortestPromptFirst(StaticPolicy):
    """By priority, then the shorter prompt: the lowest mean wait when prompt lengths differ a lot and being overtaken is acceptable."""

    def sort_key(self, sequence: Sequence) -> SortKey:
        return (sequence.request.priority, sequence.num_prompt, sequence.arrival)
