"""Embeddings over HTTP and gRPC, from a repository as sentence-transformers writes it: the hidden states of transformers, pooled."""

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from manta_client import AsyncClient, BadRequest, Client
from transformers import Qwen2Model

from engine.plan import TokenEvent
from model.config import InvalidModelConfig, ModelConfig, UnsupportedModel
from model.pooling import PoolingConfig
from serve.text.tokenizer import Tokenizer
from tests.serve.in_process import MODEL, Fronts, fronts

TEXTS = ["Once upon a time there was a sea.", "Grüße! 🙂", "x", "the sea " * 30]
IDS = [9, 10, 11, 300, 301]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": True,
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def written(folder: Path, to: Path) -> Path:
    """As gte-Qwen2 is: code of its own without a causal mask, the last token's state, normalised, an end of sequence behind each text."""
    shutil.copytree(folder, to)
    edit(to / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    edit(to / "tokenizer_config.json", add_eos_token=True)
    (to / "modules.json").write_text(json.dumps(MODULES))
    (to / "1_Pooling").mkdir()
    (to / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    return to


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tiny_folder, tmp_path_factory.mktemp("gte") / "model")


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Fronts]:
    async with fronts(folder) as both:
        yield both


class Oracle:
    """transformers with the same weights, every token seeing all others."""

    def __init__(self, folder: Path) -> None:
        self._model = Qwen2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._tokenizer = Tokenizer.from_folder(folder)

    def ids(self, text: str) -> list[int]:
        end = self._tokenizer.appended_eos_id
        assert end is not None
        return [*self._tokenizer.encode(text), end]

    @torch.inference_mode()
    def vector(self, ids: list[int], dimensions: int | None = None) -> list[float]:
        seen = {"full_attention": torch.zeros(1, 1, len(ids), len(ids))}
        last_D = self._model(torch.tensor([ids]), attention_mask=seen).last_hidden_state[0, -1, :dimensions].double()
        return (last_D / last_D.norm()).tolist()


async def test_openais_client_gets_the_states_of_transformers(running: Fronts, folder: Path) -> None:
    oracle = Oracle(folder)
    async with openai.AsyncOpenAI(base_url=f"{running.http}/v1", api_key="none", max_retries=0) as client:
        for format in ("float", "base64", openai.NOT_GIVEN):
            answer = await client.embeddings.create(model=MODEL, input=TEXTS, encoding_format=format)
            assert [one.index for one in answer.data] == [0, 1, 2, 3]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(oracle.ids(text)) for text in TEXTS)
            for text, one in zip(TEXTS, answer.data, strict=True):
                raw = one.embedding
                numbers = np.frombuffer(base64.b64decode(raw), "<f4").tolist() if isinstance(raw, str) else raw
                assert numbers == pytest.approx(oracle.vector(oracle.ids(text)), abs=1e-4)
        (alone,) = (await client.embeddings.create(model=MODEL, input=TEXTS[0])).data
        assert alone.embedding == pytest.approx(oracle.vector(oracle.ids(TEXTS[0])), abs=1e-4)
        of_ids = (await client.embeddings.create(model=MODEL, input=[IDS, IDS[:1]], dimensions=5)).data
        assert [one.embedding for one in of_ids] == [pytest.approx(oracle.vector(ids, 5), abs=1e-4) for ids in (IDS, IDS[:1])]


async def test_grpc_and_the_client_give_the_same(running: Fronts, folder: Path) -> None:
    async with AsyncClient(running.grpc) as client, httpx.AsyncClient(base_url=running.http, timeout=60) as http:
        over_http = (await http.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS})).json()["data"]
        answer = await client.embeddings.create(input=TEXTS)
        assert [one.vector for one in answer.data] == [pytest.approx(one["embedding"], abs=1e-6) for one in over_http]
        assert answer.vector == answer.data[0].vector
        assert len((await client.embeddings.create(input=IDS, dimensions=3)).vector) == 3
        with pytest.raises(BadRequest, match="dimensions"):
            await client.embeddings.create(input=IDS, dimensions=10_000)

    def read() -> tuple[float, ...]:
        with Client(running.grpc) as synchronous:
            return synchronous.embeddings.create(input=TEXTS[0], model=MODEL).vector

    assert await asyncio.to_thread(read) == pytest.approx(answer.vector, abs=1e-6)


async def test_more_inputs_than_the_engine_takes_at_once_are_all_answered(running: Fronts) -> None:
    async with httpx.AsyncClient(base_url=running.http, timeout=120) as http:
        answer = (await http.post("/v1/embeddings", json={"model": MODEL, "input": [[at % 500, 7] for at in range(300)]})).json()
        assert [one["index"] for one in answer["data"]] == list(range(300))
        assert answer["data"][1]["embedding"] == pytest.approx(answer["data"][1]["embedding"])
        assert answer["usage"]["prompt_tokens"] == 600
        assert running.source.is_idle


