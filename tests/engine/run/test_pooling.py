"""Embeddings are transformers' hidden states, pooled, however the prompt is chunked, with and without a causal mask."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Model

from engine.engine import Engine
from engine.request import Pooling, Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.process_executor import ProcessExecutor
from parallel.topology import Topology
from tests.engine.run.test_end_to_end import PROMPTS, open_engine, serve
from tests.engine.run.tiny_models import engine_config, float32_config

KINDS = ("last", "mean", "first")


@pytest.fixture(scope="module")
def bare_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as an embedding model stores them: without a head, and with other names."""
    folder = tmp_path_factory.mktemp("bare")
    Qwen2Model.from_pretrained(dense_folder, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both_ways_folder(bare_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And without a causal mask."""
    folder = tmp_path_factory.mktemp("both-ways")
    for file in bare_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    return folder


@functools.cache
def transformers_model(folder: Path) -> torch.nn.Module:
    return Qwen2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def oracle(folder: Path, prompt: tuple[int, ...], kind: str, *, is_causal: bool = True) -> torch.Tensor:
    model = transformers_model(folder)
    seen = None if is_causal else {"full_attention": torch.zeros(1, 1, len(prompt), len(prompt))}  # no mask
    hidden_TD = model(torch.tensor([prompt]), attention_mask=seen).last_hidden_state[0]
    return {"last": hidden_TD[-1], "first": hidden_TD[0], "mean": hidden_TD.mean(0)}[kind]


def asking(prompt: tuple[int, ...], kind: str, name: str, *, is_causal: bool = True) -> Request:
    pooling = Pooling(kind=kind, is_causal=is_causal)
    return Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=0), pooling=pooling)


def vector(events: list) -> torch.Tensor:
    (event,) = events
    assert (event.finish_reason, event.tokens, event.error_message) == ("stop", (), None)
    return torch.from_numpy(np.frombuffer(event.embedding, "<f4").copy())


def check(engine: Engine, folder: Path, *, is_causal: bool = True) -> None:
    for _ in range(2):  # the second time with what the first left in the cache
        requests = [asking(prompt, kind, f"{i} {kind}", is_causal=is_causal) for i, prompt in enumerate(PROMPTS) for kind in KINDS]
        events = serve(engine, requests)
        for i, prompt in enumerate(PROMPTS):
            for kind in KINDS:
                expected = oracle(folder, prompt, kind, is_causal=is_causal)
                torch.testing.assert_close(vector(events[f"{i} {kind}", 0]), expected, atol=1e-4, rtol=1e-4)
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize(("max_step_tokens", "num_blocks"), [(512, 400), (5, 400), (5, 21)])
def test_they_are_those_of_transformers_however_prompts_are_cut(dense_folder, max_step_tokens, num_blocks):
    engine = open_engine(dense_folder, num_blocks=num_blocks, max_step_tokens=max_step_tokens)
    check(engine, dense_folder)
    if num_blocks == 400:
        assert engine.stats.prefix_hit_tokens > 0  # by those that pool the last token's state


def test_a_decoder_stored_without_its_head_gives_the_same(bare_folder):
    check(open_engine(bare_folder), bare_folder)


@pytest.mark.parametrize("backend", ["cpu", "native", "reference"])
def test_all_tokens_may_see_each_other(bare_folder, both_ways_folder, backend):
    config = engine_config(max_step_tokens=70)
    runner = float32_config(num_blocks=400, block_tokens=config.block_tokens, attention_backend=backend)
    try:
        engine = Engine(LocalExecutor.open(both_ways_folder, runner_config=runner, engine_config=config), config)
    except ValueError as error:
        pytest.skip(str(error))  # our kernels are not built here
    check(engine, bare_folder, is_causal=False)
    assert engine.stats.prefix_hit_tokens == 0


def test_a_prompt_that_cannot_be_chunked_and_exceeds_a_step_is_refused(both_ways_folder):
    engine = open_engine(both_ways_folder, max_step_tokens=33)
    long, fits = (asking(PROMPTS[at], "last", str(at), is_causal=False) for at in (6, 5))
    events = serve(engine, [long, replace(fits, id="fits")])
    assert events["6", 0][0].error_kind == "PromptCannotBeCut"
    assert "64 tokens" in events["6", 0][0].error_message
    assert "33 in one step" in events["6", 0][0].error_message
    vector(events["fits", 0])


def test_beside_requests_for_answers(dense_folder, oracle_dense):
    engine = open_engine(dense_folder, max_step_tokens=16)
    answers = [
        Request(id=f"answer {i}", prompt=prompt, sampling=SamplingParams(temperature=0, max_tokens=5)) for i, prompt in enumerate(PROMPTS)
    ]
    alone = serve(engine, answers)
    mixed = serve(engine, [*answers, *(asking(prompt, "mean", str(i)) for i, prompt in enumerate(PROMPTS))])
    for request in answers:
        assert [event.tokens for event in mixed[request.key]] == [event.tokens for event in alone[request.key]]
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(vector(mixed[str(i), 0]), oracle(dense_folder, prompt, "mean"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("topology", [Topology(tp=2), pytest.param(Topology(pp=2), marks=pytest.mark.slow)], ids=str)
def test_tensor_parallel_ranks_give_the_same(bare_folder, both_ways_folder, topology):
    executor = ProcessExecutor(
        checkpoint_folder=both_ways_folder,
        topology=topology,
        runner_config=float32_config(num_blocks=400, block_tokens=4),
        engine_config=engine_config(),
    )
    try:
        check(Engine(executor, engine_config()), bare_folder, is_causal=False)
    finally:
        executor.close()
