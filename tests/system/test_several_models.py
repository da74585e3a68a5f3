"""Two models in one server: each has its own engines and settings, and both are behind the same fronts."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from manta_client import Client, NotFound

from tests.system.server import Server, serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = """
runner: {{dtype: float32}}
models:
- model: {{source: {folder}, name: single}}
- model: {{source: {folder}, name: "team/split"}}
  parallel: {{tensor: 2}}
  runner: {{max_context_tokens: 512}}
"""
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("settings") / "manta.yaml"
    file.write_text(SETTINGS.format(folder=demo_folder))
    with serving("-c", str(file)) as server:
        yield server


def test_both_are_listed_with_their_own_settings_and_answer(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as http, Client(server.grpc) as grpc:
        lengths = {model.id: model.max_model_len for model in http.models.list()}  # type: ignore[attr-defined]
        assert list(lengths) == [model.id for model in grpc.models.list()] == ["single", "team/split"]
        assert lengths["single"] > lengths["team/split"] == 512
        answers = set()
        for name in lengths:
            asked = {"model": name, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
            answers.add(http.chat.completions.create(**asked).choices[0].message.content)  # type: ignore[call-overload]
            answers.add(grpc.chat.create(**asked).text)
        assert len(answers) == 1  # it is the same checkpoint after all


def test_a_third_is_not_found_by_either_front(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as http, pytest.raises(openai.NotFoundError) as refused:
        http.chat.completions.create(model="third", messages=QUESTION)  # type: ignore[arg-type]
    assert refused.value.code == "model_not_found"
    with Client(server.grpc) as grpc, pytest.raises(NotFound):
        grpc.chat.create(model="third", messages=QUESTION)


def test_three_ranks_serve_them_and_the_server_is_ready(server: Server) -> None:
    assert len(server.ranks()) == 3
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert sum("Manta serves" in line for line in server.lines) == 2
