"""A front's idea of a replica's prefix cache: true as long as it follows, and never taken for true when it does not."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.block_journal import SHORT_KEY_BYTES, BlockJournal
from cluster.messages import BlockUpdate, decode, encode
from cluster.prefix_index import EXPECT_S, MAX_EXPECTED, MAX_KEYS, PrefixIndex, prompt_keys
from engine.kv.keys import block_key, root_key
from engine.request import Request

KEYS = [block_key(root_key(""), (number,)) for number in range(24)]
MAX_BLOCKS = 16


class Following(RuleBasedStateMachine):
    """Two shards store and evict; news are read now and then; a front follows, loses messages, and asks again."""

    @initialize()
    def begin(self) -> None:
        self.journal, self.index = BlockJournal(), PrefixIndex(max_blocks=MAX_BLOCKS, clock=lambda: 0.0)
        self.shards = [set[bytes](), set[bytes]()]
        self.told: set[bytes] = set()
        """What was there at the last reading."""
        self.missed = False

    @rule(shard=st.integers(0, 1), key=st.sampled_from(KEYS))
    def store(self, shard: int, key: bytes) -> None:
        if key not in self.shards[shard]:
            self.shards[shard].add(key)
            self.journal.stored(key)

    @rule(shard=st.integers(0, 1), key=st.sampled_from(KEYS))
    def evict(self, shard: int, key: bytes) -> None:
        if key in self.shards[shard]:
            self.shards[shard].remove(key)
            self.journal.evicted(key)

    @rule(arrives=st.booleans())
    def read_news(self, arrives: bool) -> None:
        news = self.journal.changes()
        self.told = self.shards[0] | self.shards[1]
        if news is not None and arrives:
            self.index.apply(decode(encode(news)))
        elif news is not None:
            self.missed = True

    @rule()
    @precondition(lambda self: self.index.needs_snapshot)
    def ask_for_the_whole(self) -> None:
        self.read_news(arrives=False)
        self.index.apply(decode(encode(self.journal.snapshot())))
        self.missed = False

    @invariant()
    def it_knows_the_truth_or_says_that_it_does_not(self) -> None:
        assert self.index.num_blocks <= MAX_BLOCKS
        if self.index.too_large or not self.index.usable:
            assert self.index.num_blocks == 0
            assert all(self.index.overlap([key[:SHORT_KEY_BYTES]]) == 0 for key in KEYS)
        elif not self.missed:
            assert {key for key in KEYS if self.index.overlap([key[:SHORT_KEY_BYTES]])} == self.told


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_gap_in_the_numbers_makes_it_ask_again() -> None:
    index = PrefixIndex(max_blocks=99)
    assert index.needs_snapshot
    index.apply(BlockUpdate(4, whole=True, stored=KEYS[0][:SHORT_KEY_BYTES], evicted=b""))
    index.apply(BlockUpdate(5, whole=False, stored=KEYS[1][:SHORT_KEY_BYTES], evicted=b""))
    assert index.overlap([KEYS[0][:SHORT_KEY_BYTES], KEYS[1][:SHORT_KEY_BYTES], KEYS[2][:SHORT_KEY_BYTES]]) == 2
    index.apply(BlockUpdate(7, whole=False, stored=KEYS[2][:SHORT_KEY_BYTES], evicted=b""))
    assert index.needs_snapshot
    assert index.overlap([KEYS[0][:SHORT_KEY_BYTES]]) == 0


def test_what_is_on_its_way_counts_for_a_while_and_in_bounded_number() -> None:
    now = 0.0
    index = PrefixIndex(max_blocks=99, clock=lambda: now)
    index.apply(BlockUpdate(0, whole=True, stored=b"", evicted=b""))
    index.expect([b"a" * 8, b"b" * 8])
    assert index.overlap([b"a" * 8, b"b" * 8, b"c" * 8]) == 2
    now = EXPECT_S
    assert index.overlap([b"a" * 8, b"b" * 8]) == 0
    index.expect([number.to_bytes(8, "big") for number in range(MAX_EXPECTED + 2)])
    assert index.overlap([(0).to_bytes(8, "big")]) == 0
    assert index.overlap([(2).to_bytes(8, "big")]) == 1


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=90),
    committed=st.integers(0, 20),
    salts=st.tuples(st.text(max_size=3), st.text(max_size=3)),
)
def test_the_keys_are_those_of_the_engine_and_differ_between_salts(prompt: list[int], committed: int, salts: tuple[str, str]) -> None:
    tokens = (*prompt, *range(committed))
    request = Request(id="r", prompt=tuple(prompt), committed=tuple(range(committed)), salt=salts[0])
    keys = prompt_keys(request, 8)
    assert len(keys) == (len(tokens) - 1) // 8
    parent = root_key(salts[0])
    for index, key in enumerate(keys):
        parent = block_key(parent, tokens[index * 8 : index * 8 + 8])
        assert key == parent[:SHORT_KEY_BYTES]
    other = prompt_keys(Request(id="r", prompt=request.prompt, committed=request.committed, salt=salts[1]), 8)
    assert Counter(keys) == Counter(other) if salts[0] == salts[1] else not set(keys) & set(other)


def test_no_more_than_so_many_blocks_of_a_prompt_are_looked_up() -> None:
    assert len(prompt_keys(Request(id="r", prompt=(1,) * (4 * MAX_KEYS)), 1)) == MAX_KEYS
