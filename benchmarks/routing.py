"""Routing policies compared under a virtual clock: prefix cache hits and time to first token for shared-prefix traffic over 4 replicas.

    python -m benchmarks.routing [--rate 24] [--requests 2000] [--seed 1]

Only the duration of a step (base + per token) and the network (none) are simulated. Scheduler, KV blocks, prefix caches, block journal,
prefix index and policies are the server's own; load is reported once a second. Traffic: conversations of several turns, each with one of a
few system prompts; every turn includes all earlier turns. Arrivals are Poisson.
"""

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.block_journal import BlockJournal
from cluster.expected_wait import ExpectedWait, LoadEstimate
from cluster.prefix_index import PrefixIndex
from cluster.routing_policies import LeastLoaded, RoundRobin, RoutingPolicy
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.request import Request, SamplingParams

BASE_S, TOKEN_S = 0.012, 0.00006
"""Seconds per step and per token in it: about a 7B model on one accelerator."""
NUM_REPLICAS = 4
CAPACITY = Capacity(num_blocks=6_000, block_tokens=16, max_context_tokens=16_384)
CONFIG = EngineConfig(max_running=64, max_step_tokens=2048)
REPORT_EVERY_S = 1.0


class Answer:
    """A submitted step; every sampled token is 7."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan

    def result(self) -> StepResult:
        sampled = tuple(SampledTokens(work.sequence, (7,)) for work in self._plan.works if work.samples)
        return StepResult(self._plan.step, sampled, elapsed_s=seconds_of(self._plan))


def seconds_of(plan: StepPlan) -> float:
    return BASE_S + TOKEN_S * plan.num_tokens


class Executor:
    capacity = CAPACITY

    def __init__(self) -> None:
        self.last: StepPlan | None = None

    def submit(self, plan: StepPlan) -> Answer:
        self.last = plan
        return Answer(plan)

    def close(self) -> None:
        pass


@dataclass
class Replica:
    """A real engine whose steps take virtual time, and a front's view of it."""

    id: str
    clock: Callable[[], float]
    busy_until: float = 0.0
    submitted: int = 0
    submitted_tokens: int = 0
    told: LoadEstimate = LoadEstimate()  # noqa: RUF009
    told_at: float = 0.0
    record: None = None

    def __post_init__(self) -> None:
        self.executor, self.journal = Executor(), BlockJournal()
        self.engine = Engine(self.executor, CONFIG, listener=self.journal, clock=self.clock)
        self.index = PrefixIndex(max_blocks=10**6, clock=self.clock)
        self.index.apply(self.journal.snapshot())

    @property
    def load(self) -> int:
        return self.told.num_requests + self.submitted

    @property
    def load_estimate(self) -> LoadEstimate:
        """As `cluster.replica_link.ReplicaLink` has it."""
        done = (self.clock() - self.told_at) / self.told.step_token_s if self.told.step_token_s else 0.0
        return LoadEstimate(
            num_requests=self.load,
            num_running=self.told.num_running,
            prefill_tokens=max(0, self.told.prefill_tokens + self.submitted_tokens - int(done)),
            step_base_s=self.told.step_base_s,
            step_token_s=self.told.step_token_s,
        )

    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        self.index.expect(keys)
        self.submitted_tokens += num_tokens

    def report(self) -> None:
        stats = self.engine.stats
        self.told = LoadEstimate(
            num_requests=stats.num_running + stats.num_waiting,
            num_running=stats.num_running,
            prefill_tokens=stats.prefill_tokens,
            step_base_s=stats.step_base_s,
            step_token_s=stats.step_token_s,
        )
        self.told_at, self.submitted, self.submitted_tokens = self.clock(), 0, 0


@dataclass
class Conversation:
    tokens: list[int]
    turns_left: int


