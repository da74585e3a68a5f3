"""Long prompts beside running streams under a virtual clock: how late tokens come, and how fast prompts go, by `engine.prompt_share`,
`prompt_step_s` and `max_step_s`; with ``--chats`` so many chats instead, at once or every so many seconds, by `first_round_s` too.

    python -m benchmarks.pacing [--machine gpu] [--streams 32] [--prompts 40] [--seed 1] [--chats 32 [--every 0.6] [--tokens-in 150]]

Simulated, and no more than this: what a step takes. Engine, scheduler, blocks and what is learnt of the steps' times are the server's own.
"""

import argparse
import random
import statistics
from dataclasses import dataclass
from itertools import pairwise

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.plan import Sampled, StepPlan, StepResult, Work
from engine.request import Request, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What steps take there, in seconds."""

    base_s: float
    token_s: float
    """A token of a prompt."""
    decoded_s: float
    """One that is sampled."""
    context_s: float
    """A token for each one before it in its sequence."""
    least_s: float = 0.0
    """However few tokens: the weights are read."""
    limits_s: tuple[float, ...]
    """For a step, that are tried."""


MACHINES = {
    "gpu": Machine(base_s=0.012, token_s=0.00006, decoded_s=0.00006, context_s=2e-9, limits_s=(0.03, 0.05, 0.1)),
    "cpu": Machine(base_s=0.045, token_s=0.0018, decoded_s=0.0018, context_s=1e-7, limits_s=(0.15, 0.3, 1.0)),
    "epyc": Machine(base_s=0.012, token_s=0.00185, decoded_s=0.0029, context_s=1e-7, least_s=0.034, limits_s=(0.15, 0.3, 1.0)),
}
"""About a 7B model on one accelerator, and a 0.5B model on two CPU cores: guessed, and as measured in bfloat16 on two of an EPYC, where
reading hides behind multiplying."""


class Ranks:
    """Takes virtual time."""

    capacity = Capacity(num_blocks=40_000, block_tokens=16, max_context_tokens=32_768)

    def __init__(self, machine: str) -> None:
        self._machine = MACHINES[machine]
        self.plan: StepPlan | None = None
        self.seconds = 0.0

    def submit(self, plan: StepPlan) -> "Ranks":
        self.plan, machine = plan, self._machine
        self.seconds = max(machine.least_s, machine.base_s + sum(map(self._seconds_of, plan.works)))
        return self

    def _seconds_of(self, work: Work) -> float:
        count, machine = len(work.tokens), self._machine
        token_s = machine.decoded_s if count == 1 else machine.token_s
        return count * (token_s + machine.context_s * (work.start + count / 2))

    def result(self) -> StepResult:
        assert self.plan is not None
        return StepResult(self.plan.step, tuple(Sampled(work.sequence, (7,)) for work in self.plan.works if work.samples), self.seconds)

    def close(self) -> None:
        pass


def simulated(machine: str, config: EngineConfig, num_streams: int, num_prompts: int, seed: int) -> tuple[list[float], float, float]:
    """Gaps between tokens of the running streams while prompts come, tokens of prompts a second, and the mean time to their first token."""
    draw, ranks = random.Random(seed), Ranks(machine)
    engine = Engine(ranks, config)
    for number in range(num_streams):
        prompt = tuple(draw.randrange(50_000) for _ in range(draw.randint(20, 400)))
        engine.submit(Request(id=f"stream {number}", prompt=prompt, sampling=SamplingParams(max_tokens=30_000)))
    while engine.stats.prefill_tokens or engine.stats.num_steps < 50:
        engine.turn()
    now, arrives, arrived_at, gaps, first_after, computed = 0.0, 0.0, {}, [], [], 0
    mean_gap_s = 3000 * MACHINES[machine].token_s * 1.6
    while len(first_after) < num_prompts:
        while arrives <= now and len(arrived_at) < num_prompts:
            name = str(len(arrived_at))
            prompt = tuple(draw.randrange(50_000) for _ in range(draw.randint(1000, 5000)))
            engine.submit(Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=1)))
            arrived_at[name] = now
            computed += len(prompt)
            arrives += draw.expovariate(1 / mean_gap_s)
        told = engine.turn()
        now += ranks.seconds
        if engine.stats.prefill_tokens:
            gaps.append(ranks.seconds)
        first_after += [now - arrived_at[event.request_id] for event in told if event.request_id in arrived_at]
    return gaps, computed / sum(gaps), statistics.fmean(first_after)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Chats of 128 tokens out."""

    count: int
    every_s: float
    """On average; 0 = all at once, the first computed alone, as where they come over a network."""
    tokens_in: int


@dataclass(frozen=True, eq=False)
class Heard:
    """When each chat came, and when each of its tokens."""

    came_s: dict[str, float]
    tokens_s: dict[str, list[float]]

    def gaps(self) -> list[float]:
        return [later - sooner for times in self.tokens_s.values() for sooner, later in pairwise(times)]

    def until(self, token: int) -> list[float]:
        """From each chat's coming until its so-manieth token, by falling quickness."""
        return sorted(times[token - 1] - self.came_s[name] for name, times in self.tokens_s.items())

    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.tokens_s.values())) / max(times[-1] for times in self.tokens_s.values())


