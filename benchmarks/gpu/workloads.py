"""W1, W2 and W4 of the protocol (shared/performance.md, section 4), in process: token ids as prompts, fixed output length, greedy."""

import random
import statistics
import time
from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from benchmarks.gpu.floors import Floors
from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import median_s
from engine.plan import NO_BLOCK, Decodes, NewSequence, StepPlan, Work
from engine.request import Request, SamplingParams

_ids = count()
GRID = ((128, 128), (128, 2048), (1000, 1000), (2048, 128), (5000, 500))
"""W4: tokens in and out."""


@torch.inference_mode()
def steps(
    results: Results, part: str, served: ServedModel, floors: Floors, *, rows: Sequence[int], context: int, kind: SamplingParams
) -> None:
    """Time decode steps with ``rows`` sequences after ``context`` tokens: the whole step, and the model's graph alone.

    No prompt is computed; keys and values are whatever the cache contains.
    """
    name = ("greedy" if kind.temperature == 0 else f"top-k {kind.top_k}") + ", penalised" * kind.penalises
    for number_of_rows in rows:
        results.go_on()
        plans = _decoding(served, number_of_rows, context, kind)
        seconds = []
        for plan in plans:
            began = time.perf_counter()
            served.runner.run(plan)
            seconds.append(time.perf_counter() - began)
        floor = floors.decode_s([context] * number_of_rows) * 1000
        results.add(part, f"step of {number_of_rows} at {context}, {name}", statistics.median(seconds[3:]) * 1000, "ms", floor)
        graphs = served.runner.decode_graphs
        if graphs is not None and kind.temperature == 0:
            replay = graphs.replays[graphs.size_for(number_of_rows)]
            results.add(part, f"  its model alone, of {number_of_rows}", median_s(replay, served.model.device) * 1000, "ms", floor)
        served.runner.run(StepPlan(0, (), closed=tuple(range(number_of_rows))))


def _decoding(served: ServedModel, rows: int, context: int, kind: SamplingParams, num_steps: int = 23) -> list[StepPlan]:
    """Plans of decode steps after contexts that were never computed. Sequences share blocks if there are too few."""
    blocks_each = served.runner.capacity.blocks_for(context + num_steps)
    total = served.runner.capacity.num_blocks

    def blocks(sequence: int) -> tuple[int, ...]:
        return tuple((sequence * blocks_each + at) % total for at in range(blocks_each))

    history = tuple(range(100, 100 + context)) if kind.needs_history else ()
    first = tuple(Work(n, context - 1, (7 + n,), blocks(n), samples=True) for n in range(rows))
    plans = [StepPlan(0, first, tuple(NewSequence(n, 0, context, kind, history) for n in range(rows)))]
    for step in range(1, num_steps):
        columns = [(n, context - 1 + step, 7 + n, NO_BLOCK, 0) for n in range(rows)]
        plans.append(StepPlan(step, (), decodes=Decodes.of(np.array(columns).T)))
    return plans


