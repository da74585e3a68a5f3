"""The demo model in float32 against transformers: 64 greedy tokens on 20 prompts, however they are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Executor
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.process_executor import ProcessExecutor
from engine.run.settings import RunnerConfig
from parallel.topology import Topology

pytestmark = pytest.mark.timeout(1800)
NUM_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three primary colours are",
    "1, 2, 3, 5, 8, 13,",
    "Photosynthesis is the process by which",
    "To make a cup of tea, first",
    "The largest planet of the solar system is",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Dear Sir or Madam,",
    "A triangle has three",
    "In 1969, people first",
    "El perro come",
    "The opposite of hot is",
    "import numpy as np\n",
    "Shakespeare wrote",
    "Ocean waves are caused by",
    "If it rains tomorrow, we will",
    "The quick brown fox",
)
BYTES_PER_BLOCK = 2 * 30 * 16 * 3 * 64 * 4
"""Keys and values of 30 layers, 16 tokens, 3 heads of 64, float32: on one rank."""


@pytest.fixture(scope="module")
def prompts(demo_folder: Path) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    return [tuple(tokenizer.encode(text).ids) for text in PROMPTS]


@pytest.fixture(scope="module")
def golden(demo_folder: Path, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What transformers generates, without stopping at the end of sequence: all prompts padded on the left to one batch."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    model.generation_config = GenerationConfig()  # plain greedy: none of the checkpoint's defaults, no end of sequence
    longest = max(map(len, prompts))
    ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    return [tuple(row) for row in out[:, longest:].tolist()]


@contextmanager
def executor_of(tp: int, folder: Path, engine_config: EngineConfig, kv_blocks: int) -> Iterator[Executor]:
    runner_config = RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=kv_blocks * BYTES_PER_BLOCK)
    executor: Executor
    if tp == 1:
        executor = LocalExecutor.open(folder, runner_config=runner_config, engine_config=engine_config)
    else:
        executor = ProcessExecutor(
            checkpoint_folder=folder, topology=Topology(tp=tp), runner_config=runner_config, engine_config=engine_config
        )
    try:
        yield executor
    finally:
        executor.close()


def answers_of(engine: Engine, prompts: list[tuple[int, ...]], *, at_once: bool) -> list[tuple[int, ...]]:
    """The output tokens of each prompt, submitted together or one after the other."""
    groups = [range(len(prompts))] if at_once else [range(i, i + 1) for i in range(len(prompts))]
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for group in groups:
        for index in group:
            sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
            engine.submit(Request(id=str(index), prompt=prompts[index], sampling=sampling))
        running = {str(index) for index in group}
        while running:
            for event in engine.turn():
                assert event.finish_reason in (None, "length"), event
                answers[event.request_id].extend(event.tokens)
                if event.finish_reason:
                    running.discard(event.request_id)
    return [tuple(tokens) for tokens in answers.values()]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_prompts_in_one_batch_answer_as_transformers_does(tp, prefix_cache, demo_folder, prompts, golden):
    config = EngineConfig(prefix_cache=prefix_cache, max_step_tokens=64)
    with executor_of(tp, demo_folder, config, kv_blocks=400) as executor:
        engine = Engine(executor, config)
        assert answers_of(engine, prompts, at_once=True) == golden
        if prefix_cache:
            assert answers_of(engine, prompts, at_once=True) == golden, "the second time, with all that is cached"
            assert engine.stats.prefix_hit_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_prompts_one_by_one_answer_as_transformers_does(tp, demo_folder, prompts, golden):
    config = EngineConfig()
    with executor_of(tp, demo_folder, config, kv_blocks=400) as executor:
        assert answers_of(Engine(executor, config), prompts, at_once=False) == golden


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pool_too_small_for_all_preempts_and_answers_the_same(tp, demo_folder, prompts, golden):
    config = EngineConfig(max_step_tokens=128)
    with executor_of(tp, demo_folder, config, kv_blocks=30) as executor:
        engine = Engine(executor, config)
        assert answers_of(engine, prompts, at_once=True) == golden
        assert engine.stats.num_preemptions > 0