def chats(machine: str, config: EngineConfig, load: Load) -> Heard:
    """What is heard of them, after a few by which steps are known."""
    draw, ranks = random.Random(1), Ranks(machine)
    engine = Engine(ranks, config)

    def ask(name: str) -> None:
        prompt = tuple(draw.randrange(50_000) for _ in range(load.tokens_in))
        engine.submit(Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=128)))

    for number in range(4):
        ask(f"before {number}")
    while engine.stats.num_running + engine.stats.num_waiting:
        engine.turn()
    arrivals, at = random.Random(2), 0.0
    came_s = {}
    for number in range(load.count):
        came_s[str(number)] = at
        at = at + arrivals.expovariate(1 / load.every_s) if load.every_s else 1e-6
    coming, now, tokens_s = list(reversed(came_s)), 0.0, dict[str, list[float]]()
    while coming or engine.stats.num_running + engine.stats.num_waiting:
        if not engine.stats.num_running + engine.stats.num_waiting:
            now = max(now, came_s[coming[-1]])
        while coming and came_s[coming[-1]] <= now:
            ask(coming.pop())
        told = engine.turn()
        now += ranks.seconds
        for event in told:
            if event.tokens:
                tokens_s.setdefault(event.request_id, []).append(now)
    return Heard(came_s, tokens_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=sorted(MACHINES), default="gpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chats", type=int, help="so many short ones instead of long prompts beside streams")
    parser.add_argument("--every", type=float, default=0.0, help="seconds between two chats on average, instead of all at once")
    parser.add_argument("--tokens-in", type=int, default=150)
    arguments = parser.parse_args()
    if arguments.chats:
        return tell_chats(arguments.machine, Load(count=arguments.chats, every_s=arguments.every, tokens_in=arguments.tokens_in))
    print(f"{arguments.streams} streams, {arguments.prompts} prompts of 1,000 to 5,000 tokens, as on a {arguments.machine}, virtual clock")
    settings = "".join(f"{name:<{width}}" for name, width in (("share", 8), ("prompt_step_s", 15), ("max_step_s", 12)))
    print(f"{settings}{'gap p50':>10}{'p99':>10}{'max':>10}{'TTFT':>10}  ms{'prompt tokens/s':>20}")
    configs = [
        EngineConfig(prompt_share=1.0),
        EngineConfig(),
        EngineConfig(prompt_step_s=1e6),
    ]
    configs += [EngineConfig(prompt_share=1.0, max_step_s=limit) for limit in reversed(MACHINES[arguments.machine].limits_s)]
    for config in configs:
        gaps, rate, first = simulated(arguments.machine, config, arguments.streams, arguments.prompts, arguments.seed)
        p50, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
        figures = "".join(f"{seconds * 1000:>10.0f}" for seconds in (p50, p99, max(gaps), first))
        print(f"{config.prompt_share:<8}{_limit(config.prompt_step_s):<15}{config.max_step_s or 'none':<12}{figures}{rate:>24,.0f}")


def tell_chats(machine: str, load: Load) -> None:
    how = f"every {load.every_s:g} s on average" if load.every_s else "at once"
    print(f"{load.count} chats of {load.tokens_in} tokens in and 128 out {how}, as on a {machine}, virtual clock; seconds")
    names = ("gap p50", "p99", "longest", "1st p50", "p99", "20th p50", "p99", "end p50", "tokens/s")
    print(f"{'share':<7}{'prompt_step_s':<15}{'first_round_s':<15}{''.join(f'{name:>10}' for name in names)}")
    configs = [EngineConfig(prompt_share=1.0, prompt_step_s=1e6, first_round_s=0.0)]
    configs += [EngineConfig(prompt_step_s=limit, first_round_s=0.0) for limit in (0.8, 0.4, 0.2)]
    configs += [EngineConfig(prompt_step_s=limit) for limit in (1e6, 0.8, 0.4, 0.2)]
    for config in configs:
        heard = chats(machine, config, load)
        gaps, shown = heard.gaps(), []
        shown += [statistics.median(gaps), statistics.quantiles(gaps, n=100)[98], max(gaps)]
        for token in (1, 20):
            shown += [statistics.median(heard.until(token)), heard.until(token)[int(0.99 * load.count)]]
        shown += [statistics.median(heard.until(128)), heard.rate()]
        settings = f"{config.prompt_share:<7}{_limit(config.prompt_step_s):<15}{config.first_round_s:<15g}"
        print(settings + "".join(f"{value:>10,.3f}" for value in shown))


def _limit(seconds: float) -> str:
    return "any" if seconds == 1e6 else f"{seconds:g}"


if __name__ == "__main__":
    main()