def drawn(requests: Sequence[tuple[int, int]], seed: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Random prompts for requests (tokens in, tokens out)."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(vocab_size) for _ in range(tokens_in)) for tokens_in, _ in requests]


def mixed(sequences: int, least: int, most: int) -> list[tuple[int, int]]:
    """W2's requests: tokens in and out, uniform between ``least`` and ``most``."""
    draw = random.Random(2)
    return [(draw.randint(least, most), draw.randint(least, most)) for _ in range(sequences)]


def closed_loop(results: Results, served: ServedModel, requests: Sequence[tuple[int, int]], seed: int) -> tuple[float, float, float]:
    """All at once. Seconds, the median time to a first token, and the median gap between tokens of one request.

    Tokens of requests that only go on are looked at as columns, as a replica does (`cluster.front_protocol`).
    """
    prompts = drawn(requests, seed, served.model.config.vocab_size)
    number_of: dict[str, int] = {}
    for number, (prompt, (_, tokens_out)) in enumerate(zip(prompts, requests, strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens_out)
        number_of[name := f"gpu-{next(_ids)}"] = number
        served.engine.submit(Request(id=name, prompt=prompt, sampling=sampling, tag=number))
    began = time.perf_counter()
    first_s, last_s = (np.full(len(requests), np.nan) for _ in range(2))
    gaps_s: list[np.ndarray] = []
    while number_of:
        output = served.engine.turn()
        now_s = time.perf_counter() - began
        numbers = [batch.tags for batch in output.token_batches]
        for event in output.events:
            if event.finish_reason == "error":
                raise RuntimeError(f"{event.request_id}: {event.error_message}")
            if event.tokens:
                numbers.append(np.array([number_of[event.request_id]]))
            if event.finish_reason is not None:
                del number_of[event.request_id]
        for some in numbers:
            gaps_s.append(now_s - last_s[some])
            first_s[some] = np.fmin(first_s[some], now_s)
            last_s[some] = now_s
        results.go_on()
    seconds, gaps = time.perf_counter() - began, np.concatenate(gaps_s)
    return seconds, float(np.median(first_s)), float(np.nanmedian(gaps)) if np.isfinite(gaps).any() else 0.0


def single_stream(results: Results, part: str, served: ServedModel, floors: Floors, contexts: Sequence[int], tokens_out: int) -> None:
    """W1."""
    for context in contexts:
        rounds = [closed_loop(results, served, [(context, tokens_out)], seed) for seed in range(3)][1:]
        first_s, gap_s = (statistics.median(one[at] for one in rounds) for at in (1, 2))
        results.add(part, f"W1 prompt of {context}", first_s * 1000, "ms", floors.prefill_s(context) * 1000)
        floor_s = floors.decode_s([context + tokens_out // 2])
        results.add(part, f"W1 one stream behind {context}", 1 / gap_s, "tokens/s", 1 / floor_s)


def many(results: Results, part: str, served: ServedModel, floors: Floors, *, sequences: int, most: int, least: int) -> None:
    """W2."""
    requests = mixed(sequences, least, most)
    seconds, _, gap_s = closed_loop(results, served, requests, seed=1)
    tokens = sum(tokens_out for _, tokens_out in requests)
    results.add(part, f"W2 {sequences} sequences", tokens / seconds, "tokens/s", tokens / floors.closed_loop_s(requests))
    results.add(part, "W2 gap between tokens", gap_s * 1000, "ms")


def grid(
    results: Results, part: str, served: ServedModel, floors: Floors, *, sequences: int, cells: Sequence[tuple[int, int]] = GRID
) -> None:
    """W4."""
    for tokens_in, tokens_out in cells:
        requests = [(tokens_in, tokens_out)] * sequences
        seconds, _, gap_s = closed_loop(results, served, requests, seed=tokens_in)
        tokens, name = sequences * tokens_out, f"W4 {sequences} x {tokens_in}/{tokens_out}"
        results.add(part, name, tokens / seconds, "tokens/s", tokens / floors.closed_loop_s(requests))
        results.add(part, f"  {name}, gap", gap_s * 1000, "ms")


def profile(results: Results, part: str, served: ServedModel, *, rows: int, context: int) -> list[tuple[str, float, int]]:
    """Profile of a step: (kernel, microseconds per step, launches per step), longest first."""
    plans = _decoding(served, rows, context, SamplingParams(temperature=0.0))
    for plan in plans[:3]:
        served.runner.run(plan)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for plan in plans[3:]:
            served.runner.run(plan)
    served.runner.run(StepPlan(0, (), closed=tuple(range(rows))))
    num_steps = len(plans) - 3
    found = [(one.key[:70], one.self_device_time_total / num_steps, one.count // num_steps) for one in seen.key_averages()]
    found.sort(key=lambda one: -one[1])
    results.add(part, f"kernels of a step of {rows}", sum(number for _, _, number in found), "launches")
    results.add(part, f"device time of a step of {rows}", sum(time_us for _, time_us, _ in found) / 1000, "ms")
    return found
