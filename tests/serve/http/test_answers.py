"""What a good request gets: one JSON document, or a stream of events; and who is told when things go wrong."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from engine.errors import PoisonedRequest, QueueFull
from serve.http.app import create_app
from serve.request import CompletionRequest, Message
from tests.serve.http.conftest import MODEL, ScriptedService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def events(answer: httpx.Response) -> list[Any]:
    """The stream's data, each parsed but for the last [DONE]."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [data if data == "[DONE]" else json.loads(data) for data in (frame.removeprefix("data: ") for frame in frames)]


async def test_a_chat_answer_has_openais_shape(http: httpx.AsyncClient, chat_body: Any) -> None:
    answer = (await http.post(CHAT, json=chat_body)).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "Hello world"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2}}


async def test_every_option_reaches_the_service(http: httpx.AsyncClient, service: ScriptedService, chat_body: Any) -> None:
    said = {
        "temperature": 0.5,
        "top_p": 1,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 7,
        "n": 2,
        "min_tokens": 1,
        "ignore_eos": True,
    }
    shaped = {"logit_bias": {"5": -100, "6": 1.5}, "stop": "END", "stop_token_ids": [3], "max_completion_tokens": 9}
    await http.post(CHAT, json=chat_body | said | shaped | {"logprobs": True, "top_logprobs": 3})
    options = service.asked[0].options
    assert {name: getattr(options, name) for name in said} == said
    assert options.logit_bias == ((5, -100.0), (6, 1.5))
    assert (options.stop, options.stop_token_ids, options.max_tokens, options.logprobs) == (("END",), (3,), 9, 3)


async def test_what_a_client_does_not_say_stays_unsaid(http: httpx.AsyncClient, service: ScriptedService, chat_body: Any) -> None:
    await http.post(CHAT, json=chat_body)
    options = service.asked[0].options
    assert (options.temperature, options.n, options.max_tokens, options.seed, options.logprobs) == (None,) * 5


async def test_text_parts_are_joined(http: httpx.AsyncClient, service: ScriptedService, chat_body: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await http.post(CHAT, json=chat_body | {"messages": [{"role": "user", "content": parts, "name": "Ann"}]})
    assert service.asked[0].messages == (Message(role="user", content="one\ntwo", name="Ann"),)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        ("", ("",)),
        ([[]], ((),)),
    ],
)
async def test_a_prompt_comes_in_four_shapes(
    http: httpx.AsyncClient, service: ScriptedService, completion_body: Any, prompt: Any, prompts: Any
) -> None:
    await http.post(COMPLETIONS, json=completion_body | {"prompt": prompt, "echo": True})
    (asked,) = service.asked
    assert isinstance(asked, CompletionRequest)
    assert asked.prompts == prompts
    assert asked.echo


async def test_chat_logprobs_name_token_bytes_and_alternatives(http: httpx.AsyncClient, chat_body: Any) -> None:
    answer = (await http.post(CHAT, json=chat_body | {"logprobs": True, "top_logprobs": 2})).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["Hello", " wor", "ld"]
    assert content[0]["bytes"] == list(b"Hello")
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0, -2.0]


async def test_completion_logprobs_are_parallel_lists(http: httpx.AsyncClient, completion_body: Any) -> None:
    whole = (await http.post(COMPLETIONS, json=completion_body | {"logprobs": 1})).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["Hello", " wor", "ld"]
    assert whole["text_offset"] == [0, 5, 9]
    assert whole["top_logprobs"][0] == {"Hello0": -1.0, "Hello": -0.5}
    streamed = events(await http.post(COMPLETIONS, json=completion_body | {"logprobs": 1, "stream": True}))
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed[:-1] if chunk["choices"][0]["logprobs"]]
    assert {name: [value for piece in pieces for value in piece[name]] for name in whole} == whole


async def test_a_stream_begins_with_each_choices_role_and_ends_with_done(http: httpx.AsyncClient, chat_body: Any) -> None:
    *chunks, done = events(await http.post(CHAT, json=chat_body | {"stream": True, "n": 2}))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks[2:])
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_streamed_text_is_the_whole_one(http: httpx.AsyncClient, chat_body: Any, completion_body: Any, path: str) -> None:
    body = (chat_body if path == CHAT else completion_body) | {"n": 2}
    whole = (await http.post(path, json=body)).json()
    streamed = events(await http.post(path, json=body | {"stream": True}))[:-1]

    def text(part: Any) -> str:
        return str(part.get("text") or part.get("delta", part.get("message", {})).get("content") or "")

    for choice in whole["choices"]:
        parts = [part for chunk in streamed for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(map(text, parts)) == text(choice)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]


