"""Shares of an axis: together they cover it exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.axes import Share, head_share, split, whole


@given(size=st.integers(0, 500), ranks=st.integers(1, 9), unit=st.integers(1, 130))
def test_shares_cover_an_axis_once_in_near_even_whole_units(size: int, ranks: int, unit: int) -> None:
    shares = [split(size, rank, ranks, unit) for rank in range(ranks)]
    assert [element for share in shares for span in share.spans for element in span] == list(range(size))
    units = [-(-len(share) // unit) for share in shares]
    assert max(units) - min(units) <= 1
    assert all(span.start % unit == 0 or span.start == size for share in shares for span in share.spans)


def test_the_examples_of_split() -> None:
    assert [split(9, rank, 2).spans for rank in range(2)] == [(range(5),), (range(5, 9),)]
    assert [len(split(9728, rank, 3, unit=128)) // 128 for rank in range(3)] == [26, 25, 25]
    assert [len(split(2, rank, 4)) for rank in range(4)] == [1, 0, 1, 0]


def test_a_share_of_heads_scales_to_rows() -> None:
    assert split(3, 1, 2).scaled(64) == Share(192, (range(128, 192),))
    assert len(whole(14).scaled(64)) == 896


def test_stored_slices_count_packed_elements() -> None:
    assert Share(1024, (range(128, 512),)).stored(8) == (slice(16, 64),)
    assert Share(1000, (range(896, 1000),)).stored(128) == (slice(7, 8),)  # the last group may be short
    with pytest.raises(ValueError, match="cuts through a stored element of 128"):
        Share(1024, (range(64, 512),)).stored(128)


@given(size=st.integers(1, 300), ranks=st.integers(1, 9), pack=st.integers(1, 40))
def test_stored_slices_of_all_ranks_cover_the_stored_dim_once(size: int, ranks: int, pack: int) -> None:
    slices = [piece for rank in range(ranks) for piece in split(size, rank, ranks, unit=pack).stored(pack)]
    assert [element for piece in slices for element in range(piece.start, piece.stop)] == list(range(-(-size // pack)))


@st.composite
def heads(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return num_kv * group, num_kv, draw(st.integers(1, num_kv * group))


@given(heads())
def test_every_query_head_is_computed_once_beside_its_own_kv_head(shape: tuple[int, int, int]) -> None:
    num_heads, num_kv, ranks = shape
    seen = []
    for rank in range(ranks):
        share = head_share(num_heads, num_kv, rank, ranks)
        queries = [head for span in share.query.spans for head in span]
        held = [head for span in share.kv.spans for head in span]
        assert [held[local] for local in share.kv_of_query] == [head // (num_heads // num_kv) for head in queries]
        assert set(share.kv_of_query) == set(range(len(held)))  # no KV head without a query
        seen += queries
    assert seen == list(range(num_heads))


def test_the_examples_of_head_share() -> None:
    nine = [head_share(9, 3, rank, 2) for rank in range(2)]
    assert [(share.query.spans, share.kv.spans) for share in nine] == [
        ((range(5),), (range(2),)),
        ((range(5, 9),), (range(1, 3),)),
    ]
    assert nine[1].kv_of_query == (0, 1, 1, 1)
    qwen_7b = [head_share(28, 4, rank, 8) for rank in range(3)]
    assert [(share.query.spans[0], share.kv.spans[0]) for share in qwen_7b] == [
        (range(4), range(1)),
        (range(4, 7), range(1)),
        (range(7, 11), range(1, 2)),
    ]


def test_more_ranks_than_query_heads_are_rejected() -> None:
    with pytest.raises(ValueError, match="14 query heads cannot be shared over 16 ranks; use at most 14"):
        head_share(14, 2, 0, 16)
