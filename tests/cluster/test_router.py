import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import ChannelError, NoReplicaReady, ReplicaLost
from cluster.router import QUEUE_FULL_S, Router
from cluster.routing_policies import LeastLoaded, RoundRobin, RoutingPolicy
from engine.errors import DeadlineExceeded, PoisonedRequest
from engine.plan import TokenEvent
from engine.request import Request, SamplingParams
from tests.cluster.fakes import FakeLink, FakeReplicas, answer, eventually, record

REQUEST = Request(id="r", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=8))


@asynccontextmanager
async def routed(*links: FakeLink, policy: RoutingPolicy | None = None, ready_wait_s: float = 5.0, **config: int) -> AsyncIterator[Router]:
    by_id = {link.id: link for link in links}
    router = Router(
        replicas=FakeReplicas(*(link.record for link in links)),
        connect=lambda record: by_id[record.id],
        policy=policy or RoundRobin(),
        config=RouterConfig(ready_wait_s=ready_wait_s, **config),
    )
    await router.update_links(tuple(link.record for link in links))
    try:
        yield router
    finally:
        await router.close()


async def collect(router: Router, request: Request = REQUEST) -> list[TokenEvent]:
    async with aclosing(router.stream(request)) as events:
        return [event async for event in events]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


async def test_an_undisturbed_stream_is_passed_on_as_it_is() -> None:
    async with routed(FakeLink(record("a"))) as router:
        events = await collect(router)
    assert tokens_of(events) == answer(REQUEST)
    assert [event.finish_reason for event in events] == [None] * 7 + ["length"]
    assert router.resumes.counts.resumes.total() == 0


@pytest.mark.parametrize("lost_at", range(8))
async def test_a_lost_replica_is_replaced_without_a_gap_or_a_repeat(lost_at: int) -> None:
    first, second = FakeLink(record("a"), lost_at=[lost_at], num_cached=16), FakeLink(record("b"), num_cached=0)
    async with routed(first, second) as router:
        events = await collect(router)
    assert tokens_of(events) == answer(REQUEST)
    assert [event.offset for event in events] == list(range(8))
    (resumed,) = second.seen
    assert resumed.attempt == 1
    assert resumed.committed == tuple(answer(REQUEST)[:lost_at])
    assert len({event.num_cached for event in events}) == 1
    assert router.resumes.counts.resumes.total() == 1


async def test_the_same_replica_may_go_on_once_it_is_back() -> None:
    link = FakeLink(record("a"), lost_at=[3], stays=False)
    async with routed(link) as router:
        running = asyncio.create_task(collect(router))
        await eventually(lambda: not link.ready)
        link.ready = True
        assert tokens_of(await running) == answer(REQUEST)
    assert [request.attempt for request in link.seen] == [0, 1]


@given(lost_at=st.integers(0, 7), begin=st.integers(0, 4))
@settings(deadline=None, max_examples=30)
def test_a_request_that_brings_committed_tokens_goes_on_behind_them(lost_at: int, begin: int) -> None:
    whole = answer(REQUEST)
    request = Request(id="r", prompt=(1, 2, 3), committed=tuple(whole[:begin]), attempt=4, sampling=SamplingParams(max_tokens=8))

    async def run() -> list[TokenEvent]:
        async with routed(FakeLink(record("a"), lost_at=[lost_at]), FakeLink(record("b"))) as router:
            return await collect(router, request)

    assert tokens_of(asyncio.run(run())) == whole[begin:]


async def test_a_request_present_at_two_deaths_is_not_tried_again() -> None:
    links = [FakeLink(record(name), lost_at=[2]) for name in "abc"]
    async with routed(*links) as router:
        with pytest.raises(PoisonedRequest):
            await collect(router)
    assert sum(len(link.seen) for link in links) == 2


async def test_an_engine_that_is_stopped_in_good_order_is_no_death_but_counts_as_an_attempt() -> None:
    links = [FakeLink(record(name), error_at={position: "EngineStopped"}) for name, position in (("a", 1), ("b", 1), ("c", 1), ("d", 1))]
    async with routed(*links) as router:
        with pytest.raises(ReplicaLost, match="3 times"):
            await collect(router)
    two = [FakeLink(record(name), error_at={position: "EngineStopped"}) for name, position in (("a", 1), ("b", 2))]
    async with routed(*two, FakeLink(record("c"))) as router:
        assert tokens_of(await collect(router)) == answer(REQUEST)


async def test_events_of_another_attempt_are_dropped() -> None:
    late = TokenEvent("r", 0, 0, 0, (666,))
    first, second = FakeLink(record("a"), lost_at=[2]), FakeLink(record("b"), wrong={4: late})
    async with routed(first, second) as router:
        assert tokens_of(await collect(router)) == answer(REQUEST)


@pytest.mark.parametrize("offset", [2, 4])
async def test_a_repeat_or_a_gap_in_the_offsets_never_reaches_the_client(offset: int) -> None:
    bad = TokenEvent("r", 0, 0, offset, (666,))
    first, second = FakeLink(record("a"), wrong={3: bad}), FakeLink(record("b"))
    async with routed(first, second) as router:
        assert tokens_of(await collect(router)) == answer(REQUEST)
    assert first.cancelled
    assert second.seen[0].committed == tuple(answer(REQUEST)[:3])


