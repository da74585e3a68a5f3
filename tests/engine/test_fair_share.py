"""Tenants get what their shares say, whoever asks for how much."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.executor import Capacity
from engine.fair_share import MAX_OVERFULL, OUTPUT_COST, FairShare
from engine.plan import Sampled, StepResult
from engine.policy import FirstCome
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.engine.greedy_key import modest_p99_s

CAPACITY = Capacity(num_blocks=64, block_tokens=4, max_context_tokens=128)


def request(tenant: str, index: int, *, prompt: int = 8, output: int = 4, share: float = 1.0, priority: int = 0) -> Request:
    return Request(
        id=f"{tenant}{index}",
        prompt=tuple(range(prompt)),
        sampling=SamplingParams(max_tokens=output),
        tenant=tenant,
        share=share,
        priority=priority,
    )


def waiting(*requests: Request) -> list[Sequence]:
    return [Sequence(one, arrival) for arrival, one in enumerate(requests)]


def step(scheduler: Scheduler) -> list[str]:
    """Plan and answer one step; the ids that were opened by it."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.apply(plan, StepResult(plan.step, tuple(Sampled(work.sequence, (7,)) for work in plan.works if work.samples)))
    return [opening.request_id for opening in plan.opened]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_tenants_that_always_want_more_are_served_in_proportion_to_their_shares(seed: int) -> None:
    """The bound of the paper (theorem 4.4): twice the most that can be under way at once."""
    draw = random.Random(seed)
    shares = {tenant: draw.choice([1.0, 2.0, 5.0]) for tenant in "abc"[: draw.randint(2, 3)]}
    config = EngineConfig(block_tokens=4, max_step_tokens=64, max_running=8, prefix_cache=False)
    policy = FairShare()
    scheduler, made = Scheduler(config, CAPACITY, policy=policy), 0
    most = 0.0
    for _ in range(300):
        for tenant, share in shares.items():
            while sum(one.request.tenant == tenant for one in scheduler._books.admission.waiting) < 10:
                made += 1
                prompt, output = draw.randint(1, 40), draw.randint(1, 20)
                most = max(most, (prompt + OUTPUT_COST * output) / share)
                scheduler.add(request(tenant, made, prompt=prompt, output=output, share=share))
        step(scheduler)
        served = [policy.served(tenant) for tenant in shares]
        assert max(served) - min(served) <= 2 * config.max_running * most


def test_a_tenant_of_twice_the_share_gets_twice_the_tokens() -> None:
    config = EngineConfig(block_tokens=4, max_step_tokens=64, max_running=4, prefix_cache=False)
    scheduler, opened = Scheduler(config, CAPACITY, policy=FairShare()), []
    for index in range(300):
        scheduler.add(request("big", index, share=2.0))
        scheduler.add(request("small", index))
    while len(opened) < 300:
        opened += step(scheduler)
    assert 190 <= sum(one.startswith("big") for one in opened[:300]) <= 210


def test_an_admission_counts_before_the_next_is_chosen() -> None:
    policy = FairShare()
    queue = waiting(*(request("greedy", index) for index in range(3)), request("modest", 0))
    chosen = []
    for sequence in policy.order(queue):
        chosen.append(sequence.request.id)
        policy.opened(sequence)
    assert chosen == ["greedy0", "modest0", "greedy1", "greedy2"]


def test_within_a_tenant_priority_goes_before_arrival() -> None:
    queue = waiting(request("a", 0), request("a", 1, priority=-1), request("a", 2, priority=1), request("a", 3))
    assert [one.request.id for one in FairShare().order(queue)] == ["a1", "a0", "a3", "a2"]


def test_a_priority_does_not_reach_over_to_other_tenants() -> None:
    policy = FairShare()
    policy.sampled(request("loud", 9), 5)
    queue = waiting(request("loud", 0, priority=-1000), request("quiet", 0))
    assert next(iter(policy.order(queue))).request.id == "quiet0"


def test_one_tenant_alone_is_served_first_come() -> None:
    queue = waiting(*(request("", index, priority=index % 3) for index in range(9)))
    fixed = sorted(queue, key=FirstCome().rank)
    assert list(FairShare().order(queue)) == fixed


def test_nobody_saves_up_while_away() -> None:
    policy = FairShare()
    busy, back = waiting(request("busy", 0), request("back", 0))
    policy.arrived(busy, [])
    policy.sampled(busy.request, 1000)
    policy.arrived(back, [busy])
    assert policy.served("back") == policy.served("busy")


def test_nobody_saves_up_while_the_queue_is_empty_either() -> None:
    policy = FairShare()
    busy, back = waiting(request("busy", 0), request("back", 0))
    policy.arrived(busy, [])
    policy.opened(busy)
    policy.sampled(busy.request, 1000)
    policy.arrived(back, [])
    assert policy.served("back") == policy.served("busy")


def test_a_full_queue_keeps_a_place_for_whoever_has_less_than_its_part() -> None:
    policy, limit = FairShare(), 4
    queue = waiting(*(request("greedy", index) for index in range(limit)))
    assert not policy.may_wait(request("greedy", 9), queue, limit)
    assert policy.may_wait(request("modest", 0), queue, limit)
    queue += waiting(request("modest", 0), request("modest", 1))
    assert not policy.may_wait(request("modest", 2), queue, limit)


def test_a_queue_grows_over_its_limit_only_so_far() -> None:
    policy, limit = FairShare(), 4
    queue = waiting(*(request(str(index), 0) for index in range(MAX_OVERFULL * limit)))
    assert not policy.may_wait(request("new", 0), queue, limit)


def test_counters_of_tenants_that_are_long_gone_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr("engine.fair_share.MAX_COUNTERS", 10)
    policy = FairShare()
    for index in range(100):
        (one,) = waiting(request(f"tenant{index}", 0))
        policy.arrived(one, [])
        policy.opened(one)
    assert len(policy._served) <= 12


def test_a_greedy_key_waits_for_itself() -> None:
    """In virtual time: the figures are the same on every machine."""
    assert modest_p99_s(FirstCome(), 10.0, until_s=8.0) > 5 * modest_p99_s(FairShare(), 10.0, until_s=8.0)


@pytest.mark.slow
def test_a_greedy_key_at_ten_times_its_share_hardly_delays_the_first_tokens_of_another() -> None:
    """`python -m tests.engine.greedy_key` prints more of these."""
    fair = modest_p99_s(FairShare(), 1.0, until_s=40.0)
    assert modest_p99_s(FairShare(), 10.0, until_s=40.0) <= 1.5 * fair
