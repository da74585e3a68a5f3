"""Speculative decoding on a real rank: the same tokens, log-probabilities and finish reasons as without it."""

import random
from collections.abc import Iterator

import pytest

from engine.draft.speculator import Speculator
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.sequence import Sequence
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.tiny_models import engine_config, float32_config

PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=20),
    "drawn": SamplingParams(temperature=1.0, seed=3, max_tokens=20),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.8, seed=5, max_tokens=20),
    "penalised": SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.4, seed=4, max_tokens=20),
    "with log-probabilities": SamplingParams(temperature=0.9, logprobs=3, seed=6, max_tokens=20),
    "not to stop yet": SamplingParams(temperature=1.0, stop_token_ids=tuple(range(0, 90, 3)), min_tokens=6, seed=8, max_tokens=20),
}


class Prophet:
    """A proposer that knows the answers, and is wrong at every third token."""

    def __init__(self, answers: dict[tuple[str, int], tuple[int, ...]]) -> None:
        self._answers, self._draw = answers, random.Random(1)

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        coming = self._answers[sequence.request.key][sequence.num_output :][:most]
        return tuple(token if self._draw.random() < 0.67 else (token + 1) % 90 for token in coming)


def requests(sampling: SamplingParams) -> list[Request]:
    return [Request(id=str(index), prompt=prompt, sampling=sampling) for index, prompt in enumerate(PROMPTS)]


def open_engine(folder, speculator: Speculator | None = None, **changes: object) -> Engine:
    config = engine_config(**changes)
    runner_config = float32_config(num_blocks=400, block_tokens=config.block_tokens)
    return Engine(LocalExecutor.open(folder, runner_config=runner_config, engine_config=config), config, speculator=speculator)


@pytest.fixture
def plain(dense_folder) -> Iterator[Engine]:
    engine = open_engine(dense_folder)
    yield engine
    engine.executor.close()


@pytest.mark.parametrize("sampling", PARAMS.values(), ids=PARAMS.keys())
def test_speculation_changes_no_answer(sampling: SamplingParams, plain: Engine, dense_folder) -> None:
    wanted = serve(plain, requests(sampling))
    prophet = Prophet({key: answer(events) for key, events in wanted.items()})
    engine = open_engine(dense_folder, Speculator(prophet, max_tokens=5, step_line=lambda: (1.0, 0.0)))
    found = serve(engine, requests(sampling))
    engine.executor.close()
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens
    assert engine.stats.num_steps < plain.stats.num_steps
    for key, events in found.items():
        assert events[-1].finish_reason == wanted[key][-1].finish_reason
        ours = [logprobs.logprob for event in events for logprobs in event.logprobs]
        theirs = [logprobs.logprob for event in wanted[key] for logprobs in event.logprobs]
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_prompt_lookup_saves_steps_on_repetitive_text(dense_folder) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias=((5, 100.0),), max_tokens=60)  # a random model repeats nothing by itself
    engine, plain = open_engine(dense_folder, speculate="lookup"), open_engine(dense_folder)
    asked = [Request(id="r", prompt=PROMPTS[4], sampling=sampling)]
    assert answer(serve(engine, asked)["r", 0]) == answer(serve(plain, asked)["r", 0])
    assert engine.stats.accepted_tokens > 30
    assert engine.stats.num_steps < plain.stats.num_steps - 30
    engine.executor.close()
    plain.executor.close()
