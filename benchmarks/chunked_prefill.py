"""Chunked prefill under a virtual clock: inter-token latency of running streams and speed of long prompts beside them, depending on
`engine.prompt_share`, `prompt_wait_steps`, `prompt_step_s` and `max_step_s`. With ``--chats``: concurrent chats of 150 tokens in, 128 out.

    python -m benchmarks.chunked_prefill [--machine gpu] [--streams 32] [--prompts 40] [--seed 1] [--chats 32]

Only the duration of a step is simulated (base + per token + per token and context; about a 7B model on one accelerator, or a 0.5B model on
two CPU cores). Engine, scheduler, blocks and the estimate of step times are the server's own.
"""

import argparse
import random
import statistics

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.request import Request, SamplingParams

MACHINES = {"gpu": (0.012, 0.00006, 2e-9, (0.03, 0.05, 0.1)), "cpu": (0.045, 0.0018, 1e-7, (0.15, 0.3, 1.0))}
"""Seconds per step, per token, and per token and preceding token of its sequence; values of max_step_s to try."""


class Ranks:
    """An executor whose steps take virtual time."""

    capacity = Capacity(num_blocks=40_000, block_tokens=16, max_context_tokens=32_768)

    def __init__(self, machine: str) -> None:
        self._cost = MACHINES[machine][:3]
        self.plan: StepPlan | None = None
        self.seconds = 0.0

    def submit(self, plan: StepPlan) -> "Ranks":
        base_s, token_s, context_s = self._cost
        works = plan.works
        self.plan = plan
        self.seconds = base_s + sum(len(work.tokens) * (token_s + context_s * (work.start + len(work.tokens) / 2)) for work in works)
        return self

    def result(self) -> StepResult:
        assert self.plan is not None
        return StepResult(
            self.plan.step, tuple(SampledTokens(work.sequence, (7,)) for work in self.plan.works if work.samples), self.seconds
        )

    def close(self) -> None:
        pass


def simulated(machine: str, config: EngineConfig, num_streams: int, num_prompts: int, seed: int) -> tuple[list[float], float, float]:
    """(gaps between tokens of the running streams while prompts arrive, prompt tokens per second, mean time to the first token)."""
    draw, ranks = random.Random(seed), Ranks(machine)
    engine = Engine(ranks, config)
    for number in range(num_streams):
        prompt = tuple(draw.randrange(50_000) for _ in range(draw.randint(20, 400)))
        engine.submit(Request(id=f"stream {number}", prompt=prompt, sampling=SamplingParams(max_tokens=30_000)))
    while engine.stats.prefill_tokens or engine.stats.num_steps < 50:
        engine.turn()
    now, arrives, arrived_at, gaps, first_after, computed = 0.0, 0.0, {}, [], [], 0
    mean_gap_s = 3000 * MACHINES[machine][1] * 1.6
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


def chats(machine: str, config: EngineConfig, count: int) -> tuple[list[float], list[float], float]:
    """(gaps between tokens, times to the first token, tokens per second) of ``count`` concurrent chats, after a few chats from which the
    engine learns step times.

    The first chat is computed alone, as when requests arrive over a network.
    """
    draw, ranks = random.Random(1), Ranks(machine)
    engine = Engine(ranks, config)

    def ask(names: list[str]) -> None:
        for name in names:
            prompt = tuple(draw.randrange(50_000) for _ in range(150))
            engine.submit(Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=128)))

    ask([f"before {number}" for number in range(4)])
    while engine.stats.num_running + engine.stats.num_waiting:
        engine.turn()
    names = [str(number) for number in range(count)]
    ask(names[:1])
    now, heard, gaps, first_after = 0.0, dict[str, float](), list[float](), list[float]()
    while not heard or engine.stats.num_running + engine.stats.num_waiting:
        told = engine.turn()
        now += ranks.seconds
        for event in told:
            if event.tokens:
                (gaps if event.request_id in heard else first_after).append(now - heard.get(event.request_id, 0.0))
                heard[event.request_id] = now
        ask(names[1:])
        names = []
    return gaps, first_after, count * 128 / now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=sorted(MACHINES), default="gpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chats", type=int, help="simulate this many concurrent short chats instead of long prompts beside streams")
    arguments = parser.parse_args()
    if arguments.chats:
        return tell_chats(arguments.machine, arguments.chats)
    print(f"{arguments.streams} streams, {arguments.prompts} prompts of 1,000 to 5,000 tokens, as on a {arguments.machine}, virtual clock")
    settings = "".join(f"{name:<{width}}" for name, width in (("share", 8), ("wait", 8), ("prompt_step_s", 15), ("max_step_s", 12)))
    print(f"{settings}{'gap p50':>10}{'p99':>10}{'max':>10}{'TTFT':>10}  ms{'prompt tokens/s':>20}")
    configs = [
        EngineConfig(prompt_share=1.0),
        EngineConfig(prompt_share=0.75, prompt_wait_steps=1e6),
        EngineConfig(),
        EngineConfig(prompt_step_s=1e6),
        EngineConfig(prompt_wait_steps=1e6),
    ]
    configs += [EngineConfig(prompt_share=1.0, max_step_s=limit) for limit in reversed(MACHINES[arguments.machine][3])]
    for config in configs:
        gaps, rate, first = simulated(arguments.machine, config, arguments.streams, arguments.prompts, arguments.seed)
        p50, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
        figures = "".join(f"{seconds * 1000:>10.0f}" for seconds in (p50, p99, max(gaps), first))
        wait = "any" if config.prompt_wait_steps == 1e6 else f"{config.prompt_wait_steps:g}"
        print(
            f"{config.prompt_share:<8}{wait:<8}{_limit(config.prompt_step_s):<15}{config.max_step_s or 'none':<12}{figures}{rate:>24,.0f}"
        )


def tell_chats(machine: str, count: int) -> None:
    print(f"{count} chats of 150 tokens in and 128 out at once, as on a {machine}, virtual clock")
    print(f"{'share':<8}{'prompt_step_s':<15}{'gap p50':>10}{'p99':>10}{'max':>10}{'TTFT p50':>10}{'p99':>10}  ms{'tokens/s':>12}")
    configs = [EngineConfig(prompt_share=1.0)] + [EngineConfig(prompt_step_s=limit) for limit in (1e6, 0.8, 0.4, 0.3, 0.2)]
    for config in configs:
        gaps, first, rate = chats(machine, config, count)
        shown = [statistics.median(gaps), statistics.quantiles(gaps, n=100)[98], max(gaps), statistics.median(first), max(first)]
        figures = "".join(f"{seconds * 1000:>10,.0f}" for seconds in shown)
        print(f"{config.prompt_share:<8}{_limit(config.prompt_step_s):<15}{figures}{rate:>16,.1f}")


def _limit(seconds: float) -> str:
    return "any" if seconds == 1e6 else f"{seconds:g}"


if __name__ == "__main__":
    main()
