"""The workloads of `manta bench serve`: prompts and arrival times as functions of a seed, fixed before anything is sent, so that a slow
server does not get less load.

Lengths count one token per word; the server's usage says how many tokens there really were.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child",
    "world", "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    "place", "case", "week", "company", "system", "program", "question", "work", "government", "number",
    "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact",
    "month", "lot", "right", "study", "book", "eye", "job", "word", "business",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request: the user's message and the maximum length of the answer."""

    prompt: str
    max_tokens: int
    extra: dict[str, object] = field(default_factory=dict)
    """Further fields of the request body."""
    cancel_after_tokens: int | None = None
    """The client disconnects after this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of one user, each sent when the previous one is answered; the first at ``at_s``, however slow the server is."""

    at_s: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size and rate of a workload."""

    requests: int
    rate: float
    """Mean arrivals per second."""
    scale: float = 1.0
    """Factor for all lengths in tokens."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    about: str
    make: Callable[[Shape], Iterator[Conversation]]

    def conversations(self, shape: Shape) -> list[Conversation]:
        """The first ``shape.requests`` conversations, by time."""
        return list(islice(self.make(shape), shape.requests))


def text(draw: random.Random, tokens: int) -> str:
    return " ".join(draw.choices(WORDS, k=max(1, tokens)))


class _Maker:
    """Random draws for one seed."""

    def __init__(self, shape: Shape, name: str) -> None:
        self.shape = shape
        self.draw = random.Random(f"{name} {shape.seed}")  # noqa: S311  (a workload, not a secret)

    def turn(self, tokens_in: float, tokens_out: float, *, prefix: str = "", **more: object) -> Turn:
        scale = self.shape.scale
        prompt = prefix + text(self.draw, round(tokens_in * scale))
        return Turn(prompt=prompt, max_tokens=max(1, round(tokens_out * scale)), **more)  # type: ignore[arg-type]

    def arrivals(self, variation: float = 1.0) -> Iterator[float]:
        """Arrival times with gamma-distributed gaps of this coefficient of variation: 1 is Poisson, more gives bursts."""
        form = 1 / variation**2
        gaps = iter(lambda: self.draw.gammavariate(form, 1 / (form * self.shape.rate)), None)
        return accumulate(gaps)

    def chat_lengths(self) -> tuple[float, float]:
        """(prompt, answer) lengths as in chat traffic: lognormal with means 215 and 198."""
        return tuple(min(4096.0, mean * self.draw.lognormvariate(-(sigma**2) / 2, sigma)) for mean, sigma in ((215, 1.0), (198, 0.8)))  # type: ignore[return-value]


def _at(times: Iterator[float], turns: Iterator[Turn]) -> Iterator[Conversation]:
    return (Conversation(at_s=at_s, turns=(turn,)) for at_s, turn in zip(times, turns, strict=False))


def _one_stream(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W1")
    while True:
        yield Conversation(at_s=0.0, turns=tuple(make.turn(tokens, 128) for tokens in (1, 512, 6_000, 14_000, 30_000)))


def _uniform(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W2")
    while True:
        yield Conversation(at_s=0.0, turns=(make.turn(make.draw.randint(100, 1024), make.draw.randint(100, 1024)),))


def _chat(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W3")
    return _at(make.arrivals(), (make.turn(*make.chat_lengths()) for _ in iter(int, 1)))


GRID = ((128, 128), (128, 2048), (1000, 1000), (2048, 128), (5000, 500))


def _grid(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W4")
    return _at(make.arrivals(), (make.turn(*GRID[i % len(GRID)]) for i in range(10**9)))


def _shared_prefix(shape: Shape) -> Iterator[Conversation]:
    """Nine of ten requests reuse one of the last eight prefixes of 2,000 tokens; one of ten starts a new prefix."""
    make = _Maker(shape, "W5")
    prefixes = [text(make.draw, round(2_000 * shape.scale)) + " "]

    def turn() -> Turn:
        if make.draw.random() < 0.1:
            prefixes.append(text(make.draw, round(2_000 * shape.scale)) + " ")
            return make.turn(128, 64, prefix=prefixes[-1])
        return make.turn(128, 64, prefix=make.draw.choice(prefixes[-8:]))

    return _at(make.arrivals(), (turn() for _ in iter(int, 1)))


def _long_among_short(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W6")
    turns = (make.turn(8_000, 64) if i % 10 == 5 else make.turn(*make.chat_lengths()) for i in range(10**9))
    return _at(make.arrivals(), turns)


def _bursts(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W7")
    return _at(make.arrivals(variation=4.0), (make.turn(*make.chat_lengths()) for _ in iter(int, 1)))


def _many_turns(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W8")
    for at_s in make.arrivals():
        yield Conversation(at_s=at_s, turns=tuple(make.turn(60, 120) for _ in range(make.draw.randint(2, 6))))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def _json(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W9")
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}}
    return _at(make.arrivals(), (make.turn(100, 128, extra=asked) for _ in iter(int, 1)))


def _cancelled(shape: Shape) -> Iterator[Conversation]:
    make = _Maker(shape, "W10")

    def turn() -> Turn:
        leaves = make.draw.randint(1, 20) if make.draw.random() < 0.2 else None
        return make.turn(*make.chat_lengths(), cancel_after_tokens=leaves)

    return _at(make.arrivals(), (turn() for _ in iter(int, 1)))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="W1", about="one stream after the other: 1, 512, 6k, 14k, 30k in, 128 out", make=_one_stream),
        Workload(name="W2", about="all at once: 100-1,024 in and out, uniform", make=_uniform),
        Workload(name="W3", about="chat: lognormal, 215 in, 198 out, Poisson arrivals", make=_chat),
        Workload(name="W4", about="a grid: 128/128, 128/2048, 1000/1000, 2048/128, 5000/500", make=_grid),
        Workload(name="W5", about="shared prefixes of 2,000 tokens plus 128, nine of ten reused", make=_shared_prefix),
        Workload(name="W6", about="W3 with every tenth prompt 8,000 tokens long", make=_long_among_short),
        Workload(name="W7", about="W3 in bursts (gaps gamma distributed, cv 4)", make=_bursts),
        Workload(name="W8", about="conversations of 2 to 6 turns, history sent along", make=_many_turns),
        Workload(name="W9", about="answers in JSON that follow a schema", make=_json),
        Workload(name="W10", about="W3, and one in five clients disconnects", make=_cancelled),
    )
}
