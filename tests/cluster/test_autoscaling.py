"""How many replicas there should be: what each measure says, and what becomes of it on a plant with a slow start."""

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling import AutoscalingConfig, Decider, Demand, ReplicaLoad, parse_demand

CONFIG = AutoscalingConfig(scale_down_after_s=60, scale_to_zero_after_s=100)
TOKEN_S = 1e-3


def decider(config: AutoscalingConfig = CONFIG, *, cold_start_s: float = 10.0) -> Decider:
    return Decider(config=config, max_running=10, cold_start_s=cold_start_s)


def load(name: str = "a", **facts: object) -> ReplicaLoad:
    return ReplicaLoad(id=name, **{"step_token_s": TOKEN_S, **facts})  # type: ignore[arg-type]


def once(demand: Demand, *, target: int, most: int = 9) -> int:
    return decider().decide(demand, target=target, now=0.0, least=0, most=most)


def test_the_first_request_that_waits_starts_the_first_replica_at_once() -> None:
    assert once(Demand(num_held=1, held_tokens=5), target=0) == 1
    assert once(Demand(), target=0) == 0


def test_more_requests_than_seats_ask_for_more_replicas() -> None:
    assert once(Demand(replicas=(load(num_running=8),)), target=1) == 1
    assert once(Demand(replicas=(load(num_running=10, num_waiting=20),)), target=1) == 4
    assert once(Demand(num_held=17), target=0) == 3


def test_full_kv_caches_ask_for_more_and_more_so_when_others_wait_for_them() -> None:
    assert once(Demand(replicas=(load(kv_used=0.8, num_running=4),)), target=1) == 1
    assert once(Demand(replicas=(load(kv_used=0.95, num_running=4),)), target=1) == 2
    assert once(Demand(replicas=(load(kv_used=0.95, num_running=4, num_waiting=3),)), target=1) == 2
    assert once(Demand(replicas=(load(kv_used=0.95, num_running=1, num_waiting=2),)), target=1) == 4


def test_a_queue_counts_against_the_time_in_which_another_replica_could_help() -> None:
    queue = Demand(replicas=(load(num_running=1, prefill_tokens=20_000),))  # 20 s of work
    quick, slow = decider(cold_start_s=1.0), decider(cold_start_s=60.0)
    assert quick.decide(queue, target=1, now=0.0, least=0, most=9) == math.ceil(20 / 3)
    assert slow.decide(queue, target=1, now=0.0, least=0, most=9) == 1


def test_late_first_tokens_ask_for_more_only_where_something_waits_and_all_replicas_have_been_there_for_a_while() -> None:
    late = Demand(replicas=(load(num_running=1, num_waiting=1),), ttft_s=3.0)
    assert once(late, target=1) == 2
    assert once(dataclasses.replace(late, replicas=(load(num_running=1),)), target=1) == 1
    assert once(late, target=2) == 2
    assert once(dataclasses.replace(late, ttft_s=1.9), target=1) == 1


loads = st.builds(
    ReplicaLoad,
    id=st.uuids().map(str),
    num_running=st.integers(0, 50),
    num_waiting=st.integers(0, 500),
    prefill_tokens=st.integers(0, 10**6),
    kv_used=st.floats(0, 1),
    computed_tokens=st.integers(0, 10**9),
    step_token_s=st.floats(0, 0.1),
)
demands = st.builds(
    Demand,
    replicas=st.lists(loads, max_size=4).map(tuple),
    num_held=st.integers(0, 99),
    held_tokens=st.integers(0, 10**6),
    ttft_s=st.none() | st.floats(0, 100),
)


@settings(deadline=None)
@given(st.lists(st.tuples(demands, st.floats(0.1, 200)), min_size=1, max_size=20), st.integers(0, 2), st.integers(2, 8))
def test_whatever_comes_the_bounds_are_kept_and_nobody_is_left_without_a_replica(
    history: list[tuple[Demand, float]], least: int, most: int
) -> None:
    decides, target, now = decider(), least, 0.0
    for demand, seconds in history:
        now += seconds
        before, target = target, decides.decide(demand, target=target, now=now, least=least, most=most)
        assert least <= target <= most
        assert target or not demand.num_requests
        assert target or before <= 1  # the last one goes alone
        assert decides.cold_start_s > 0


@settings(deadline=None)
@given(demands, st.integers(1, 50))
def test_more_waiting_never_asks_for_fewer(demand: Demand, more: int) -> None:
    busier = dataclasses.replace(demand, num_held=demand.num_held + more)
    assert once(busier, target=1, most=999) >= once(demand, target=1, most=999)


