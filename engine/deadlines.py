"""Finds the requests whose deadline has passed without scanning all of them."""

import heapq
import weakref

from engine.sequence import Sequence


class Deadlines:
    """A heap of deadlines. It refers to sequences weakly: one that ended stays in it until its deadline, but its tokens are freed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, weakref.ref[Sequence]]] = []

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline_s is not None:
            heapq.heappush(self._heap, (sequence.request.deadline_s, sequence.arrival, weakref.ref(sequence)))

    def pop_expired(self, now: float) -> list[Sequence]:
        """Sequences that have not ended and whose deadline has passed, earliest first; each is returned once."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[-1]()
            if sequence is not None and not sequence.ended:
                expired.append(sequence)
        return expired