async def test_usage_comes_last_and_alone_when_asked_for(http: httpx.AsyncClient, chat_body: Any) -> None:
    *chunks, last, done = events(await http.post(CHAT, json=chat_body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert (last["choices"], last["usage"]["total_tokens"], done) == ([], 9, "[DONE]")
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_running_usage_comes_with_every_chunk_when_asked_for(http: httpx.AsyncClient, chat_body: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await http.post(CHAT, json=chat_body | {"stream": True, "stream_options": options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[1:-1]] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_refusal_for_lack_of_room_has_its_status_and_retry_after(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: Any, stream: bool
) -> None:
    service.failure = QueueFull(limit=3, retry_after_s=1.5)
    answer = await http.post(CHAT, json=chat_body | {"stream": stream})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "overloaded"
    assert service.num_open == 0


async def test_an_error_inside_a_stream_is_an_event_and_there_is_no_done(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: Any
) -> None:
    service.failure, service.fails_at = PoisonedRequest("twice"), 2
    answer = await http.post(CHAT, json=chat_body | {"stream": True})
    *chunks, error = events(answer)
    assert answer.status_code == 200
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello wor"
    assert error == {"error": {"message": "twice", "type": "server_error", "param": None, "code": "poisoned_request"}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fails_at", [0, 2])
async def test_an_unforeseen_failure_tells_nothing_of_the_house(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: Any, stream: bool, fails_at: int
) -> None:
    service.failure, service.fails_at = RuntimeError("SECRET at /home/manta"), fails_at
    answer = await http.post(CHAT, json=chat_body | {"stream": stream})
    assert answer.status_code == (200 if stream and fails_at else 500)
    assert "internal_error" in answer.text
    assert "SECRET" not in answer.text
    assert "[DONE]" not in answer.text


async def test_a_stream_that_stops_short_never_looks_complete(http: httpx.AsyncClient, service: ScriptedService, chat_body: Any) -> None:
    service.forgets_the_end = True
    *_, last = events(await http.post(CHAT, json=chat_body | {"stream": True}))
    assert last["error"]["code"] == "internal_error"


async def test_a_request_id_is_echoed_or_made(http: httpx.AsyncClient, chat_body: Any) -> None:
    assert (await http.post(CHAT, json=chat_body, headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
    made = {(await http.get("/livez")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


async def test_behind_rays_proxy_the_id_is_left_for_the_proxy_to_tell(service: ScriptedService) -> None:
    app = create_app(lambda: service, behind_ray=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
        assert "x-request-id" not in (await client.get("/livez", headers={"x-request-id": "rays"})).headers


@pytest.mark.parametrize("request_id", ["a" * 129, "a b", "ä".encode(), ""])
async def test_a_request_id_that_is_none_is_refused(http: httpx.AsyncClient, chat_body: Any, request_id: str | bytes) -> None:
    answer = await http.post(CHAT, json=chat_body, headers=[("x-request-id", request_id)])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-id"
    assert answer.headers["x-request-id"].startswith("req-")


async def test_one_client_id_for_two_requests_does_not_make_them_one(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: Any
) -> None:
    await asyncio.gather(*(http.post(CHAT, json=chat_body, headers={"x-request-id": "same"}) for _ in range(2)))
    assert len({asked.request_id for asked in service.asked}) == 2


async def test_models_are_listed_and_retrieved_by_names_with_slashes(http: httpx.AsyncClient) -> None:
    (listed,) = (await http.get("/v1/models")).json()["data"]
    assert listed == (await http.get(f"/v1/models/{MODEL}")).json()
    assert listed == {
        "id": MODEL,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "manta",
        "root": MODEL,
        "parent": None,
        "max_model_len": 2048,
    }
    assert (await http.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/readyz", "/health"])
async def test_readiness_follows_the_service_and_liveness_does_not(http: httpx.AsyncClient, service: ScriptedService, path: str) -> None:
    assert (await http.get(path)).status_code == 200
    service.is_ready = False
    answer = await http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"]
    assert (await http.get("/livez")).status_code == 200
    assert (await http.head("/livez")).status_code == 200


@pytest.mark.filterwarnings("error")
async def test_the_api_describes_itself(http: httpx.AsyncClient) -> None:
    api = (await http.get("/openapi.json")).json()
    schema = api["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].removeprefix("#/components/schemas/") in api["components"]["schemas"]
    chat = api["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "max_completion_tokens", "logit_bias", "stream_options"} <= chat.keys()


async def test_whoever_opens_the_servers_address_is_told_what_it_serves_and_where(http: httpx.AsyncClient) -> None:
    answer = await http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    (name,) = (model["id"] for model in (await http.get("/v1/models")).json()["data"])
    assert name in answer.text.splitlines()[1]
    for path in re.findall(r"^  (/\S+)", answer.text, re.MULTILINE):
        assert path in ("/v1", "/metrics") or (await http.get(path)).status_code == 200, path
