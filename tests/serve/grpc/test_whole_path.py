"""From the client library over real gRPC through the real service, down to where an engine would begin."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import manta_client
import pytest
from manta_client import AsyncClient, BadRequest, Client, DeadlineExceeded, NotFound, Overloaded

from engine.errors import QueueFull
from engine.plan import TokenEvent, TokenLogprobs
from engine.request import Request
from serve.grpc.server import start_server
from serve.model_facts import ModelFacts
from serve.service import Service
from serve.text.tokenizer import Tokenizer

TEXT = "Grüße, 世界! 🙂 It was the best of times 👩‍👩‍👧 END and more."
MESSAGES = [{"role": "user", "content": "Hi"}]


class ScriptedSource:
    """Says TEXT, token by token; with a temperature it begins at a place that (seed, choice) chooses."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = tuple(tokenizer.encode(TEXT))
        self.requests: list[Request] = []
        self.num_running = 0
        self.holds_after: int | None = None
        """Tokens after which nothing more comes."""
        self.refuses: Exception | None = None

    def ready(self) -> bool:
        return True

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        if self.refuses:
            raise self.refuses
        self.requests.append(request)
        self.num_running += 1
        try:
            ids = self._answer(request)
            for offset, token in enumerate(ids):
                if offset == self.holds_after:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                yield self._event(request, offset, token, last=offset == len(ids) - 1)
        finally:
            self.num_running -= 1

    def _answer(self, request: Request) -> tuple[int, ...]:
        start = 0
        if request.sampling.temperature > 0:
            digest = hashlib.sha256(f"{request.sampling.seed}/{request.choice}".encode()).digest()
            start = int.from_bytes(digest[:4], "big") % len(self._ids)
        return (self._ids[start:] + self._ids[:start])[: request.sampling.max_tokens]

    def _event(self, request: Request, offset: int, token: int, *, last: bool) -> TokenEvent:
        logprobs = request.sampling.logprobs
        top = tuple((other, -1.0 - other) for other in range(300, 300 + (logprobs or 0)))
        return TokenEvent(
            request_id=request.id,
            choice=request.choice,
            attempt=0,
            offset=offset,
            tokens=(token,),
            logprobs=() if logprobs is None else (TokenLogprobs(-0.25, top),),
            num_cached=1,
            finish_reason="length" if last else None,
        )


@pytest.fixture
def source(smol: Tokenizer) -> ScriptedSource:
    return ScriptedSource(smol)


@pytest.fixture
async def endpoint(source: ScriptedSource, smol: Tokenizer, smol_folder) -> AsyncIterator[str]:
    facts = ModelFacts.from_checkpoint(smol_folder, name="smol", tokenizer=smol)
    server, port = await start_server(Service(model=facts, tokenizer=smol, source=source), "127.0.0.1:0")
    yield f"grpc://127.0.0.1:{port}"
    await server.stop(grace=None)


@pytest.fixture
async def client(endpoint: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(endpoint, max_retries=0) as client:
        yield client


async def test_a_chat_is_answered_with_every_character_whole(client: AsyncClient, source: ScriptedSource) -> None:
    answer = await client.chat.create(messages=MESSAGES, temperature=0, max_tokens=200)
    assert (answer.text, answer.model, answer.choices[0].finish_reason) == (TEXT, "smol", "length")
    assert answer.usage.prompt_tokens == len(source.requests[0].prompt)
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids)
    assert answer.usage.cached_tokens == 1


@pytest.mark.parametrize(
    "options", [{}, {"n": 3, "seed": 5}, {"stop": ["END"]}, {"stop": ["🙂", "never"], "logprobs": 2}, {"max_tokens": 4}]
)
async def test_the_streamed_answer_equals_the_unstreamed_one(client: AsyncClient, options: dict) -> None:
    asked = {"messages": MESSAGES, "temperature": 0.8, "seed": 1, "max_tokens": 200, **options}
    whole = await client.chat.create(**asked)
    async with client.chat.stream(**asked) as stream:
        deltas = [delta async for delta in stream]
        final = await stream.final()
    assert (final.choices, final.usage) == (whole.choices, whole.usage)
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert len(deltas) > len(whole.choices)


async def test_a_stop_string_ends_the_answer_before_it_and_is_named(client: AsyncClient) -> None:
    (choice,) = (await client.chat.create(messages=MESSAGES, temperature=0, max_tokens=200, stop="END")).choices
    assert choice.text == TEXT[: TEXT.index("END")]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "END")


async def test_choices_differ_and_a_seed_repeats_them(client: AsyncClient) -> None:
    asked = {"messages": MESSAGES, "n": 2, "temperature": 1.0, "max_tokens": 12}
    one, again, other = [await client.chat.create(**asked, seed=seed) for seed in (7, 7, 8)]
    assert [choice.index for choice in one.choices] == [0, 1]
    assert one.choices == again.choices
    assert one.choices[0].text != one.choices[1].text
    assert one.choices != other.choices


