"""The same seed gives the same text over HTTP, over gRPC and from the service itself."""

import httpx
import openai
import pytest
from manta_client import AsyncClient

from serve.request import ChatRequest, CompletionRequest, Message, Options
from tests.serve.in_process import MODEL, Fronts

QUESTION = "Grüße! Tell me of the sea. 🙂"
SETTINGS = [
    {"temperature": 0, "max_tokens": 24},
    {"temperature": 0.9, "seed": 7, "max_tokens": 24},
    {"temperature": 1.3, "seed": 8, "max_tokens": 16, "top_p": 0.9, "presence_penalty": 0.5, "n": 3},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "three choices"])
async def test_a_chat_says_the_same_everywhere(both: Fronts, options: dict) -> None:
    request = ChatRequest(request_id="r", model=MODEL, messages=(Message(role="user", content=QUESTION),), options=Options(**options))
    expected = [choice.text for choice in (await both.service.collect(request)).choices]
    asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], **options}
    async with openai.AsyncOpenAI(base_url=f"{both.http}/v1", api_key="none", max_retries=0) as http, AsyncClient(both.grpc) as client:
        assert [choice.message.content for choice in (await http.chat.completions.create(**asked)).choices] == expected
        streamed = dict.fromkeys(range(len(expected)), "")
        async for chunk in await http.chat.completions.create(**asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert list(streamed.values()) == expected
        assert [choice.text for choice in (await client.chat.create(**asked)).choices] == expected
        assert [choice.text for choice in (await client.chat.stream(**asked).final()).choices] == expected


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "three choices"])
async def test_a_completion_says_the_same_everywhere(both: Fronts, options: dict) -> None:
    request = CompletionRequest(request_id="r", model=MODEL, prompts=("Once upon", (9, 10, 11)), options=Options(**options))
    expected = [choice.text for choice in (await both.service.collect(request)).choices]
    async with httpx.AsyncClient(base_url=both.http, timeout=60) as http, AsyncClient(both.grpc) as client:
        for text, prompt in (("one", "Once upon"), ("ids", [9, 10, 11])):
            body = {"model": MODEL, "prompt": prompt, **options}
            choices = (await http.post("/v1/completions", json=body)).json()["choices"]
            part = slice(0, len(choices)) if text == "one" else slice(len(choices), None)
            if text == "one" or options["temperature"] == 0:  # a second prompt's choices have other numbers, and so other noise
                assert [choice["text"] for choice in choices] == expected[part]
        answer = await client.completions.create(model=MODEL, prompt=["Once upon", [9, 10, 11]], **options)
        assert [choice.text for choice in answer.choices] == expected
