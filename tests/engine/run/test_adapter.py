"""A model with an adapter behind the real engine."""

from pathlib import Path

import pytest

from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from model.adapter_config import AdapterError
from tests.engine.run.test_end_to_end import answer, serve
from tests.engine.run.tiny_models import engine_config, float32_config
from tests.model.adapters import low_rank, make_adapter, write_adapter
from tests.model.driver import seeded_prompts

COUNT = 8


def test_an_engine_generates_what_peft_does_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    oracle = make_adapter("9_heads", tmp_path, r=4, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"])
    prompts = seeded_prompts(oracle.vocab_size, [5, 17])
    config = engine_config()
    runner_config = float32_config(num_blocks=100, block_tokens=config.block_tokens)
    runner_config = type(runner_config)(**{**vars(runner_config), "num_real_tokens": None})
    adapter = tmp_path / "adapter"
    engine = Engine(LocalExecutor.open(oracle.folder, runner_config=runner_config, engine_config=config, adapter=adapter), config)
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
    events = serve(engine, [Request(id=str(i), prompt=tuple(prompt), sampling=sampling) for i, prompt in enumerate(prompts)])
    assert [list(answer(events[str(i), 0])) for i in range(2)] == [oracle.greedy(prompt, COUNT) for prompt in prompts]
    other = write_adapter(tmp_path / "other", low_rank("model.layers.3.mlp.up_proj", 50, 72))
    with pytest.raises(AdapterError, match="2 of its tensors do not exist"):
        LocalExecutor.open(oracle.folder, runner_config=runner_config, engine_config=config, adapter=other)
