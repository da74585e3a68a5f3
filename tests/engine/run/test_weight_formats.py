"""Weights in other formats than stored: what that may change in an answer, and what not."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.request import Request
from tests.engine.run.test_end_to_end import COUNT, GREEDY, PROMPTS, answer, open_engine, serve
from tests.engine.run.tiny_models import SHAPE, greedy, write_moe


def requests() -> list[Request]:
    return [Request(id=str(i), prompt=prompt, sampling=GREEDY) for i, prompt in enumerate(PROMPTS)]


def test_a_checkpoint_in_bfloat16_answers_as_transformers_does_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).bfloat16().save_pretrained(tmp_path)
    engine = open_engine(tmp_path)
    events = serve(engine, requests())
    engine.executor.close()
    oracle = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert [answer(events[str(i), 0]) for i in range(len(PROMPTS))] == [greedy(oracle, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_mixture_of_experts_does_not_depend_on_the_batch(tmp_path: Path, quantize: str) -> None:
    engine = open_engine(write_moe(tmp_path), quantize=quantize, prefix_cache=False)
    together, alone = serve(engine, requests()), serve(engine, requests(), at_once=False)
    engine.executor.close()
    assert {key: answer(events) for key, events in together.items()} == {key: answer(events) for key, events in alone.items()}
