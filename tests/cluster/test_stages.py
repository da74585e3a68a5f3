"""A long prompt in a pipeline: every stage computes another part of it at the same time."""

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cluster.config import ReplicaConfig
from cluster.replica import Replica
from cluster.worker import ModelRankLauncher
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from parallel.topology import Topology
from tests.cluster.fronts import answer, front
from tests.cluster.waiting_ranks import NUM_PARTS, PART, StagesThatWait
from tests.engine.run.tiny_models import NUM_REAL_TOKENS, float32_config, greedy, write_dense

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("own_ray"), pytest.mark.timeout(400)]

PROMPT = tuple((7 * place) % NUM_REAL_TOKENS for place in range(NUM_PARTS * PART))
ENGINE = EngineConfig(max_step_tokens=PART)
CONFIG = ReplicaConfig(first_step_timeout_s=120, step_timeout_s=120, max_restarts=0, progress_timeout_s=120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("deep"), num_hidden_layers=3, max_position_embeddings=2048)


@pytest.mark.parametrize("num_stages", [2, 3])
async def test_as_many_parts_of_a_prompt_are_under_way_as_there_are_stages(num_stages: int, checkpoint: Path, tmp_path: Path) -> None:
    topology = Topology(pp=num_stages)
    runner = float32_config(num_blocks=160, block_tokens=16, max_context_tokens=2048)
    launcher = ModelRankLauncher(checkpoint_folder=checkpoint, topology=topology, runner_config=runner, engine_config=ENGINE)
    waiting = StagesThatWait(launcher=launcher, begun=tmp_path)
    app = f"stages-{num_stages}"
    replica = Replica(id=app, app=app, model="tiny", launcher=waiting, engine_config=ENGINE, config=CONFIG)
    replica.start()
    try:
        async with front(app) as router:
            tokens = await answer(router, Request(id="long", prompt=PROMPT, sampling=SamplingParams(temperature=0.0, max_tokens=5)))
    finally:
        replica.close(drain=False)
    assert len(os.listdir(tmp_path)) == num_stages * NUM_PARTS, "every stage has had every part"
    assert tokens == list(greedy(AutoModelForCausalLM.from_pretrained(checkpoint), PROMPT, 5))