def test_what_the_directory_says_is_understood() -> None:
    fronts = [
        {"num_held": 2, "held_tokens": 30, "num_asked": 7, "ttft_s": None},
        {"num_held": 1, "held_tokens": 5, "num_asked": 2, "ttft_s": 0.5},
    ]
    replica = {
        "id": "a",
        "num_running": 1,
        "num_waiting": 2,
        "prefill_tokens": 3,
        "kv_used": 0.5,
        "computed_tokens": 9,
        "step_token_s": 0.1,
    }
    assert parse_demand({"replicas": [replica], "fronts": fronts}) == Demand(
        replicas=(ReplicaLoad(**replica),),  # type: ignore[arg-type]
        num_held=3,
        held_tokens=35,
        num_asked=9,
        ttft_s=0.5,
    )


class Plant:
    """Replicas that take ``cold_start_s`` to start, and work off prompts of arriving requests; a clock of its own."""

    def __init__(self, arrivals: Callable[[float], float], *, cold_start_s: float, decides: Decider) -> None:
        self.arrivals, self.cold_start_s, self.decides = arrivals, cold_start_s, decides
        self.now, self.target, self.queue_s = 0.0, 0, 0.0
        self.num_asked = 0
        self.ready_at: list[float] = []
        self.computed: list[float] = []
        """Of each replica, tokens."""
        self.targets: list[int] = []

    def run(self, seconds: float, *, step_s: float = 0.5) -> None:
        """``arrivals(now)``: seconds of a replica's work that come in a second."""
        for _ in range(int(seconds / step_s)):
            self.now += step_s
            ready = sum(at <= self.now for at in self.ready_at)
            self.queue_s += self.arrivals(self.now) * step_s
            self.num_asked += self.arrivals(self.now) > 0
            done = min(self.queue_s, ready * step_s)
            self.queue_s -= done
            for number in range(ready):
                self.computed[number] += done / ready / TOKEN_S
            self._decide(ready)
            self.targets.append(self.target)

    def _decide(self, ready: int) -> None:
        tokens = int(self.queue_s / TOKEN_S)
        each = [
            load(f"{number} of {at}", prefill_tokens=tokens // ready, num_running=bool(tokens), computed_tokens=int(computed))
            for number, (at, computed) in enumerate(zip(self.ready_at[:ready], self.computed[:ready], strict=True))
        ]
        demand = Demand(
            replicas=tuple(each), num_held=0 if ready else bool(tokens), held_tokens=0 if ready else tokens, num_asked=self.num_asked
        )
        before, self.target = self.target, self.decides.decide(demand, target=self.target, now=self.now, least=0, most=9)
        self.ready_at += [self.now + self.cold_start_s] * max(self.target - before, 0)
        self.computed += [0.0] * max(self.target - before, 0)
        del self.ready_at[self.target :], self.computed[self.target :]


@pytest.mark.parametrize("cold_start_s", [2.0, 20.0, 120.0])
@pytest.mark.parametrize("work", [0.3, 1.2, 3.0])
def test_steady_work_gets_enough_replicas_and_they_stay(work: float, cold_start_s: float) -> None:
    plant = Plant(lambda _now: work, cold_start_s=cold_start_s, decides=decider(cold_start_s=cold_start_s))
    plant.run(700, step_s=1.0)
    plant.targets.clear()
    plant.run(400, step_s=1.0)
    assert plant.queue_s <= work
    assert len(set(plant.targets)) == 1
    assert work <= plant.targets[0] <= math.ceil(work / 0.8 * 1.25)


def test_a_short_burst_does_not_order_replicas_that_would_come_when_it_is_over() -> None:
    plant = Plant(lambda now: 0.4 if now < 60 else 6.0 if now < 63 else 0.4, cold_start_s=90.0, decides=decider(cold_start_s=90.0))
    plant.run(400)
    assert max(plant.targets) <= 2


def test_what_piles_up_during_a_cold_start_from_zero_does_not_ask_for_ever_more() -> None:
    plant = Plant(lambda _now: 0.5, cold_start_s=60.0, decides=decider(cold_start_s=60.0))
    plant.run(300)
    assert max(plant.targets) <= 2


def test_replicas_go_one_after_the_other_to_none_when_nobody_asks_and_come_back_for_the_next() -> None:
    plant = Plant(lambda now: 2.5 if now < 300 else 0.0 if now < 900 else 0.1, cold_start_s=5.0, decides=decider(cold_start_s=5.0))
    plant.run(300)
    assert plant.target >= 3
    plant.run(55)
    assert plant.target >= 3  # not before scale_down_after_s
    plant.run(40)
    assert plant.target == 1
    plant.run(490)
    assert plant.target == 0
    plant.run(20)
    assert plant.target == 1


def test_the_time_that_a_start_takes_is_learnt() -> None:
    plant = Plant(lambda _now: 0.3, cold_start_s=42.0, decides=decider(cold_start_s=5.0))
    plant.run(60)
    assert plant.decides.cold_start_s == pytest.approx(42.0, abs=1.5)
