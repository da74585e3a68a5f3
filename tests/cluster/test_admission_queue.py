"""Requests that no replica is ready for: bounded, cancelled cleanly, told how long they waited, and known to the autoscaler."""

import asyncio
import time
from contextlib import aclosing

import pytest

from cluster.admission_queue import AdmissionQueue
from cluster.autoscaling import parse_demand
from cluster.directory import DEMAND, Register
from cluster.errors import NoReplicaReady
from cluster.health import State
from cluster.router import Router
from engine.errors import DeadlineExceeded
from engine.request import Request, SamplingParams
from engine.stats import EngineStats
from tests.cluster.fakes import FakeLink, FakeReplicas, answer, eventually, record


def asking(name: str = "r", **more: object) -> Request:
    return Request(id=name, prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=4), **more)  # type: ignore[arg-type]


def router_with(queue: AdmissionQueue, *links: FakeLink) -> Router:
    by_id = {link.id: link for link in links}
    return Router(replicas=FakeReplicas(*(link.record for link in links)), connect=lambda record: by_id[record.id], admission_queue=queue)


async def collect(router: Router, request: Request) -> list[object]:
    async with aclosing(router.stream(request)) as events:
        return [event async for event in events]


async def test_whoever_waits_is_answered_by_the_first_replica_and_told_how_long_it_took() -> None:
    queue, link = AdmissionQueue(wait_s=30, can_scale_from_zero=True), FakeLink(record("a"))
    router = router_with(queue, link)
    assert router.ready()
    waiting = [asyncio.create_task(collect(router, asking(name))) for name in "xyz"]
    await eventually(lambda: queue.num_held == 3)
    assert queue.demand() == {"num_held": 3, "held_tokens": 9, "num_asked": 3, "ttft_s": None}
    await router.update_links((link.record,))
    answers = await asyncio.gather(*waiting)
    assert [event.held_s > 0 for events in answers for event in events] == 3 * [True, False, False, False]
    assert [[token for event in events for token in event.tokens] for events in answers] == 3 * [answer(asking())]
    note = queue.demand()
    assert (note["num_held"], note["held_tokens"]) == (0, 0)
    assert 0 <= note["ttft_s"] < 30
    await router.close()


async def test_more_than_may_wait_are_refused_at_once_and_told_when_to_come_back() -> None:
    now = 0.0
    queue = AdmissionQueue(wait_s=30, max_held=1, can_scale_from_zero=True, clock=lambda: now)
    with queue.hold(asking("a")):
        now = 17.4
    with queue.hold(asking("b")), pytest.raises(NoReplicaReady) as refused, queue.hold(asking("c")):
        raise AssertionError("the request was not refused")
    assert refused.value.retry_after_s == 17
    assert queue.num_held == 0


async def test_a_client_that_leaves_and_a_deadline_that_passes_give_their_seats_back() -> None:
    queue = AdmissionQueue(wait_s=30, can_scale_from_zero=True)
    router = router_with(queue)
    leaving = asyncio.create_task(collect(router, asking("leaves")))
    late = asyncio.create_task(collect(router, asking("late", deadline_s=time.time() + 0.2)))
    await eventually(lambda: queue.num_held == 2)
    leaving.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    assert (queue.num_held, queue.demand()["held_tokens"]) == (0, 0)


@pytest.mark.parametrize(("state", "ready"), [(None, True), (State.STARTING, True), (State.RECOVERING, False), (State.FAILED, False)])
def test_zero_replicas_are_ready_where_one_is_started_for_whoever_asks_but_a_broken_one_is_not(state: State | None, ready: bool) -> None:
    link = FakeLink(record("a"), ready=False)
    object.__setattr__(link.record, "state", state)
    router = router_with(AdmissionQueue(wait_s=30, can_scale_from_zero=True), *([link] if state else []))
    assert router.ready() == ready
    assert not router_with(AdmissionQueue(wait_s=30)).ready()


def test_the_directory_says_for_each_model_what_there_is_to_do() -> None:
    register = Register()
    stats = EngineStats(num_running=2, num_waiting=1, prefill_tokens=50, computed_tokens=7, step_token_s=0.25)
    for name, model, state in (("a", "m", State.READY), ("b", "m", State.DRAINING), ("c", "other", State.READY)):
        report = record(name)
        for field, value in (("model", model), ("state", state), ("stats", stats)):
            object.__setattr__(report, field, value)
        register.report(report)
    for front, held in (("f1", 3), ("f2", 4)):
        register.pin(DEMAND, front, {"m": {"num_held": held, "held_tokens": held * 10, "num_asked": 9, "ttft_s": held / 10}})
    demand = parse_demand(register.demand("m"))
    assert [(replica.id, replica.num_requests, replica.prefill_tokens) for replica in demand.replicas] == [("a", 3, 50)]
    assert (demand.num_held, demand.held_tokens, demand.num_asked, demand.ttft_s) == (7, 70, 18, 0.4)
    assert parse_demand(register.demand("other")).num_held == 0
