"""openai-python, unchanged, against the real service on a real socket."""

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from engine.errors import QueueFull
from serve.http.app import create_app
from serve.model_facts import ModelFacts
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.serve.http.loopback import ANSWER, ScriptedTokens, eventually, served

ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def tokens(smol: Tokenizer, smol_folder: Path) -> ScriptedTokens:
    return ScriptedTokens(smol, eos=ModelFacts.from_checkpoint(smol_folder, name="x", tokenizer=smol).defaults.eos_token_ids[0])


@pytest.fixture
async def client(tokens: ScriptedTokens, smol: Tokenizer, smol_folder: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    facts = ModelFacts.from_checkpoint(smol_folder, name="smol", tokenizer=smol)
    service = Service(model=facts, tokenizer=smol, source=tokens)
    async with (
        served(create_app(lambda: service)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_a_chat_is_answered(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    answer = await client.chat.completions.create(model="smol", messages=ASK, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(tokens.tokens)
    assert answer.usage.prompt_tokens == len(tokens.asked[0].prompt)


async def test_a_chat_streams_the_same_text(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="smol", messages=ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


async def test_the_stream_helper_assembles_the_answer(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="smol", messages=ASK) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER


async def test_a_developers_message_is_what_a_systems_is(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    for role in ("system", "developer"):
        await client.chat.completions.create(model="smol", messages=[{"role": role, "content": "Be brief."}, *ASK])
    assert tokens.asked[0].prompt == tokens.asked[1].prompt


async def test_completions_take_text_and_ids(client: openai.AsyncOpenAI) -> None:
    texts = await client.completions.create(model="smol", prompt=["one", "two"], max_tokens=100)
    assert [choice.text for choice in texts.choices] == [ANSWER, ANSWER]
    ids = await client.completions.create(model="smol", prompt=[[9, 10], [11]], max_tokens=100, n=2)
    assert [choice.index for choice in ids.choices] == [0, 1, 2, 3]
    stream = await client.completions.create(model="smol", prompt="one", max_tokens=100, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


async def test_an_answer_stops_at_a_string_and_at_a_length(client: openai.AsyncOpenAI) -> None:
    stopped = await client.chat.completions.create(model="smol", messages=ASK, stop=["Paris"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The capital of France is ", "stop")
    cut = await client.chat.completions.create(model="smol", messages=ASK, max_completion_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


async def test_several_choices_are_streamed_side_by_side(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    texts = {0: "", 1: ""}
    async for chunk in await client.chat.completions.create(model="smol", messages=ASK, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: ANSWER, 1: ANSWER}
    assert [asked.choice for asked in tokens.asked] == [0, 1]


async def test_logprobs_come_with_bytes_that_make_the_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="smol", messages=ASK, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode().removesuffix("<|im_end|>") == ANSWER
    assert all(len(token.top_logprobs) == 2 for token in content)
    older = await client.completions.create(model="smol", prompt="one", logprobs=1, max_tokens=3)
    assert len(older.choices[0].logprobs.tokens) == len(older.choices[0].logprobs.token_logprobs) == 3


async def test_a_seed_reaches_the_engine_and_none_is_resolved_before_it(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    for seed in (5, 5, openai.NOT_GIVEN, openai.NOT_GIVEN):
        await client.chat.completions.create(model="smol", messages=ASK, seed=seed)
    first, second, third, fourth = (asked.sampling.seed for asked in tokens.asked)
    assert first == second == 5
    assert third != fourth


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["smol"]
    assert (await client.models.retrieve("smol")).id == "smol"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 2.0001}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, None),
        ({"seed": 10**30}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"640": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, None),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"extra_body": {"min_p": -1}}, "min_p"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_tokens": 6}, "max_tokens": 5}, "min_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 5_000}]}, None),
    ],
    ids=lambda value: repr(value)[:50],
)
async def test_wrong_values_are_bad_requests_that_name_the_field(
    client: openai.AsyncOpenAI, tokens: ScriptedTokens, wrong: dict, param: str | None, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**({"model": "smol", "messages": ASK, "stream": stream} | wrong))
    assert param in (None, refused.value.param)
    assert refused.value.type == "invalid_request_error"
    assert tokens.asked == []


@pytest.mark.parametrize("prompt", [[-1], [640], [[5], [10_000_000]], [[]]], ids=repr)
async def test_prompts_of_impossible_ids_are_bad_requests(client: openai.AsyncOpenAI, prompt: list) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="smol", prompt=prompt)
    assert refused.value.param == "prompt"


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="gpt-4", messages=ASK)
    assert refused.value.code == "model_not_found"


async def test_overload_is_a_rate_limit_error(client: openai.AsyncOpenAI, tokens: ScriptedTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: object) -> AsyncIterator[object]:
        raise QueueFull(limit=1)
        yield

    monkeypatch.setattr(tokens, "stream", refuse)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model="smol", messages=ASK, stream=stream)
        assert refused.value.response.headers["retry-after"] == "1"


async def test_an_error_inside_a_stream_is_raised_by_the_client(
    client: openai.AsyncOpenAI, tokens: ScriptedTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokens.stream

    async def break_off(request: object) -> AsyncIterator[object]:
        async for event in whole(request):
            if event.offset == 3:
                raise RuntimeError("SECRET")
            yield event

    monkeypatch.setattr(tokens, "stream", break_off)
    with pytest.raises(openai.APIError, match="internal error") as raised:
        async for _ in await client.chat.completions.create(model="smol", messages=ASK, stream=True):
            pass
    assert "SECRET" not in str(raised.value)


async def test_a_client_that_leaves_a_stream_ends_the_work(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    tokens.waits = True
    stream = await client.chat.completions.create(model="smol", messages=ASK, stream=True, n=2)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert tokens.num_open == 2
    await stream.close()
    await eventually(lambda: tokens.num_open == 0)


async def test_a_client_that_gives_up_waiting_ends_the_work(client: openai.AsyncOpenAI, tokens: ScriptedTokens) -> None:
    tokens.waits = True
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(model="smol", messages=ASK, timeout=0.3)
    await eventually(lambda: tokens.asked and tokens.num_open == 0)
