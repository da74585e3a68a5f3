"""Definitions of sampling that need a model or a grammar to be tested."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.request import Request, SamplingParams
from engine.run.sampling.sampler import Sampler
from tests.engine.run.sampling_reference import edited_logits, probabilities, row
from tests.engine.run.test_end_to_end import PROMPTS, answer, open_engine, serve
from tests.engine.run.tiny_models import NUM_REAL_TOKENS


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(seed=3, temperature=1.3, repetition_penalty=1.2)])
def test_logprobs_are_those_of_transformers(folder, oracle, params):
    """Of the raw logits over the ids that can be sampled, whatever penalties and temperature chose the token."""
    params = replace(params, max_tokens=8, logprobs=5)
    requests = [Request(id=str(number), prompt=prompt, sampling=params) for number, prompt in enumerate(PROMPTS)]
    events = serve(open_engine(folder), requests)
    for request in requests:
        output = answer(events[request.key])
        with torch.inference_mode():
            logits = oracle(torch.tensor([[*request.prompt, *output]])).logits[0, len(request.prompt) - 1 : -1, :NUM_REAL_TOKENS]
        expected = torch.log_softmax(logits.double(), -1)
        told = [logprobs for event in events[request.key] for logprobs in event.logprobs]
        assert len(told) == len(output)
        for place, (token, logprobs) in enumerate(zip(output, told, strict=True)):
            assert logprobs.logprob == pytest.approx(expected[place, token].item(), abs=1e-4)
            assert [value for _, value in logprobs.top] == pytest.approx(expected[place].topk(5).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_k=3, temperature=1.4), SamplingParams(top_p=0.6), SamplingParams(min_p=0.3)]
)
def test_under_a_grammar_frequencies_are_the_defined_probabilities_of_what_is_allowed(params):
    count, allowed = 6000, [0, 2, 4, 5, 7, 9]
    logits = torch.tensor([1.0, 0.5, -0.5, 2.0, 1.5, 0.0, -1.0, 0.8, 1.2, -2.0])
    words = np.array([sum(1 << token for token in allowed)], np.int32)
    masked = np.full(10, -np.inf)
    masked[allowed] = logits.numpy()[allowed]
    defined = probabilities(edited_logits(masked, params), params)
    rows = [row(params, vocab_size=10, position=place)._replace(allowed=words) for place in range(count)]
    drawn = [one.tokens[0] for one in Sampler(vocab_size=10, device=torch.device("cpu")).sample(logits.expand(count, -1), rows)]
    observed, possible = np.bincount(drawn, minlength=10), defined > 0
    assert observed[~possible].sum() == 0
    assert ((observed - count * defined)[possible] ** 2 / (count * defined[possible])).sum() < 33  # 1 in 10,000 at 9 degrees of freedom
