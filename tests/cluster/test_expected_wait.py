"""The choice of a replica: by the time to the first token, by what is cached, by session, and by chance where nothing is known."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.expected_wait import TIE_MARGIN, ExpectedWait, LoadEstimate, expected_wait_s, session_replica
from cluster.messages import BlockUpdate
from cluster.prefix_index import PrefixIndex, prompt_keys
from engine.request import Request

BLOCK, STEP = 4, 64
MEASURED = LoadEstimate(step_base_s=0.01, step_token_s=0.001)


@dataclass
class Place:
    id: str
    load_estimate: LoadEstimate = MEASURED
    follows: bool = True
    holds: Sequence[bytes] = ()
    sent: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index = PrefixIndex(max_blocks=9999)
        if self.follows:
            self.index.apply(BlockUpdate(0, whole=True, stored=b"".join(self.holds), evicted=b""))

    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        self.index.expect(keys)
        self.sent.append(num_tokens)


def policy(*, session_worth_s: float = 0.0, seed: int = 1) -> ExpectedWait:
    return ExpectedWait(block_tokens=BLOCK, step_tokens=STEP, session_worth_s=session_worth_s, seed=seed)


def asking(num_tokens: int = 33, *, first: int = 0, session: str = "", salt: str = "") -> Request:
    return Request(id="r", prompt=tuple(range(first, first + num_tokens)), session=session, salt=salt)


outlooks = st.builds(
    LoadEstimate,
    num_requests=st.integers(0, 50),
    num_running=st.integers(0, 80),
    prefill_tokens=st.integers(0, 5000),
    step_base_s=st.floats(0, 0.1),
    step_token_s=st.floats(0, 0.01),
)


@settings(deadline=None)
@given(st.lists(st.tuples(outlooks, st.booleans(), st.integers(0, 8)), min_size=1, max_size=6), st.integers(0, 99))
def test_the_chosen_one_is_never_expected_to_take_clearly_longer_than_another(
    states: list[tuple[LoadEstimate, bool, int]], seed: int
) -> None:
    request = asking()
    keys = prompt_keys(request, BLOCK)
    places = [Place(str(n), load_estimate, follows, keys[:held]) for n, (load_estimate, follows, held) in enumerate(states)]
    measured = all(place.load_estimate.is_measured for place in places)
    waits = {
        place.id: expected_wait_s(place.load_estimate, own_tokens=33 - BLOCK * place.index.overlap(keys), step_tokens=STEP)
        for place in places
    }
    chosen = policy(seed=seed).choose(places, request)
    assert chosen in places
    assert [place for place in places if place.sent] == [chosen]
    if measured and any(place.follows for place in places):
        assert waits[chosen.id] <= min(waits.values()) * (1 + TIE_MARGIN) + 1e-9


def test_of_equally_busy_ones_that_with_the_prompts_beginning_is_chosen() -> None:
    keys = prompt_keys(asking(), BLOCK)
    for seed in range(20):
        places = [Place("a"), Place("b", holds=keys[:2]), Place("c", holds=keys)]
        assert policy(seed=seed).choose(places, asking()).id == "c"


def test_a_cached_prefix_is_not_worth_a_longer_queue_than_computing_it_again() -> None:
    keys = prompt_keys(asking(), BLOCK)
    busy = LoadEstimate(num_requests=3, prefill_tokens=500, step_base_s=0.01, step_token_s=0.001)
    assert policy().choose([Place("busy", busy, holds=keys), Place("idle")], asking()).id == "idle"


def test_others_with_the_same_beginning_follow_before_it_is_computed() -> None:
    places = [Place(name) for name in "abcd"]
    chooses = policy()
    home = chooses.choose(places, asking(40))
    assert all(chooses.choose(places, asking(40)) is home for _ in range(5))
    assert home.sent == [40, 4, 4, 4, 4, 4]


def test_salts_share_nothing() -> None:
    places = [Place(name) for name in "ab"]
    chooses = policy()
    home = chooses.choose(places, asking(salt="x"))
    chooses.choose(places, asking(salt="y"))
    assert [sent for place in places for sent in place.sent] == [33, 33]
    assert home.index.overlap(prompt_keys(asking(salt="z"), BLOCK)) == 0


def test_a_session_stays_while_that_costs_little_and_leaves_when_it_costs_much() -> None:
    places = [Place(name) for name in "abcd"]
    home = session_replica(places, asking(session="s"))
    assert home is not None
    for first in range(0, 4000, 100):
        assert policy(session_worth_s=0.5).choose(places, asking(first=first, session="s")) is home
    home.load_estimate = LoadEstimate(prefill_tokens=2000, step_base_s=0.01, step_token_s=0.001)
    assert policy(session_worth_s=0.5).choose(places, asking(first=9000, session="s")) is not home


def test_most_sessions_keep_their_home_when_a_replica_comes() -> None:
    places = [Place(name) for name in "abcd"]
    homes = {session: session_replica(places, asking(session=session)) for session in map(str, range(400))}
    assert set(Counter(home.id for home in homes.values() if home)) == set("abcd")
    moved = sum(session_replica([*places, Place("e")], asking(session=session)) is not home for session, home in homes.items())
    assert 0 < moved < 400 * 0.35
    assert session_replica(places, asking()) is None


def test_where_no_index_is_of_use_the_better_of_two_by_chance_is_taken() -> None:
    def busy(prefill: int) -> LoadEstimate:
        return LoadEstimate(prefill_tokens=prefill, step_base_s=0.01, step_token_s=0.001)

    places = [Place(str(n), busy(n * 1000), follows=False) for n in range(5)]
    chooses = policy()
    chosen = Counter(chooses.choose(places, asking()).id for _ in range(1000))
    assert chosen["4"] == 0  # it is never the better of two
    assert chosen["0"] > chosen["1"] > chosen["2"] > chosen["3"] > 0


def test_a_replica_that_has_measured_nothing_is_taken_to_be_like_the_others() -> None:
    slow = LoadEstimate(num_requests=1, prefill_tokens=100, step_base_s=0.5, step_token_s=0.1)
    assert policy().choose([Place("slow", slow), Place("new", LoadEstimate())], asking()).id == "new"
    busy = LoadEstimate(num_requests=9, prefill_tokens=9000)
    assert policy().choose([Place("quick"), Place("new", busy)], asking()).id == "quick"
