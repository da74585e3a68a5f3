"""/tokenize, /detokenize, /tokenizer_info and /version over a real service."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from model.generation_config import GenerationDefaults
from serve.http.app import create_app
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedSource, events_of


@pytest.fixture
async def tokens(smol_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer = Tokenizer.from_folder(smol_folder)
    facts = ModelFacts(
        name="tiny",
        folder=smol_folder,
        max_context_tokens=512,
        vocab_size=tokenizer.num_real_tokens,
        num_real_tokens=tokenizer.num_real_tokens,
        defaults=GenerationDefaults(),
        created=0,
        tokenizer_info={"eos_token": "<|im_end|>"},
    )
    service = Service(model=facts, tokenizer=tokenizer, source=ScriptedSource(lambda request: events_of(request, [[1], [2]])))
    transport = httpx.ASGITransport(create_app(lambda: service, Limits()))
    async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
        yield client


async def test_a_text_survives_there_and_back(tokens: httpx.AsyncClient) -> None:
    there = (await tokens.post("/tokenize", json={"prompt": "Hello, wörld", "add_special_tokens": False})).json()
    assert there["count"] == len(there["tokens"])
    assert there["max_model_len"] == 512
    back = (await tokens.post("/detokenize", json={"tokens": there["tokens"]})).json()
    assert back == {"prompt": "Hello, wörld"}


async def test_each_token_can_be_told_as_text(tokens: httpx.AsyncClient) -> None:
    said = (await tokens.post("/tokenize", json={"prompt": "Hello", "return_token_strs": True, "model": "tiny"})).json()
    assert "".join(said["token_strs"]) == "Hello"


async def test_messages_are_put_through_the_template(tokens: httpx.AsyncClient) -> None:
    chat = (await tokens.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello"}]})).json()
    text = (await tokens.post("/tokenize", json={"prompt": "Hello"})).json()
    assert chat["count"] > text["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(tokens: httpx.AsyncClient, path: str, body, param: str) -> None:
    answer = await tokens.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_ids_that_the_model_does_not_have_are_refused(tokens: httpx.AsyncClient) -> None:
    assert (await tokens.post("/detokenize", json={"tokens": [10**9]})).status_code == 400
    assert (await tokens.post("/detokenize", json={"tokens": [-1]})).status_code == 400


async def test_another_model_is_not_found(tokens: httpx.AsyncClient) -> None:
    assert (await tokens.post("/tokenize", json={"prompt": "a", "model": "other"})).status_code == 404
    assert (await tokens.get("/tokenizer_info", params={"model": "other"})).status_code == 404


async def test_the_tokenizer_and_the_version_are_told(tokens: httpx.AsyncClient) -> None:
    assert (await tokens.get("/tokenizer_info")).json() == {"eos_token": "<|im_end|>"}
    assert (await tokens.get("/version")).json()["version"]
    assert (await tokens.head("/version")).status_code == 200


async def test_the_ledger_is_a_header_for_who_asks(http: httpx.AsyncClient, service, chat_body) -> None:
    from serve.request_timing import RequestTiming

    service.timing = RequestTiming(front_s=0.001, queue_s=0, prefill_s=0.25, decode_s=0, network_s=0, detokenise_s=0)
    asked = await http.post("/v1/chat/completions", json=chat_body, headers={"x-manta-ledger": "1"})
    assert "prefill;dur=250.000" in asked.headers["server-timing"]
    assert "server-timing" not in (await http.post("/v1/chat/completions", json=chat_body)).headers
    streamed = await http.post("/v1/chat/completions", json={**chat_body, "stream": True}, headers={"x-manta-ledger": "1"})
    assert ": server-timing front;dur=1.000" in streamed.text.split("data: [DONE]")[0]
    assert (await http.post("/v1/chat/completions", json=chat_body, headers={"x-manta-ledger": "yes"})).status_code == 400


async def test_a_field_that_is_not_known_is_refused_in_strict_mode(service, chat_body) -> None:
    transport = httpx.ASGITransport(create_app(lambda: service, Limits(), strict=True))
    async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
        refused = await client.post("/v1/chat/completions", json={**chat_body, "temperatur": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "temperatur"
        assert (await client.post("/v1/chat/completions", json=chat_body)).status_code == 200
