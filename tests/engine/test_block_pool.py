"""The block pool: every block is used, cached or free, and never two of these."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.block_pool import BlockPool
from engine.kv.keys import block_key, root_key


def test_it_reports_its_state_in_one_line():
    pool = BlockPool(4)
    pool.allocate(1)
    assert repr(pool) == "<BlockPool [1 used | 0 cached | 3 free]>"


def test_a_published_block_is_found_after_its_owner_left_until_it_is_evicted():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.release([block])
    assert pool.find([b"a", b"b"]) == [block]
    pool.allocate(2)
    assert pool.find([b"a"]) == []


def test_the_block_released_longest_ago_is_evicted_first_and_a_sequence_loses_its_end_before_its_beginning():
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for block, key in zip(first + second, [b"a", b"b", b"c", b"d"], strict=True):
        pool.publish(block, key)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(3) == [first[1], first[0], second[1]]
    assert pool.find([b"c"]) == [second[0]]


def test_a_shared_block_stays_until_its_last_owner_left():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.share([block])
    pool.release([block])
    assert pool.num_used == 1
    pool.release([block])
    assert (pool.num_used, pool.num_cached) == (0, 1)


def test_of_two_equal_blocks_only_the_first_is_cached():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.release([first, second])
    assert (pool.num_cached, pool.num_free) == (1, 1)
    assert pool.find([b"a"]) == [first]


def test_a_listener_can_rebuild_what_is_cached():
    class Index(set):
        stored = set.add
        evicted = set.remove

    index = Index()
    pool = BlockPool(3, index)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, [b"a", b"b", b"c"], strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    pool.allocate(2)
    assert index == {b"a"}
    pool.clear()
    assert index == set()


def test_keys_depend_on_salt_parent_and_tokens():
    keys = {
        block_key(root_key(""), [1, 2]),
        block_key(root_key("tenant"), [1, 2]),
        block_key(root_key(""), [2, 1]),
        block_key(block_key(root_key(""), [1, 2]), [1, 2]),
    }
    assert len(keys) == 4


@given(st.lists(st.tuples(st.sampled_from(["allocate", "release", "publish", "share"]), st.integers(0, 7)), max_size=60))
def test_every_block_is_in_exactly_one_state_whatever_happens(operations):
    pool = BlockPool(8)
    held: list[int] = []
    for what, number in operations:
        if what == "allocate" and pool.num_available >= number:
            held += pool.allocate(number)
        elif what == "release" and held:
            pool.release([held.pop(number % len(held))])
        elif what == "publish" and held:
            pool.publish(held[number % len(held)], bytes([number]))
        elif what == "share":
            found = pool.find([bytes([number])])
            pool.share(found)
            held += found
        assert pool.num_used == len(set(held))
        assert pool.num_used + pool.num_cached + pool.num_free == 8
    pool.release(held)
    assert pool.num_used == 0


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