async def test_log_probabilities_name_the_token_and_its_rivals(client: AsyncClient) -> None:
    (choice,) = (await client.chat.create(messages=MESSAGES, temperature=0, max_tokens=4, logprobs=2)).choices
    assert len(choice.logprobs) == len(choice.token_ids) == 4
    assert [each.token_id for each in choice.logprobs] == list(choice.token_ids)
    assert b"".join(each.bytes for each in choice.logprobs).startswith(b"Gr")
    assert all(len(each.top_logprobs) == 2 and each.logprob == -0.25 for each in choice.logprobs)


async def test_prompts_of_text_and_of_ids_are_gone_on_with(client: AsyncClient, source: ScriptedSource, smol: Tokenizer) -> None:
    answer = await client.completions.create(prompt=["Once", smol.encode("Once")], temperature=0, max_tokens=3, echo=True)
    assert source.requests[0].prompt == source.requests[1].prompt == tuple(smol.encode("Once"))
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text.startswith("Once") for choice in answer.choices)
    stream = client.completions.stream(prompt=["Once", smol.encode("Once")], temperature=0, max_tokens=3, echo=True)
    assert (await stream.final()).choices == answer.choices


async def test_the_synchronous_client_reads_the_same(endpoint: str) -> None:
    def read() -> tuple[str, str]:
        with Client(endpoint) as client:
            asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200}
            return client.chat.create(**asked).text, "".join(delta.text for delta in client.chat.stream(**asked))

    assert await asyncio.to_thread(read) == (TEXT, TEXT)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.0001}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, None),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5_000}]}, "messages"),
    ],
)
@pytest.mark.parametrize("method", ["create", "stream"])
async def test_a_bad_value_is_refused_and_named(client: AsyncClient, source: ScriptedSource, options, param, method: str) -> None:
    asked = {"messages": MESSAGES, **options}
    with pytest.raises(BadRequest) as caught:
        await (client.chat.create(**asked) if method == "create" else client.chat.stream(**asked).final())
    assert caught.value.request_id
    assert param is None or caught.value.param == param
    assert source.requests == []


async def test_a_model_that_is_not_served_is_not_found(client: AsyncClient) -> None:
    with pytest.raises(NotFound) as caught:
        await client.chat.create(model="other", messages=MESSAGES)
    assert caught.value.reason == "model_not_found"


async def test_a_full_house_is_told_with_its_time(client: AsyncClient, source: ScriptedSource) -> None:
    source.refuses = QueueFull(limit=8, retry_after_s=1.5)
    with pytest.raises(Overloaded) as caught:
        await client.chat.create(messages=MESSAGES)
    assert (caught.value.retry_after, caught.value.reason) == (1.5, "overloaded")


async def all_ended(source: ScriptedSource) -> None:
    async with asyncio.timeout(60):
        while source.num_running:  # noqa: ASYNC110 (the source has no event to wait for)
            await asyncio.sleep(0.01)


async def test_leaving_a_stream_ends_every_choice_at_the_source(client: AsyncClient, source: ScriptedSource) -> None:
    source.holds_after = 3
    async with client.chat.stream(messages=MESSAGES, n=2, max_tokens=20) as stream:
        await anext(stream)
        assert source.num_running == 2
    await all_ended(source)


@pytest.mark.parametrize("method", ["create", "stream"])
async def test_a_deadline_ends_the_work_at_the_source(client: AsyncClient, source: ScriptedSource, method: str) -> None:
    source.holds_after = 3
    asked = {"model": "smol", "messages": MESSAGES, "max_tokens": 20, "timeout": 0.5}
    with pytest.raises(DeadlineExceeded):
        await (client.chat.create(**asked) if method == "create" else client.chat.stream(**asked).final())
    assert source.requests[0].deadline_s is not None
    await all_ended(source)


async def test_one_bad_request_among_many_good_ones_is_the_only_one_to_fail(client: AsyncClient) -> None:
    def one(number: int):
        return client.chat.create(messages=MESSAGES, temperature=-1.0 if number == 7 else 0.0, max_tokens=200)

    answers = await asyncio.gather(*(one(number) for number in range(32)), return_exceptions=True)
    assert [number for number, answer in enumerate(answers) if isinstance(answer, manta_client.CallFailed)] == [7]
    assert {answer.text for answer in answers if not isinstance(answer, Exception)} == {TEXT}


@pytest.mark.parametrize("method", ["create", "stream"])
async def test_the_front_marks_its_places_in_order(client: AsyncClient, caplog: pytest.LogCaptureFixture, method: str) -> None:
    with caplog.at_level(logging.DEBUG, logger="manta.places"):
        asked = {"messages": MESSAGES, "max_tokens": 5}
        await (client.chat.create(**asked) if method == "create" else client.chat.stream(**asked).final())
    places = [record.args[0] for record in caplog.records if record.name == "manta.places"]
    assert [place for place in places if place in (1, 2, 3, 14)] == [1, 2, 3, 14]


async def test_a_call_the_protocol_does_not_have_is_unimplemented(endpoint: str) -> None:
    async with grpc.aio.insecure_channel(endpoint.removeprefix("grpc://")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/manta.v1.MantaService/Train")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
