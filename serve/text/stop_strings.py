"""Finds stop strings in streamed text, and holds back text that could be the beginning of one."""

from collections.abc import Iterable


class StopStrings:
    """Watches the text of one choice.

    The stop string that is complete first wins; of those complete at the same character, the longest. This does not depend on how the
    text is split into tokens.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be sent now, and the stop string if it ends the answer (it is not part of the text)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = self._first_in(text)
        if found is not None:
            self._held = ""
            start, stop = found
            return text[:start], stop
        keep = self._could_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text that was held back, when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_in(self, text: str) -> tuple[int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _could_become_stop(self, text: str) -> int:
        """The length of the longest suffix of ``text`` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
