"""Which requests' deadlines have passed, without looking at all of them."""

import heapq
import weakref

from engine.sequence import Sequence


class Deadlines:
    """A heap. Who has ended stays in it until its time has come, without its tokens."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, weakref.ref[Sequence]]] = []

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deadline_s is not None:
            heapq.heappush(self._heap, (sequence.request.deadline_s, sequence.arrival, weakref.ref(sequence)))

    def passed(self, now: float) -> list[Sequence]:
        """Sequences that have not ended and whose time is over, the earliest first; each once."""
        late = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[-1]()
            if sequence is not None and not sequence.ended:
                late.append(sequence)
        return late
