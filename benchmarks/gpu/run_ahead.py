"""Check that running ahead (starting a step before the previous one's tokens are read) gives the same tokens as running step by step.

Both compute the same rows with the same kernels, so rounding cannot differ: any difference is a read or write at the wrong time.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import StepPlan
from engine.request import Request, SamplingParams
from engine.run.mixed_steps import MixedSteps

TOKENS_IN, TOKENS_OUT = 40, 48


def wrong_ahead(results: Results, name: str, served: ServedModel, *, kinds: Sequence[SamplingParams], count: int) -> list[str]:
    """Errors in the answers to ``count`` concurrent requests of equal length, so that every step has the same rows."""
    draw, vocab_size = random.Random(), served.model.config.vocab_size
    requests = [
        Request(
            id=f"ahead-{number}",
            prompt=tuple(draw.randrange(vocab_size) for _ in range(TOKENS_IN)),
            sampling=replace(draw.choice(kinds), seed=number, max_tokens=TOKENS_OUT),
        )
        for number in range(count)
    ]
    one_by_one = replace(served.config, run_ahead=False)
    first, again, ahead = (_answers(served, config, requests) for config in (one_by_one, one_by_one, served.config))
    unsteady, different = (sum(other[key] != first[key] for key in first) for other in (again, ahead))
    results.add("replays", f"{name}: answers of {count} that differ when asked again", float(unsteady), "answers")
    results.add("replays", f"{name}: answers of {count} that differ a step ahead", float(different), "answers")
    return [
        f"{name}: {number} of {count} answers differ {when}"
        for number, when in ((unsteady, "when asked again"), (different, "a step ahead"))
        if number
    ]


def wrong_beside_prompts(results: Results, name: str, served: ServedModel, *, kinds: Sequence[SamplingParams], count: int) -> list[str]:
    """Errors in the answers to requests that arrive one by one, so that prompts share steps with decodes. With and without
    `RunnerConfig.prompts_ahead` the same steps with the same rows run; only the sampling is replayed or done row by row, and, if steps are
    planned ahead, a step starts before or after the previous one is read."""
    draw, vocab_size = random.Random(), served.model.config.vocab_size
    requests = [
        Request(
            id=f"beside-{number}",
            prompt=tuple(draw.randrange(vocab_size) for _ in range(draw.randint(3, TOKENS_IN))),
            sampling=replace(draw.choice(kinds), seed=number, max_tokens=draw.randint(2, TOKENS_OUT)),
        )
        for number in range(count)
    ]
    wrong, runner = [], served.runner
    mixed_steps = MixedSteps(runner.graph_steps, runner.forward) if runner.graph_steps is not None else None
    for run_ahead in (False, True):
        config = replace(served.config, run_ahead=run_ahead, prompt_share=1.0)  # the same plans, however long steps take
        wanted = _answers(served, config, requests, at_once=False)
        with patch.object(runner, "mixed_steps", mixed_steps):
            found = _answers(served, config, requests, at_once=False)
        different = sum(found[key] != wanted[key] for key in wanted)
        when = "beside prompts, a step ahead" if run_ahead else "beside prompts, sampled by replays"
        results.add("replays", f"{name}: answers of {count} that differ {when}", float(different), "answers")
        wrong += [f"{name}: {different} of {count} answers differ {when}"] if different else []
    return wrong


def _answers(served: ServedModel, config: EngineConfig, requests: Sequence[Request], *, at_once: bool = True) -> dict[str, list[int]]:
    """The answers to all requests, submitted at once or one per step.

    Raises:
        RuntimeError: a request failed.
    """
    executor = served.engine.executor
    executor.submit(StepPlan(0, (), closed=tuple(range(2 * len(requests))))).result()  # each engine counts its sequences from 0
    engine, tokens = Engine(executor, config), {request.id: list[int]() for request in requests}
    running, coming = set(tokens), list(reversed(requests))
    while running:
        for _ in range(len(coming) if at_once else min(1, len(coming))):
            engine.submit(coming.pop())
        for event in engine.turn():
            if event.finish_reason == "error":
                raise RuntimeError(f"{event.request_id}: {event.error_message}")
            tokens[event.request_id] += event.tokens
            if event.finish_reason is not None:
                running.discard(event.request_id)
    return tokens
