"""Stages, shards and shared experts behind HTTP: each layout is a model of one server, and all say what one rank says."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.system.server import Server, serving
from tests.system.tiny_model import write_tiny, write_tiny_sparse

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = """
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: 20000000}}
models:
- {{model: {{source: {dense}, name: one-rank}}}}
- {{model: {{source: {dense}, name: stages}}, parallel: {{pipeline: 2}}}}
- {{model: {{source: {dense}, name: shards}}, parallel: {{data: 2}}}}
- {{model: {{source: {sparse}, name: one-rank-of-experts}}}}
- {{model: {{source: {sparse}, name: shards-that-share-experts}}, parallel: {{data: 2, expert: 2}}}}
"""
LIKE = {"stages": "one-rank", "shards": "one-rank", "shards-that-share-experts": "one-rank-of-experts"}
PROMPTS = [
    "Once upon a time",
    "The capital of France is Paris, and water",
    "def hello(name):\n    return",
    "1 2 3 4 5 6 7 8 9",
    "Привет",
    "a",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    dense, sparse = (write(tmp_path_factory.mktemp(name)) for name, write in (("dense", write_tiny), ("sparse", write_tiny_sparse)))
    file = tmp_path_factory.mktemp("settings") / "manta.yaml"
    file.write_text(SETTINGS.format(dense=dense, sparse=sparse))
    with serving("-c", str(file)) as server:
        yield server


def answers(server: Server, model: str) -> list[tuple[str, tuple[str, ...]]]:
    """Greedy texts and their tokens, all asked for at the same time."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:

        def ask(prompt: str) -> tuple[str, tuple[str, ...]]:
            asked = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1}
            choice = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0]  # type: ignore[call-overload]
            return choice.text, tuple(choice.logprobs.tokens)

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            return list(threads.map(ask, PROMPTS))


@pytest.mark.parametrize("model", LIKE)
def test_a_layout_answers_over_http_as_one_rank(server: Server, model: str) -> None:
    expected = answers(server, LIKE[model])
    assert all(len(tokens) == 24 for _, tokens in expected)
    assert len(set(expected)) == len(PROMPTS)
    assert answers(server, model) == expected


def test_eight_ranks_stand_behind_the_five_models(server: Server) -> None:
    assert len(server.ranks()) == 8