async def test_an_error_of_the_request_itself_is_passed_on_and_not_tried_elsewhere() -> None:
    first, second = FakeLink(record("a"), error_at={2: "GrammarFailed"}), FakeLink(record("b"))
    async with routed(first, second) as router:
        events = await collect(router)
    assert (events[-1].finish_reason, events[-1].error_kind) == ("error", "GrammarFailed")
    assert not second.seen


async def test_logits_that_are_no_numbers_are_the_replicas_fault_until_another_has_none_either() -> None:
    first, second = FakeLink(record("a"), error_at={2: "InvalidLogits"}), FakeLink(record("b"))
    async with routed(first, second) as router:
        assert tokens_of(await collect(router)) == answer(REQUEST)
    assert router.resumes.counts.resumes["invalid_logits"] == 1
    three = [FakeLink(record(name), error_at={2: "InvalidLogits"}) for name in ("a", "b", "c")]
    async with routed(*three) as router:
        events = await collect(router)
    assert (events[-1].finish_reason, events[-1].error_kind) == ("error", "InvalidLogits")
    assert sum(len(link.seen) for link in three) == 2


async def test_closing_the_stream_cancels_the_choice_at_its_replica() -> None:
    link = FakeLink(record("a"))
    async with routed(link) as router, aclosing(router.stream(REQUEST)) as events:
        async for _ in events:
            break
    assert [request.id for request in link.cancelled] == ["r"]


async def test_without_a_ready_replica_a_request_waits_and_then_is_refused() -> None:
    link = FakeLink(record("a"), ready=False)
    async with routed(link, ready_wait_s=0.2) as router:
        assert not router.ready()
        begun = time.monotonic()
        with pytest.raises(NoReplicaReady):
            await collect(router)
        assert time.monotonic() - begun > 0.15
    assert not link.seen


async def test_a_request_does_not_wait_for_a_replica_beyond_its_own_deadline() -> None:
    async with routed(FakeLink(record("a"), ready=False), ready_wait_s=30.0) as router:
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="before a replica became ready"):
            await collect(router, Request(id="r", prompt=(1,), deadline_s=time.time() + 0.2))
        assert time.monotonic() - begun < 20, "it would have waited for 30"


async def test_a_request_whose_deadline_is_later_than_a_front_waits_is_told_that_no_replica_is_ready() -> None:
    async with routed(FakeLink(record("a"), ready=False), ready_wait_s=0.1) as router:
        with pytest.raises(NoReplicaReady):
            await collect(router, Request(id="r", prompt=(1,), deadline_s=time.time() + 600))


async def test_the_least_loaded_replica_is_chosen_and_equals_take_turns() -> None:
    links = [FakeLink(record("a"), load=3), FakeLink(record("b"), load=1), FakeLink(record("c"), load=1)]
    policy = LeastLoaded()
    assert Counter(policy.choose(links, REQUEST).id for _ in range(10)) == {"b": 5, "c": 5}


async def test_a_lost_link_is_made_anew_and_a_forgotten_one_is_kept_while_it_lives() -> None:
    made: list[FakeLink] = []

    def connect(record: object) -> FakeLink:
        made.append(FakeLink(record))  # type: ignore[arg-type]
        return made[-1]

    router = Router(replicas=FakeReplicas(), connect=connect)  # type: ignore[arg-type]
    await router.update_links((record("a"),))
    made[0].lost = True
    await router.update_links((record("a"),))
    assert made[0].closed
    assert len(made) == 2
    await router.update_links(())
    assert router.ready()
    await router.close()
    assert made[1].closed


async def test_a_replica_that_cannot_be_reached_keeps_no_other_from_being_linked(caplog: pytest.LogCaptureFixture) -> None:
    reachable = False

    def connect(record: ReplicaRecord) -> FakeLink:
        if record.id == "a" and not reachable:
            raise ChannelError("it does not listen for other hosts")
        return FakeLink(record)

    router = Router(replicas=FakeReplicas(), connect=connect)
    for _ in range(3):
        await router.update_links((record("a"), record("b")))
    assert set(router._links) == {"b"}
    assert len(caplog.messages) == 1, "said once, not at every try"
    reachable = True
    await router.update_links((record("a"), record("b")))
    assert set(router._links) == {"a", "b"}
    await router.close()


async def test_a_tenant_that_found_no_place_anywhere_is_refused_unasked_for_a_moment() -> None:
    links = [FakeLink(record(name), error_at={0: "QueueFull"}) for name in "ab"]
    async with routed(*links, policy=RoundRobin()) as router:
        now = 100.0
        router._clock = lambda: now
        greedy = dataclasses.replace(REQUEST, tenant="greedy")
        await collect(router, greedy)
        assert router.recent_refusal("greedy") is None, "the other replica may have a place"
        await collect(router, greedy)
        refused = router.recent_refusal("greedy")
        assert refused is not None
        assert refused.error_kind == "QueueFull"
        assert router.recent_refusal("another") is None
        now += QUEUE_FULL_S
        assert router.recent_refusal("greedy") is None
        assert not router._queue_full
