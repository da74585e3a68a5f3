"""`manta serve` of a checkpoint that lies elsewhere: in S3, in Google's store, on a hub. All of them on this machine, and spoken to by
the real libraries; each is a model of one server, and says what the same checkpoint in a folder says."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.hubs import Hub, hugging_face
from tests.stores import gs, s3
from tests.system.server import Server, serving
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = """
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: 20000000}}
models:
- {{model: {{source: "{folder}", name: folder}}}}
- {{model: {{source: "{s3}", name: s3}}, parallel: {{tensor: 2}}}}
- {{model: {{source: "{gs}", name: gs}}}}
- {{model: {{source: "hf://{hf}", name: hf}}}}
"""
ELSEWHERE = ("s3", "gs", "hf")
REPOSITORY = "Qwen/Tiny"
PROMPTS = ("Once upon a time", "def hello(name):\n    return", "Привет")
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
POOLING = {"pooling_mode_mean_tokens": True}
"""Not what a model does of which no file says anything."""


@dataclass(frozen=True)
class Served:
    server: Server
    folder: Path
    hub: Hub
    manta_cache: Path
    hub_cache: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    caches = {"MANTA_CACHE": tmp_path_factory.mktemp("manta"), "HF_HOME": tmp_path_factory.mktemp("hf")}
    with ExitStack() as stack:
        amazon, google = stack.enter_context(s3()), stack.enter_context(gs())
        hub = stack.enter_context(hugging_face(repositories={REPOSITORY: folder}))
        file = tmp_path_factory.mktemp("settings") / "manta.yaml"
        file.write_text(SETTINGS.format(folder=folder, s3=amazon.put(folder), gs=google.put(folder), hf=REPOSITORY))
        environment = {**amazon.environment, **google.environment, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        server = stack.enter_context(
            serving("-c", str(file), environment={**environment, **{name: str(at) for name, at in caches.items()}})
        )
        yield Served(server, folder, hub, caches["MANTA_CACHE"], caches["HF_HOME"])


@pytest.mark.parametrize("model", ELSEWHERE)
def test_it_answers_as_from_a_folder(served: Served, model: str) -> None:
    with served.client() as client:
        for prompt in PROMPTS:
            tokens = {}
            for name in ("folder", model):
                asked = {"model": name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 1}
                choice = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0]  # type: ignore[call-overload]
                tokens[name] = choice.logprobs.tokens
            assert len(tokens[model]) == 16
            assert tokens[model] == tokens["folder"]


@pytest.mark.parametrize("model", ELSEWHERE)
def test_it_pools_as_a_file_in_a_subfolder_says(served: Served, model: str) -> None:
    with served.client() as client:
        vectors = [client.embeddings.create(model=name, input=list(PROMPTS)).data for name in ("folder", model)]
    for expected, found in zip(*vectors, strict=True):
        assert found.embedding == pytest.approx(expected.embedding, abs=1e-5)
        assert sum(number**2 for number in found.embedding) != pytest.approx(1.0, abs=0.01), "as it is without the file"


def test_every_rank_says_what_it_read_and_two_of_them_read_half_each(served: Served) -> None:
    text = "\n".join(served.server.lines)
    read = [(int(rank), float(size)) for rank, size in re.findall(r"rank (\d) on \S+ read ([\d.]+) MiB of weights in [\d.]+ s", text)]
    assert len(read) == 5, text
    weights_mib = sum(path.stat().st_size for path in served.folder.glob("*.safetensors")) / 2**20
    whole = [size for _, size in read if size > 0.9 * weights_mib]
    halves = [size for _, size in read if size < 0.6 * weights_mib]
    assert (len(whole), len(halves)) == (3, 2), read
    assert sum(halves) < 1.1 * weights_mib


def test_weights_are_copied_from_a_hub_and_not_from_a_store(served: Served) -> None:
    assert {path.name for path in served.manta_cache.rglob("*") if path.is_file()} >= {"config.json", "tokenizer.json", "modules.json"}
    assert not list(served.manta_cache.rglob("*.safetensors"))
    assert [path.name for path in served.hub_cache.rglob("*.safetensors")] == ["model.safetensors"]
    assert sum("model.safetensors" in path for path in served.hub.fetched) == 1, "once for the host, whoever asks"
