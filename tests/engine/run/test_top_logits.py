"""With only the top logits the tokens are those of all logits, and rows that need more get all of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.top_logits import needed_top_logits
from parallel.native.library import native
from parallel.native.linear import multiply, pack
from parallel.native.screened import screen_of
from parallel.screened_head import ScreenedHead
from tests.engine.run.sampling_reference import row
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.tiny_models import SHAPE, engine_config, float32_config

VOCAB_SIZE, PADDED, WIDTH = 1500, 1536, 128
SEES_MORE = [
    SamplingParams(),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.0, grammar="start: /a/"),
    SamplingParams(temperature=0.0, logit_bias=((7, 5.0),)),
    SamplingParams(temperature=0.0, repetition_penalty=0.9),
    SamplingParams(temperature=0.0, presence_penalty=-0.1),
    SamplingParams(temperature=0.0, frequency_penalty=-0.1),
    SamplingParams(top_k=65),
    SamplingParams(top_p=0.5),
    SamplingParams(min_p=0.5),
]
params_of_few = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(1, 64),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 5.0]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 99]),
    stop_token_ids=st.just((3, 9)),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("params", SEES_MORE, ids=repr)
def test_a_row_that_needs_all_logits_gets_them_for_the_whole_step(params: SamplingParams) -> None:
    few = row(SamplingParams(temperature=0.0), vocab_size=VOCAB_SIZE)
    other = row(params, vocab_size=VOCAB_SIZE, prompt=(1,), output=(2,))
    assert needed_top_logits([few, few], VOCAB_SIZE) is not None
    assert needed_top_logits([few, other], VOCAB_SIZE) is None
    assert needed_top_logits([few, few._replace(allowed=np.zeros(47, np.int32))], VOCAB_SIZE) is None
    assert needed_top_logits([], VOCAB_SIZE) is None


@pytest.fixture(scope="module")
def screen():
    library = native()
    if library is None or library.screened is None:
        pytest.skip("this processor has no such products, or the kernels are not built here")
    drawn = torch.Generator().manual_seed(1)
    weight = torch.randn(PADDED, WIDTH, generator=drawn) * torch.logspace(-1, 0.3, PADDED).unsqueeze(-1)
    found = screen_of(library, pack("bf16_dot", weight, library.lanes))
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(params_of_few, st.integers(0, 10**6)), min_size=1, max_size=5))
def test_the_tokens_are_those_of_all_logits(screen, rows) -> None:
    library, sampler = native(), Sampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu"))
    x = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for _, seed in rows])
    all_logits = multiply(library, x, screen.exact, None)
    seen = [logits[:VOCAB_SIZE].argsort(descending=True)[: seed % 50].tolist() for logits, (_, seed) in zip(all_logits, rows, strict=True)]
    made = [row(params, vocab_size=VOCAB_SIZE, prompt=ids[::2], output=ids[1::2]) for (params, _), ids in zip(rows, seen, strict=True)]
    wanted = needed_top_logits(made, VOCAB_SIZE)
    assert wanted is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.native.screened._worth_it", lambda panels, count: (panels * count, panels))
        some = screen.multiply(library, x, wanted)
    assert sampler.sample(some, made) == sampler.sample(all_logits, made)


def test_a_rank_answers_the_same_with_top_logits_only(tmp_path, monkeypatch) -> None:
    if native() is None or native().screened is None:
        pytest.skip("this processor has no such products, or the kernels are not built here")
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).bfloat16().save_pretrained(tmp_path)
    runner = replace(float32_config(num_blocks=400, block_tokens=4), dtype="auto")
    params = [SamplingParams(temperature=0.0, max_tokens=12), SamplingParams(top_k=5, seed=3, repetition_penalty=1.1, max_tokens=12)]
    requests = [Request(id=str(i), prompt=prompt, sampling=params[i % 2]) for i, prompt in enumerate(PROMPTS)]
    used, multiplied = [], ScreenedHead.multiply

    def counted(self, x_RD, wanted):
        found = multiplied(self, x_RD, wanted)
        used.append(found is not None)
        return found

    monkeypatch.setattr(ScreenedHead, "multiply", counted)
    monkeypatch.setattr("parallel.native.screened._worth_it", lambda panels, count: (panels * count, panels))
    answers = []
    for _ in range(2):
        engine = Engine(LocalExecutor.open(tmp_path, runner_config=runner, engine_config=engine_config()), engine_config())
        events = serve(engine, requests)
        engine.executor.close()
        answers.append({key: answer(one) for key, one in events.items()})
        monkeypatch.setattr("parallel.embedding.screened_head", lambda *_: None)
    assert all(used)
    assert len(used) > 10
    assert answers[0] == answers[1]
