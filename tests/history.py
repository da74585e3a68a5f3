"""What clients saw, and whether it was what they were promised (contract: G1 no silent loss, G2 exactly once, G3 same tokens).

A client writes down what comes, as it comes: `token`, `finish`, `usage`, and in the end exactly one of `complete`, `failed`
and `left`. `Golden` is what an undisturbed run gives. Used by the simulation and by the tests with real processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LOGPROB_TOLERANCE = 1e-5


@dataclass(frozen=True)
class GoldenChoice:
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Golden:
    """An undisturbed answer."""

    choices: tuple[GoldenChoice, ...]
    prompt_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)


@dataclass
class SeenChoice:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclass
class History:
    """One request as its client saw it. ``wrong`` grows with everything that must not happen, whatever comes later."""

    name: str
    choices: dict[int, SeenChoice] = field(default_factory=dict)
    counted: int | None = None
    """Completion tokens according to `usage`."""
    prompt_tokens: int | None = None
    ends: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def token(self, choice: int, offset: int, ids: Sequence[int], logprobs: Sequence[float] = (), text: str = "") -> None:
        """Output tokens from place ``offset`` on."""
        seen = self._open(choice, "tokens")
        if offset != len(seen.tokens):
            self.wrong.append(f"choice {choice}: offset {offset} after {len(seen.tokens)} tokens (a gap or a repeat)")
        seen.tokens += ids
        seen.logprobs += logprobs
        seen.text += text

    def finish(self, choice: int, reason: str) -> None:
        self._open(choice, "a second end").finish_reason = reason

    def usage(self, completion_tokens: int, prompt_tokens: int | None = None) -> None:
        self._not_over("usage")
        self.counted, self.prompt_tokens = completion_tokens, prompt_tokens

    def complete(self) -> None:
        """The stream ended as whole: [DONE], or gRPC's OK."""
        self._end("complete")

    def failed(self, kind: str) -> None:
        """A typed error."""
        self._end(f"failed: {kind}")

    def left(self) -> None:
        """The client went away by itself."""
        self._end("left")

    def broken(self, how: str) -> None:
        """The connection broke: no end, and no false one."""
        self._end(f"broken: {how}")

    @property
    def is_complete(self) -> bool:
        return self.ends == ["complete"]

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices.values())

    def _open(self, choice: int, what: str) -> SeenChoice:
        self._not_over(what)
        seen = self.choices.setdefault(choice, SeenChoice())
        if seen.finish_reason is not None:
            self.wrong.append(f"choice {choice}: {what} after its end")
        return seen

    def _not_over(self, what: str) -> None:
        if self.ends:
            self.wrong.append(f"{what} after the end ({self.ends[-1]})")

    def _end(self, how: str) -> None:
        self.ends.append(how)


def violations(
    history: History,
    golden: Golden,
    *,
    may_fail: Iterable[str] = (),
    may_break: bool = False,
    logprob_tolerance: float = LOGPROB_TOLERANCE,
) -> list[str]:
    """What is not as promised. ``may_fail``: names of errors that this request may end with; ``may_break``: or without an end."""
    found = list(history.wrong)
    if len(history.ends) != 1:
        found.append(f"{len(history.ends)} ends: {history.ends}")
    for index, seen in sorted(history.choices.items()):
        if index >= len(golden.choices):
            found.append(f"choice {index} was not asked for")
            continue
        found += _differences(index, seen, golden.choices[index], whole=history.is_complete, tolerance=logprob_tolerance)
    end = history.ends[0] if history.ends else ""
    if end == "complete":
        if set(history.choices) != set(range(len(golden.choices))):
            found.append(f"complete with choices {sorted(history.choices)} of {len(golden.choices)}")
        if history.counted is not None and history.counted != golden.num_tokens:
            found.append(f"usage counts {history.counted} tokens, there are {golden.num_tokens}")
        if None not in (history.prompt_tokens, golden.prompt_tokens) and history.prompt_tokens != golden.prompt_tokens:
            found.append(f"usage counts {history.prompt_tokens} prompt tokens, there are {golden.prompt_tokens}")
    elif end.startswith("failed: ") and end.removeprefix("failed: ") not in set(may_fail):
        found.append(f"ended with an error that nothing explains: {end}")
    elif end.startswith("broken: ") and not may_break:
        found.append(end)
    return [f"{history.name}: {one}" for one in found]


def _differences(index: int, seen: SeenChoice, golden: GoldenChoice, *, whole: bool, tolerance: float) -> list[str]:
    found = []
    if tuple(seen.tokens) != golden.tokens[: len(seen.tokens)]:
        at = next((at for at, pair in enumerate(zip(seen.tokens, golden.tokens, strict=False)) if pair[0] != pair[1]), len(golden.tokens))
        found.append(f"choice {index}: token {at} differs from the undisturbed answer")
    if not golden.text.startswith(seen.text):
        found.append(f"choice {index}: text {seen.text!r} differs from {golden.text!r}")
    if golden.logprobs:
        apart = [abs(a - b) for a, b in zip(seen.logprobs, golden.logprobs, strict=False)]
        found += [f"choice {index}: log-probability {at} differs by {by:.1e}" for at, by in enumerate(apart) if by > tolerance]
    if whole or seen.finish_reason is not None:
        if len(seen.tokens) != len(golden.tokens):
            found.append(f"choice {index}: ended with {len(seen.tokens)} tokens of {len(golden.tokens)}")
        if seen.text != golden.text:
            found.append(f"choice {index}: ended with {len(seen.text)} characters of {len(golden.text)}")
        if seen.finish_reason != golden.finish_reason:
            found.append(f"choice {index}: ended by {seen.finish_reason}, not by {golden.finish_reason}")
    return found
