"""What a front decides after a loss: whether a stream may go on, and what of it is counted."""

import dataclasses

import pytest

from cluster.config import RouterConfig
from cluster.errors import HostLost, ReplicaLost, ResumesExhausted
from cluster.health import StepStallDetector
from cluster.replica_link import LinkLost
from cluster.resume import MAX_QUARANTINED, Quarantine, ResumeBudget, ResumePolicy
from engine.errors import PoisonedRequest
from engine.plan import TokenEvent
from engine.request import Request
from tests.cluster.fakes import FakeLink, answer, record
from tests.cluster.test_router import REQUEST, collect, routed, tokens_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def death(replica: str) -> LinkLost:
    return LinkLost(replica, "killed", reason="disconnected", died=True)


def stall(replica: str) -> LinkLost:
    return LinkLost(replica, "no token", reason="stalled")


def resumes_of(**config: float) -> tuple[ResumePolicy, Clock]:
    clock = Clock()
    return ResumePolicy(RouterConfig(**config), clock), clock  # type: ignore[arg-type]


def test_what_was_poison_once_is_refused_under_another_id_and_seed_until_the_time_is_over() -> None:
    resumes, clock = resumes_of(quarantine_s=60)
    history = resumes.admit(REQUEST)
    resumes.allow(history, death("a"), 2)
    with pytest.raises(PoisonedRequest):
        resumes.allow(history, death("b"), 3)
    again = dataclasses.replace(REQUEST, id="other", sampling=dataclasses.replace(REQUEST.sampling, seed=5))
    with pytest.raises(PoisonedRequest):
        resumes.admit(again)
    resumes.admit(dataclasses.replace(REQUEST, prompt=(1, 2, 4)))
    resumes.admit(dataclasses.replace(REQUEST, salt="another tenant's"))
    resumes.admit(dataclasses.replace(REQUEST, sampling=dataclasses.replace(REQUEST.sampling, max_tokens=9)))
    clock.now = 61
    resumes.admit(again)
    assert resumes.counts.refused == {"poisoned": 1, "quarantined": 1}
    assert resumes.counts.resumes == {"disconnected": 1}
    assert resumes.counts.tokens_replayed == 2


async def test_a_doubt_takes_no_attempt_and_nothing_of_the_budget_and_the_true_error_is_told() -> None:
    links = [FakeLink(record(name), error_at={2: "InvalidLogits"}) for name in ("a", "b")]
    async with routed(*links, max_attempts=1, max_resumes=1) as router:
        events = await collect(router)
        resumes = router.resumes
    assert (events[-1].finish_reason, events[-1].error_kind) == ("error", "InvalidLogits")
    assert resumes.counts.resumes == {"invalid_logits": 1}
    resumes.allow(resumes.admit(REQUEST), stall("a"), 1)


async def test_a_request_that_an_engine_calls_poison_is_in_quarantine_for_all_replicas() -> None:
    first, second = FakeLink(record("a"), error_at={1: "PoisonedRequest"}), FakeLink(record("b"))
    async with routed(first, second) as router:
        assert (await collect(router))[-1].error_kind == "PoisonedRequest"
        with pytest.raises(PoisonedRequest):
            await collect(router, dataclasses.replace(REQUEST, id="again"))
    assert not second.seen


def test_quarantine_is_bounded() -> None:
    quarantine = Quarantine(seconds=60, clock=Clock())
    requests = [Request(id="r", prompt=(number,)) for number in range(MAX_QUARANTINED + 1)]
    for request in requests:
        quarantine.add(request)
    assert len(quarantine) == MAX_QUARANTINED
    assert requests[0] not in quarantine
    assert requests[-1] in quarantine


def test_a_request_that_only_waited_where_ranks_were_lost_is_not_blamed() -> None:
    """Those that were tried there alone, one by one, are told; see `engine.isolation`."""
    resumes, _ = resumes_of(max_attempts=9)
    history = resumes.admit(REQUEST)
    for replica_id in "ababab":
        resumes.allow(history, LinkLost(replica_id, "its ranks are started anew", reason="ranks_lost"), 0)
    resumes.admit(dataclasses.replace(REQUEST, id="again"))


def test_a_request_whose_replicas_lose_their_ranks_again_and_again_over_it_is_poison() -> None:
    resumes, _ = resumes_of(max_attempts=9)
    history = resumes.admit(REQUEST)
    for losses, replica_id in enumerate("ab", start=1):
        history.record_engine_losses(losses)
        resumes.allow(history, LinkLost(replica_id, "its ranks are started anew", reason="ranks_lost"), 0)
    history.record_engine_losses(3)
    with pytest.raises(PoisonedRequest):
        resumes.allow(history, LinkLost("a", "its ranks are started anew", reason="ranks_lost"), 0)
    with pytest.raises(PoisonedRequest):
        resumes.admit(dataclasses.replace(REQUEST, id="again"))


def test_a_request_that_got_no_token_and_was_at_two_losses_of_ranks_is_not_told_to_try_again() -> None:
    resumes, _ = resumes_of(max_attempts=3)
    history = resumes.admit(REQUEST)
    history.record_engine_losses(1)
    resumes.allow(history, LinkLost("a", "its ranks are started anew", reason="ranks_lost"), 0)
    resumes.allow(history, stall("b"), 0)
    history.record_engine_losses(2)
    with pytest.raises(PoisonedRequest):
        resumes.allow(history, LinkLost("b", "its ranks are started anew", reason="ranks_lost"), 0)