@dataclass
class World:
    """Event loop in virtual time."""

    policy: RoutingPolicy
    random: random.Random
    rate: float
    num_requests: int
    now: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        self.replicas = [Replica(str(number), lambda: self.now) for number in range(NUM_REPLICAS)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._sent: dict[str, float] = {}
        self._talks: dict[str, Conversation] = {}
        self._systems = [[self.random.randrange(1000, 50_000) for _ in range(1500)] for _ in range(12)]
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self) -> None:
        self.at(0.0, self._report)
        self.at(0.0, self._arrive)
        while self._events and len(self.ttft_s) < self.num_requests:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def _report(self) -> None:
        for replica in self.replicas:
            replica.report()
        self.at(self.now + REPORT_EVERY_S, self._report)

    def _arrive(self) -> None:
        """A new conversation."""
        system = self._systems[min(int(self.random.expovariate(0.35)), len(self._systems) - 1)]
        self._ask(Conversation(tokens=[*system], turns_left=self.random.randint(1, 6)))
        self.at(self.now + self.random.expovariate(self.rate), self._arrive)

    def _ask(self, talk: Conversation) -> None:
        talk.tokens += [self.random.randrange(1000, 50_000) for _ in range(self.random.randint(20, 200))]
        name = str(next(self._numbers))
        sampling = SamplingParams(max_tokens=self.random.randint(20, 150))
        request = Request(id=name, prompt=tuple(talk.tokens), sampling=sampling)
        replica = self.policy.choose(self.replicas, request)  # type: ignore[type-var]
        replica.submitted += 1
        self._sent[name], self._talks[name] = self.now, talk
        replica.engine.submit(request)
        if self.now >= replica.busy_until:
            self.at(self.now, lambda: self._turn(replica))
            replica.busy_until = self.now + 1e-9

    def _turn(self, replica: Replica) -> None:
        """Run a step; its events take effect when it ends."""
        replica.executor.last = None
        events = replica.engine.turn()
        if replica.executor.last is None:
            return
        replica.busy_until = self.now + seconds_of(replica.executor.last)

        def end() -> None:
            for event in events:
                self._told(event.request_id, event.offset, event.num_cached, event.finish_reason is not None)
            if (news := replica.journal.changes()) is not None:
                replica.index.apply(news)
            self._turn(replica)

        self.at(replica.busy_until, end)

    def _told(self, name: str, offset: int, num_cached: int, ended: bool) -> None:
        talk = self._talks[name]
        if offset == 0:
            self.ttft_s.append(self.now - self._sent[name])
            self.prompt_tokens += len(talk.tokens)
            self.cached_tokens += num_cached
        talk.tokens.append(7)
        if ended:
            del self._talks[name]
            talk.turns_left -= 1
            if talk.turns_left:
                self.at(self.now + self.random.uniform(1, 8), lambda: self._ask(talk))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=6.0, help="new conversations a second")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    policies: dict[str, RoutingPolicy] = {
        "round_robin": RoundRobin(),
        "least_loaded": LeastLoaded(),
        "expected_wait": ExpectedWait(block_tokens=16, step_tokens=CONFIG.max_step_tokens, session_worth_s=0.0, seed=1),
    }
    print(
        f"{NUM_REPLICAS} replicas, {arguments.rate:g} conversations/s, {arguments.requests} requests, seed {arguments.seed}, virtual clock"
    )
    print(f"{'policy':<16}{'hit rate':>10}{'TTFT mean':>12}{'p50':>10}{'p90':>10}{'p99':>10}  ms")
    for name, policy in policies.items():
        world = World(policy, random.Random(arguments.seed), arguments.rate, arguments.requests)
        world.run()
        times = sorted(world.ttft_s)
        shares = [statistics.fmean(times), *(times[int(share * (len(times) - 1))] for share in (0.5, 0.9, 0.99))]
        figures = f"{shares[0] * 1000:>12.0f}" + "".join(f"{share * 1000:>10.0f}" for share in shares[1:])
        print(f"{name:<16}{world.cached_tokens / world.prompt_tokens:>10.1%}{figures}")


if __name__ == "__main__":
    main()