async def test_a_key_that_comes_again_is_answered_from_what_is_kept(running: Fronts) -> None:
    async with AsyncClient(running.grpc) as client, httpx.AsyncClient(base_url=running.http, timeout=60) as http:
        body, headers = {"model": MODEL, "input": TEXTS}, {"idempotency-key": "once"}
        first, again = [(await http.post("/v1/embeddings", json=body, headers=headers)).json() for _ in range(2)]
        assert first["data"] == again["data"]
        assert len(running.source.requests) == len(TEXTS)
        kept = [await client.embeddings.create(input=TEXTS, idempotency_key="twice") for _ in range(2)]
        assert kept[0].data == kept[1].data
        assert len(running.source.requests) == 2 * len(TEXTS)
        refused = await http.post("/v1/embeddings", json=body | {"input": "sea"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "idempotency-key")
        assert len(running.source.requests) == 2 * len(TEXTS)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "nothing in it": ({"input": []}, "input"),
    "an empty list of ids": ({"input": [[]]}, "input"),
    "an id that is none": ({"input": [[10**6]]}, "input"),
    "mixed": ({"input": ["a", [1]]}, "input"),
    "too many": ({"input": ["a"] * 2_049}, "input"),
    "no dimensions": ({"dimensions": 0}, "dimensions"),
    "more than there are": ({"dimensions": 17_000}, "dimensions"),
    "no such format": ({"encoding_format": "int8"}, "encoding_format"),
    "too long": ({"input": "sea " * 30_000}, "input"),
}


@pytest.mark.parametrize(("changes", "param"), WRONG.values(), ids=WRONG.keys())
async def test_what_cannot_be_is_refused_by_name(running: Fronts, changes: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=running.http, timeout=60) as http:
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": "a"} | changes)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert (await http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})).status_code == 200


async def test_who_is_refused_anyway_is_not_tokenized(running: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
    full = TokenEvent("other", 0, 0, 0, finish_reason="error", error_kind="QueueFull", error_message="7 wait")
    monkeypatch.setattr(running.service, "_refusal", lambda _tenant: full)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_args, **_more: pytest.fail("it was tokenized"))
    async with httpx.AsyncClient(base_url=running.http, timeout=60) as http:
        assert (await http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})).status_code == 429


async def test_a_model_does_only_what_it_is_for(running: Fronts, both: Fronts) -> None:
    async with httpx.AsyncClient(base_url=running.http, timeout=60) as http:
        for path, body in (("chat/completions", {"messages": [{"role": "user", "content": "a"}]}), ("completions", {"prompt": "a"})):
            refused = await http.post(f"/v1/{path}", json={"model": MODEL} | body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")
    async with httpx.AsyncClient(base_url=both.http, timeout=60) as http, AsyncClient(both.grpc) as client:
        refused = await http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
        assert (refused.status_code, refused.json()["error"]["code"], refused.json()["error"]["param"]) == (400, "not_supported", "model")
        assert (await http.post("/v1/embeddings", json={"model": "other", "input": "a"})).status_code == 404
        with pytest.raises(BadRequest, match="no embeddings"):
            await client.embeddings.create(input="a")


def test_the_files_say_how(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    assert PoolingConfig.from_checkpoint(tiny_folder) is None
    assert PoolingConfig.from_checkpoint(folder) == PoolingConfig(kind="last", normalise=True)
    assert ModelConfig.from_checkpoint(tiny_folder).is_causal
    assert not ModelConfig.from_checkpoint(folder).is_causal
    mean = written(tiny_folder, tmp_path / "mean")
    edit(mean / "1_Pooling" / "config.json", pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True)
    edit(mean / "config.json", is_causal=True)  # what is said goes before what is known of the code
    (mean / "modules.json").write_text(json.dumps(MODULES[:2]))
    assert PoolingConfig.from_checkpoint(mean) == PoolingConfig(kind="mean", normalise=False)
    assert ModelConfig.from_checkpoint(mean).is_causal
    edit(mean / "1_Pooling" / "config.json", pooling_mode="cls")
    assert PoolingConfig.from_checkpoint(mean) == PoolingConfig(kind="first", normalise=False)
    bare = written(tiny_folder, tmp_path / "bare")
    (bare / "modules.json").unlink()
    edit(bare / "config.json", architectures=["Qwen2Model"])
    assert PoolingConfig.from_checkpoint(bare) == PoolingConfig(kind="last", normalise=True)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda f: (f / "modules.json").write_text("[]"), InvalidModelConfig),
        (lambda f: (f / "modules.json").write_text("{"), InvalidModelConfig),
        (
            lambda f: (f / "modules.json").write_text(json.dumps([*MODULES, {"type": "a.Dense"}])),
            UnsupportedModel,
        ),
        (lambda f: (f / "modules.json").write_text(json.dumps([MODULES[1] | {"path": "../elsewhere"}])), InvalidModelConfig),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), InvalidModelConfig),
        (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True), UnsupportedModel),
        (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_lasttoken=False, pooling_mode_max_tokens=True), UnsupportedModel),
        (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode="weightedmean"), UnsupportedModel),
    ],
)
def test_files_that_say_something_else_are_refused(tiny_folder: Path, tmp_path: Path, damage: Any, error: type[Exception]) -> None:
    folder = written(tiny_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(error):
        PoolingConfig.from_checkpoint(folder)
