"""The protocol's table of streams against a dictionary."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.stream_table import StreamTable, untagged_rows
from engine.output import NO_TAG, TokenBatch
from engine.plan import COLUMN
from engine.request import Request
from engine.sequence import Sequence

SEQUENCE = Sequence(Request(id="r", prompt=(1,)), 0)


def said(tags: list[int]) -> TokenBatch:
    column = np.arange(len(tags), dtype=np.int64)
    return TokenBatch(np.array(tags, np.int64), column + 5, column + 100, [SEQUENCE] * len(tags))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_each_token_comes_to_the_stream_it_is_for_and_what_is_late_to_none(seed: int) -> None:
    draw, table = random.Random(seed), StreamTable()
    alive: dict[int, tuple[bytes, int]] = {}
    gone: list[int] = []
    for stream in range(draw.randint(1, 60)):
        front = draw.choice([b"one", b"two", b"three"])
        tag = table.add(front, stream)
        assert tag not in alive
        assert tag not in gone
        alive[tag] = (front, stream)
        if draw.random() < 0.4:
            left = draw.choice(list(alive))
            table.remove(left)
            table.remove(left)
            del alive[left]
            gone.append(left)
        if draw.random() < 0.1:
            lost = draw.choice([b"one", b"two", b"three"])
            for left in [tag for tag, (front, _) in alive.items() if front == lost]:
                table.remove(left)
                del alive[left]
                gone.append(left)
            table.remove_front(lost)
    assert len(table._front_at) <= 3, "fronts that are gone leave their numbers to others"
    tags = draw.sample([*alive, *gone, NO_TAG], draw.randint(1, len(alive) + len(gone) + 1))
    got = set()
    for front, columns in table.by_front(said(tags)):
        raws = (columns.streams, columns.offsets, columns.tokens)
        got |= {(front, *row) for row in zip(*(np.frombuffer(raw, COLUMN).tolist() for raw in raws), strict=True)}
    assert got == {(*alive[tag], place + 5, place + 100) for place, tag in enumerate(tags) if tag in alive}
    assert untagged_rows(said(tags)) == [place for place, tag in enumerate(tags) if tag == NO_TAG]


def test_a_stream_without_a_number_is_told_by_events() -> None:
    assert StreamTable().add(b"front", NO_TAG) == NO_TAG
    (event,) = said([NO_TAG]).events([0])
    assert (event.request_id, event.offset, event.tokens) == ("r", 5, (100,))
