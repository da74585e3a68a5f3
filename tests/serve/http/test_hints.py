"""Fields that newer clients send to chats: what has no effect is named, and what is not offered is refused with what would do."""

from typing import Any

import httpx
import pytest

from serve.http.app import create_app
from tests.serve.http.conftest import ScriptedService

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {
                "store": False,
                "service_tier": "auto",
                "reasoning_effort": None,
                "verbosity": "medium",
                "metadata": {},
                "modalities": ["text"],
            },
            None,
        ),
        ({"functions": [], "function_call": "auto", "audio": None, "prediction": None, "web_search_options": None, "n": 1}, None),
        ({"prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"max_tokens": 5, "max_completion_tokens": 5, "parallel_tool_calls": True, "logprobs": False}, None),
        ({"store": True, "metadata": {"a": "b"}}, "metadata, store"),
        ({"store": 0}, "store"),
        ({"reasoning_effort": "low", "verbosity": "low", "service_tier": "priority"}, "reasoning_effort, service_tier, verbosity"),
        ({"prediction": {"type": "content", "content": "Hello"}, "prompt_cache_retention": "24h"}, "prediction, prompt_cache_retention"),
    ],
)
async def test_a_hint_is_named_where_it_says_something(
    http: httpx.AsyncClient, chat_body: dict[str, Any], fields: dict[str, Any], named: str | None
) -> None:
    answer = await http.post(CHAT, json=chat_body | fields)
    assert answer.status_code == 200
    assert answer.headers.get("x-manta-ignored-fields") == named


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"functions": [{"name": "a"}]}, "functions", "send tools"),
        ({"function_call": {"name": "a"}}, "function_call", "send tool_choice"),
        ({"web_search_options": {}}, "web_search_options", "a function of your own"),
        ({"modalities": ["text", "audio"]}, "modalities", "writes text"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "leave it out"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "send one"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "'function'"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "leave it out"),
    ],
)
async def test_what_is_not_offered_is_refused_with_what_would_do(
    http: httpx.AsyncClient, chat_body: dict[str, Any], fields: dict[str, Any], param: str, advice: str
) -> None:
    answer = await http.post(CHAT, json=chat_body | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert advice in error["message"]


async def test_strictly_a_hint_is_refused(service: Any, chat_body: dict[str, Any]) -> None:
    app = create_app(lambda: service, strict=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as http:
        assert (await http.post(CHAT, json=chat_body | {"store": False})).status_code == 200
        assert (await http.post(CHAT, json=chat_body | {"store": True})).json()["error"]["param"] == "store"


async def test_an_answer_that_was_refused_once_is_part_of_a_conversation(
    http: httpx.AsyncClient, service: ScriptedService, chat_body: dict[str, Any]
) -> None:
    parts = [{"type": "text", "text": "Well,"}, {"type": "refusal", "refusal": "no."}]
    said = [*chat_body["messages"], {"role": "assistant", "content": parts, "refusal": None, "audio": None, "annotations": []}]
    assert (await http.post(CHAT, json=chat_body | {"messages": [*said, *chat_body["messages"]]})).status_code == 200
    assert service.asked[0].messages[1].content == "Well,\nno."
