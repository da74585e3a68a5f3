"""Log-probabilities of prompts equal transformers', however the prompt is chunked, cached or interrupted."""

from dataclasses import replace

import pytest

from engine.request import Request, SamplingParams
from engine.run import prompt_logprobs
from tests.engine.run.test_end_to_end import PROMPTS, answer, open_engine, serve
from tests.engine.run.tiny_models import NUM_REAL_TOKENS, assert_scored_as, greedy, oracle_logprobs

COUNT = 3
ASKING = SamplingParams(temperature=0.0, max_tokens=COUNT, prompt_logprobs=2)


@pytest.fixture(scope="module")
def expected(oracle):
    return [oracle_logprobs(oracle, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("max_step_tokens", [512, 5])
@pytest.mark.parametrize("num_blocks", [400, 21])
def test_they_are_those_of_transformers_at_every_place(folder, oracle, expected, max_step_tokens, num_blocks, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "ROWS_AT_ONCE", 7)
    engine = open_engine(folder, num_blocks=num_blocks, max_step_tokens=max_step_tokens)
    requests = [Request(id=str(i), prompt=prompt, sampling=ASKING) for i, prompt in enumerate(PROMPTS)]
    for _ in range(2):  # the second time all prompts are in the cache, but their logits are not
        events = serve(engine, requests)
        for i, prompt in enumerate(PROMPTS):
            told = events[str(i), 0]
            assert answer(told) == greedy(oracle, prompt, COUNT)
            assert_scored_as(expected[i], prompt, told[0].prompt_logprobs)
            assert not any(event.prompt_logprobs for event in told[1:])
            assert told[0].num_cached == 0 or len(prompt) == 1 or engine.stats.num_preemptions
    if num_blocks == 21:
        assert engine.stats.num_preemptions > 0


def test_beside_requests_that_use_the_cache_and_sample(dense_folder, oracle_dense):
    engine = open_engine(dense_folder, max_step_tokens=24)
    prompt = PROMPTS[5]
    plain = [Request(id=f"plain {i}", prompt=prompt[: 20 + i], sampling=replace(ASKING, prompt_logprobs=None)) for i in range(4)]
    serve(engine, plain)
    asking = [Request(id="asks", prompt=prompt, sampling=ASKING), *(replace(one, id=f"{one.id} again") for one in plain)]
    events = serve(engine, asking)
    assert_scored_as(oracle_logprobs(oracle_dense, prompt), prompt, events["asks", 0][0].prompt_logprobs)
    assert all(events[f"plain {i} again", 0][0].num_cached > 0 for i in range(4))


def test_prompt_logprobs_work_without_generating_a_token(dense_folder, oracle_dense):
    engine = open_engine(dense_folder, max_step_tokens=8)
    (event,) = serve(engine, [Request(id="0", prompt=PROMPTS[4], sampling=replace(ASKING, max_tokens=0))])["0", 0]
    assert (event.tokens, event.finish_reason, event.offset) == ((), "length", 0)
    assert_scored_as(oracle_logprobs(oracle_dense, PROMPTS[4]), PROMPTS[4], event.prompt_logprobs)
    assert engine.stats.sampled_tokens == 0


def test_a_resumed_stream_does_not_repeat_prompt_logprobs(dense_folder):
    engine = open_engine(dense_folder)
    request = Request(id="0", prompt=PROMPTS[4], committed=(1,), attempt=1, sampling=ASKING)
    events = serve(engine, [request])["0", 0]
    assert not any(event.prompt_logprobs for event in events)


def test_padding_rows_of_the_vocabulary_are_ignored(dense_folder):
    engine = open_engine(dense_folder)
    sampling = replace(ASKING, prompt_logprobs=NUM_REAL_TOKENS)
    events = serve(engine, [Request(id="0", prompt=PROMPTS[2], sampling=sampling)])["0", 0]
    for told in events[0].prompt_logprobs:
        assert sorted(token for token, _ in told.top) == list(range(NUM_REAL_TOKENS))
