"""One greedy key beside a modest one, in virtual time: what the modest one waits for its first token.

    python -m tests.engine.greedy_key

The scheduler is the real one; a step takes as long as a linear model of a GPU says, and no clock is read.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.errors import QueueFull
from engine.executor import Capacity
from engine.fair_share import FairShare
from engine.plan import SampledTokens, StepResult
from engine.policy import FirstComeFirstServed, Policy
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler

STEP_S, TOKEN_S = 0.020, 0.00002
"""A step without tokens, and each token more: about a 7B model on one accelerator."""
CONFIG = EngineConfig(block_tokens=16, max_step_tokens=1024, max_running=64, max_waiting=1024, prefix_cache=False)
CAPACITY = Capacity(num_blocks=4096, block_tokens=16, max_context_tokens=4096)
MEAN_PROMPT, MEAN_OUTPUT = 512, 96
WORDS = tuple(range(2 * MEAN_PROMPT))
"""Their values do not matter: the prefix cache is off."""
SHARE_PER_S = 0.5 * CONFIG.max_running / (MEAN_OUTPUT * (STEP_S + CONFIG.max_running * (1 + MEAN_PROMPT / MEAN_OUTPUT) * TOKEN_S))
"""Requests a second that are half of what the engine can serve."""


@dataclass
class Outcome:
    first_token_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


def arrivals(tenant: str, per_s: float, until_s: float, seed: int) -> Iterator[tuple[float, Request]]:
    """Poisson, with prompts and answers of very different lengths."""
    draw, now_s, index = random.Random(f"{seed} {tenant}"), 0.0, 0
    while (now_s := now_s + draw.expovariate(per_s)) < until_s:
        prompt = WORDS[: draw.randint(1, 2 * MEAN_PROMPT - 1)]
        sampling = SamplingParams(max_tokens=draw.randint(1, 2 * MEAN_OUTPUT - 1))
        yield now_s, Request(id=f"{tenant}-{index}", prompt=prompt, sampling=sampling, tenant=tenant)
        index += 1


def simulate(policy: Policy, loads: dict[str, float], *, until_s: float, seed: int = 0) -> Outcome:
    """``loads``: requests a second of each tenant."""
    scheduler, outcome, now_s = Scheduler(CONFIG, CAPACITY, policy=policy), Outcome(), 0.0
    coming = list(heapq.merge(*(arrivals(tenant, load, until_s, seed) for tenant, load in loads.items()), key=lambda one: one[0]))
    coming.reverse()
    arrived: dict[str, tuple[float, str]] = {}
    for tenant in loads:
        outcome.first_token_s[tenant], outcome.tokens[tenant], outcome.refused[tenant] = [], 0, 0
    while now_s < until_s:
        while coming and coming[-1][0] <= now_s:
            at_s, request = coming.pop()
            arrived[request.id] = (at_s, request.tenant)
            try:
                scheduler.add(request)
            except QueueFull:
                outcome.refused[request.tenant] += 1
        plan = scheduler.schedule()
        if plan is None:
            now_s = coming[-1][0] if coming else until_s
            continue
        now_s += STEP_S + TOKEN_S * plan.num_tokens
        sampled = tuple(SampledTokens(work.sequence, (7,)) for work in plan.works if work.samples)
        for event in scheduler.apply(plan, StepResult(plan.step, sampled)):
            at_s, tenant = arrived[event.request_id]
            outcome.tokens[tenant] += len(event.tokens)
            if event.offset == 0:
                outcome.first_token_s[tenant].append(now_s - at_s)
    return outcome


def modest_p99_s(policy: type[Policy], greedy: float, *, until_s: float, modest: float = 0.8, seeds: int = 1) -> float:
    """The modest key asks for ``modest`` of its share, the greedy one for ``greedy`` times its own; over runs with so many seeds."""
    waits: list[float] = []
    for seed in range(seeds):
        loads = {"modest": modest * SHARE_PER_S} | ({"greedy": greedy * SHARE_PER_S} if greedy else {})
        waits += simulate(policy(), loads, until_s=until_s, seed=seed).first_token_s["modest"]
    return sorted(waits)[int(0.99 * (len(waits) - 1))]


if __name__ == "__main__":
    print(f"a share is {SHARE_PER_S:.2f} requests/s; p99 of the modest key's time to first token, s, over three runs of 80 s:")
    for made in (FirstComeFirstServed, FairShare):
        for modest in (0.25, 0.5, 0.8):
            row = [modest_p99_s(made, greedy, until_s=80.0, modest=modest, seeds=3) for greedy in (0.0, 0.8, 1.0, 10.0)]
            told = f"alone {row[0]:.3f}, greedy at 0.8 shares {row[1]:.3f}, at 1 {row[2]:.3f}, at 10 {row[3]:.3f}"
            print(f"{made.__name__}, modest at {modest} of its share: {told} ({row[3] / row[0]:.2f} times)", flush=True)
