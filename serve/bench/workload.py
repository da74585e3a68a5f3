"""The workloads of `manta bench`: closed loop, identical request sizes, token ids as prompts, a fixed output length."""

import random
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from engine.engine import Engine
from engine.request import Request, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`streams` concurrent requests, each with `tokens_in` random prompt ids and exactly `tokens_out` output tokens."""

    name: str
    streams: int
    tokens_in: int
    tokens_out: int
    shared_prefix: int = 0
    """Number of ids that all prompts start with; drawn anew in every round."""

    def shortened(self, tokens_out: int) -> "Workload":
        """The same workload with at most ``tokens_out`` output tokens; the name says so."""
        if self.tokens_out <= tokens_out:
            return self
        name = self.name.replace(f"/{self.tokens_out}", f"/{tokens_out}")
        return replace(self, name=name, tokens_out=tokens_out)

    def prompts(self, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
        """Prompts drawn anew for each seed, so that no round hits another round's prompts in the prefix cache."""
        draw = random.Random(seed)  # noqa: S311  (a workload, not a secret)
        prefix = tuple(draw.randrange(vocab_size) for _ in range(self.shared_prefix))
        return [prefix + tuple(draw.randrange(vocab_size) for _ in range(self.tokens_in)) for _ in range(self.streams)]


WORKLOADS = (
    Workload(name="prefill 1,024", streams=1, tokens_in=1024, tokens_out=1),
    Workload(name="1 stream 128/128", streams=1, tokens_in=128, tokens_out=128),
    Workload(name="8 streams 128/128", streams=8, tokens_in=128, tokens_out=128),
    Workload(name="16 streams 128/128", streams=16, tokens_in=128, tokens_out=128),
    Workload(name="32 streams 128/128", streams=32, tokens_in=128, tokens_out=128),
    Workload(name="16 on one 1,024 prefix", streams=16, tokens_in=32, tokens_out=32, shared_prefix=1024),
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Result of one run of a workload."""

    elapsed_s: float
    ttft_s: float
    """Median over the requests, from their common start."""
    itl_s: float
    """Median gap between tokens of one request; 0 if requests have one token."""
    prompt_tokens: int
    output_tokens: int
    steps: int


def run_workload(engine: Engine, workload: Workload, *, vocab_size: int, seed: int, ids: Iterator[int] = count()) -> Round:  # noqa: B008  (one sequence of ids for the process)
    """Submit all requests of a workload at once and run engine turns until the last one has finished."""
    prompts = workload.prompts(vocab_size, seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.tokens_out)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    running = set()
    started = time.perf_counter()
    for prompt in prompts:
        request = Request(id=f"bench-{next(ids)}", prompt=prompt, sampling=sampling)
        running.add(request.id)
        engine.submit(request)
    steps = 0
    while running:
        events = engine.turn()
        now = time.perf_counter()
        steps += 1
        for event in events:
            if event.finish_reason == "error":
                raise RuntimeError(f"{event.request_id} ended with {event.error_kind}: {event.error_message}")
            if event.tokens:
                if event.request_id in last:
                    gaps.append((now - last[event.request_id]) / len(event.tokens))
                first.setdefault(event.request_id, now)
                last[event.request_id] = now
            if event.finish_reason:
                running.discard(event.request_id)
    return Round(
        elapsed_s=time.perf_counter() - started,
        ttft_s=statistics.median(first.values()) - started,
        itl_s=statistics.median(gaps) if gaps else 0.0,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        output_tokens=workload.streams * workload.tokens_out,
        steps=steps,
    )


def run_rounds(
    engine: Engine, workload: Workload, *, vocab_size: int, rounds: int, after_round: Callable[[], None], warm_up: bool = True
) -> list[Round]:
    """`rounds` measured rounds; with `warm_up`, one unmeasured round first."""
    measured = []
    for index in range(0 if warm_up else 1, rounds + 1):
        result = run_workload(engine, workload, vocab_size=vocab_size, seed=zlib.crc32(f"{workload.name} {index}".encode()))
        if index:
            measured.append(result)
        after_round()
    return measured
