"""First tokens before second ones: who came before anybody's answer had begun is begun before anybody goes on.

Nobody's stream ran when they came, so none is disturbed. Beside those who are begun sooner their prompts would be cut, and the last of them
come late, while a next token costs as much now as later, when more sequences share its step. Whoever comes afterwards is computed beside
those who decode, at their pace (`engine.pace`).
"""

from engine.books import Books
from engine.pace import Pace
from engine.sequence import Sequence


class FirstRound:
    """From the first answer that begins while nobody decodes, until all who had come by then have begun."""

    def __init__(self, books: Books, pace: Pace) -> None:
        self._books, self._pace = books, pace
        self._before: int | None = None
        """Who arrived earlier is of the round: 0 when it is over, None while nobody decodes."""
        self._priority = 0
        """Nobody waits for those who are less urgent."""

    def is_on(self) -> bool:
        """Whether none but those who are `due` should be in the next step. To be asked before every step, as it notes who decodes."""
        opened = [shard.open for shard in self._books.shards]
        if not any(_decodes(sequence) for each in opened for sequence in each.values()):
            self._before = None
            return False
        if self._before is None:
            together = self._books.num_running + len(self._books.admission.waiting)
            may_wait = self._pace.may_wait_for_others(together, self._books.prefill_tokens)
            self._before = self._books.num_arrived if may_wait else 0
        if self._before:
            decoding = [sequence for each in opened for sequence in each.values() if _decodes(sequence)]
            self._priority = min(sequence.request.priority for sequence in decoding)
            others = [*self._books.admission.waiting, *(sequence for each in opened for sequence in each.values())]
            if any(sequence.arrival >= self._before for sequence in decoding) or not any(map(self.due, others)):
                self.end()
        return self._before > 0

    def due(self, sequence: Sequence) -> bool:
        """Whether it is of the round, and a step can bring it nearer to its first token."""
        if self._before is None or sequence.arrival >= self._before or sequence.request.priority > self._priority or sequence.ended:
            return False
        pending = sequence.num_pending
        return sequence.number is None or pending > 1 or (pending == 1 and not sequence.has_begun)

    def end(self) -> None:
        """Until nobody decodes: also where those who are due find no room."""
        self._before = 0


def _decodes(sequence: Sequence) -> bool:
    """Whether all that it lacks is a next token, but not the first."""
    return sequence.has_begun and sequence.num_pending <= 1 and not sequence.ended