def test_losses_of_workers_and_of_replicas_add_up() -> None:
    resumes, _ = resumes_of(max_attempts=9)
    history = resumes.admit(REQUEST)
    history.record_engine_losses(1)
    resumes.allow(history, stall("a"), 0)
    history.record_engine_losses(2)
    with pytest.raises(PoisonedRequest):
        resumes.allow(history, death("b"), 0)


async def test_an_engines_count_of_losses_travels_with_the_request() -> None:
    told = TokenEvent("r", 0, 0, 2, losses=1)
    first, second = FakeLink(record("a"), wrong={2: told}, lost_at=[3]), FakeLink(record("b"))
    async with routed(first, second) as router:
        events = await collect(router)
    assert tokens_of(events) == answer(REQUEST)
    assert second.seen[0].losses == 2
    assert all(event.tokens for event in events), "what is only news of a loss is not passed on"


def test_stalls_use_up_attempts_and_are_no_deaths() -> None:
    resumes, _ = resumes_of(max_attempts=3)
    history = resumes.admit(REQUEST)
    for replica in "ab":
        resumes.allow(history, stall(replica), 0)
    with pytest.raises(ReplicaLost, match="3 times"):
        resumes.allow(history, stall("a"), 0)
    assert (history.deaths, resumes.counts.refused) == (0, {"attempts": 1})
    resumes.admit(REQUEST)


def test_an_attempt_that_gave_tokens_uses_none_up() -> None:
    """A stream whose messages are lost again and again comes to its end, as each attempt brings it nearer."""
    resumes, _ = resumes_of(max_attempts=2)
    history = resumes.admit(dataclasses.replace(REQUEST, committed=(5, 6)))
    for num_committed in (3, 4, 4, 9, 9):
        resumes.allow(history, stall("a"), num_committed)
    with pytest.raises(ReplicaLost, match="2 times"):
        resumes.allow(history, stall("a"), 9)


def test_a_cluster_that_falls_apart_is_given_no_more_than_its_budget() -> None:
    resumes, clock = resumes_of(max_resumes=2, resume_window_s=10)
    for number in range(2):
        resumes.allow(resumes.admit(dataclasses.replace(REQUEST, id=str(number))), stall("a"), 0)
    with pytest.raises(ResumesExhausted) as refused:
        resumes.allow(resumes.admit(REQUEST), stall("a"), 0)
    assert refused.value.retry_after_s > 0
    clock.now = 10
    resumes.allow(resumes.admit(REQUEST), stall("a"), 0)
    assert resumes.counts.refused == {"budget": 1}


def test_a_budget_comes_back_as_its_window_moves_on() -> None:
    clock = Clock()
    budget = ResumeBudget(resumes=1, window_s=10, clock=clock)
    assert [budget.take(), budget.take()] == [True, False]
    clock.now = 9.9
    assert not budget.take()
    clock.now = 10
    assert budget.take()


def test_the_counters_have_names_and_labels_for_a_metrics_page() -> None:
    resumes, _ = resumes_of()
    resumes.allow(resumes.admit(REQUEST), stall("a"), 5)
    resumes.record_poisoned(REQUEST)
    assert [(sample.name, sample.labels, sample.value) for sample in resumes.counts.samples()] == [
        ("resumes_total", (("reason", "stalled"),), 1),
        ("resume_refused_total", (("reason", "poisoned"),), 1),
        ("tokens_replayed_total", (), 5),
    ]


async def test_a_replica_that_has_just_lost_a_request_gets_it_again_only_if_there_is_no_other() -> None:
    flaky, steady = FakeLink(record("a"), lost_at=[1, 2]), FakeLink(record("b"), lost_at=[])
    async with routed(flaky, steady) as router:
        assert tokens_of(await collect(router)) == answer(REQUEST)
        assert (len(flaky.seen), len(steady.seen)) == (1, 1)


async def test_streams_leave_a_replica_without_ranks_only_where_another_is_ready() -> None:
    without, other = FakeLink(record("a"), ready=False, ranks_lost=True), FakeLink(record("b"), ready=False)
    async with routed(without, other) as router:
        router._release_lost_ranks()
        assert without.released == 0
        other.ready = True
        router._release_lost_ranks()
        assert (without.released, other.released) == (1, 0)


async def test_streams_leave_a_replica_that_lost_a_host_at_once_and_are_told_its_name_if_there_is_no_other() -> None:
    link = FakeLink(record("a"), ready=False, ranks_lost=True, lost_host="gpu-7")
    async with routed(link) as router:
        router._release_lost_ranks()
        assert link.released == 1
    flaky = FakeLink(record("a"), lost_at=[1], lost_host="gpu-7", stays=False)
    async with routed(flaky, ready_wait_s=0.2) as router:
        with pytest.raises(HostLost, match="host gpu-7,"):
            await collect(router)


def test_an_engine_at_work_is_doubted_after_a_time_that_fits_its_steps() -> None:
    clock = Clock()
    watch = StepStallDetector(6.0, clock=clock)
    assert watch.stalled_s(1, 0.1) is None
    clock.now = 6.1
    assert watch.stalled_s(1, 0.1) == pytest.approx(6.1)
    assert watch.stalled_s(1, 2.0) is None, "its steps take 2 s, so 6.1 s are no sign"
    assert watch.stalled_s(2, 0.1) is None
    clock.now = 20
    watch.reset()
    clock.now = 25
    assert watch.stalled_s(2, 0.1) is None, "it had nothing to do"
