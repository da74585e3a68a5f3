"""Hostile values in well-formed protobuf messages: each is answered or refused as the client's mistake, and the engine lives."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.grpc.generated import service_pb2
from serve.grpc.timing import REQUEST_KEY
from serve.idempotency import IDEMPOTENCY_KEY
from serve.session import SESSION_HEADER
from tests.serve.in_process import MODEL, fronts


def mostly(good: st.SearchStrategy, hostile: st.SearchStrategy) -> st.SearchStrategy:
    """A message has many fields: were more than a few of them hostile, none would get as far as the engine."""
    return st.sampled_from(range(15)).flatmap(lambda at: hostile if at == 7 else good)


NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e300]))
WHOLE = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 24))
IDS = st.integers(0, 599)
OPTIONS = st.fixed_dictionaries(
    {"max_tokens": mostly(st.integers(1, 4), st.sampled_from([0, 2**31 - 1]))},
    optional={
        "temperature": mostly(st.floats(0, 2), NUMBERS),
        "top_p": mostly(st.floats(0.01, 1), NUMBERS),
        "min_p": mostly(st.floats(0, 1), NUMBERS),
        "repetition_penalty": mostly(st.floats(0.01, 10), NUMBERS),
        "presence_penalty": mostly(st.floats(-2, 2), NUMBERS),
        "frequency_penalty": mostly(st.floats(-2, 2), NUMBERS),
        "top_k": mostly(st.integers(-1, 700), WHOLE),
        "n": mostly(st.integers(1, 3), WHOLE),
        "min_tokens": mostly(st.integers(0, 1), WHOLE),
        "logprobs": mostly(st.integers(0, 20), WHOLE),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": mostly(
            st.dictionaries(IDS, st.floats(-100, 100), max_size=3), st.dictionaries(st.integers(-5, 700), st.floats(), max_size=3)
        ),
        "stop": mostly(st.lists(st.text(min_size=1, max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=5)),
        "stop_token_ids": mostly(st.lists(IDS, max_size=3), st.lists(st.integers(-2, 700), max_size=3)),
        "ignore_eos": st.booleans(),
    },
)
MODELS = mostly(st.just(MODEL), st.sampled_from(["", "../x"]))
ROLES = mostly(st.sampled_from([1, 2, 3]), st.sampled_from([0, 4, 99]))
MESSAGES = mostly(st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=40)}), min_size=1, max_size=4), st.just([]))
PROMPTS = mostly(
    st.lists(
        st.one_of(
            st.builds(lambda text: {"text": text}, st.text(min_size=1, max_size=40)),
            st.builds(lambda ids: {"token_ids": {"ids": ids}}, st.lists(IDS, min_size=1, max_size=8)),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(
        st.one_of(
            st.builds(lambda text: {"text": text}, st.text(max_size=40)),
            st.builds(lambda ids: {"token_ids": {"ids": ids}}, st.lists(st.integers(-2, 700), max_size=8)),
            st.just({}),
        ),
        max_size=3,
    ),
)
CHATS = st.builds(
    lambda model, messages, options: service_pb2.ChatRequest(model=model, messages=messages, options=options),
    MODELS,
    MESSAGES,
    OPTIONS,
)
COMPLETIONS = st.builds(
    lambda model, prompts, options, echo: service_pb2.GenerateRequest(model=model, prompts=prompts, options=options, echo=echo),
    MODELS,
    PROMPTS,
    OPTIONS,
    st.booleans(),
)
EMBEDDINGS = st.builds(
    lambda model, inputs, rest: service_pb2.EmbedRequest(model=model, inputs=inputs, **rest),
    MODELS,
    PROMPTS,
    st.fixed_dictionaries({}, optional={"dimensions": mostly(st.integers(1, 16), WHOLE), "priority": WHOLE}),
)
TOOLS = [{"name": "look", "parameters": '{"type": "object", "properties": {"far": {"type": "boolean"}}}'}]
FORMS = st.one_of(
    st.just({"tools": TOOLS, "tool_choice": {"mode": 3}}),
    st.just({"tools": TOOLS}),
    st.builds(
        lambda form: {"options": {"max_tokens": 4, "response_format": form}}, st.sampled_from([{"regex": "[a-z ]*"}, {"json_object": True}])
    ),
)
SO_FAR = mostly(
    st.lists(
        st.builds(
            lambda ids, finished: {"token_ids": ids, "finished": finished}, st.lists(IDS, max_size=5), mostly(st.just(False), st.just(True))
        ),
        max_size=1,
    ),
    st.lists(
        st.builds(
            lambda index, ids, finished: {"index": index, "token_ids": ids, "finished": finished},
            WHOLE,
            st.lists(st.integers(-2, 700), max_size=8),
            st.booleans(),
        ),
        max_size=3,
    ),
)


def chats_of_a_form(form: dict) -> st.SearchStrategy:
    """What a client has of them seldom follows the form, or is half of a call."""
    return st.builds(
        lambda messages: service_pb2.ChatRequest(**{"model": MODEL, "messages": messages, "options": {"max_tokens": 4}} | form), MESSAGES
    )


CHATS_THAT_BROKE = st.builds(
    lambda request, so_far: service_pb2.ChatStreamRequest(request=request, so_far=so_far),
    st.one_of(CHATS, FORMS.flatmap(chats_of_a_form)),
    SO_FAR,
)
COMPLETIONS_THAT_BROKE = st.builds(
    lambda request, so_far: service_pb2.GenerateStreamRequest(request=request, so_far=so_far), COMPLETIONS, SO_FAR
)
NO_KEYS = st.one_of(
    st.sampled_from(["a b", "x" * 129, "../x", ""]), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=9)
)
METADATA = st.dictionaries(
    st.sampled_from([IDEMPOTENCY_KEY, SESSION_HEADER, REQUEST_KEY, "traceparent"]), mostly(st.uuids().map(str), NO_KEYS), max_size=2
)
MINE = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
"""What a client may have done wrong. Anything else is the server's fault."""


UNARY = {
    service_pb2.ChatRequest: ("Chat", service_pb2.ChatResponse),
    service_pb2.GenerateRequest: ("Generate", service_pb2.GenerateResponse),
    service_pb2.EmbedRequest: ("Embed", service_pb2.EmbedResponse),
}
STREAMS = {
    service_pb2.ChatStreamRequest: ("ChatStream", service_pb2.ChatStreamResponse),
    service_pb2.GenerateStreamRequest: ("GenerateStream", service_pb2.GenerateStreamResponse),
}
MESSAGES_OF_UNARY_CALLS = st.one_of(CHATS, COMPLETIONS, EMBEDDINGS)
MESSAGES_OF_STREAMS = st.one_of(CHATS_THAT_BROKE, COMPLETIONS_THAT_BROKE)


def fuzz_grpc(folder: Path, cases: int, messages: st.SearchStrategy) -> Counter[str]:
    """So many calls of well-formed messages with hostile values; the engine must live and be idle at the end."""
    seen: Counter[str] = Counter()

    async def all_of_them() -> None:
        async with fronts(folder, pooling="last") as running, grpc.aio.insecure_channel(running.grpc.removeprefix("grpc://")) as channel:
            loop = asyncio.get_running_loop()

            async def call(message: Message, metadata: dict[str, str]) -> None:
                is_stream = type(message) in STREAMS
                method, response = (STREAMS if is_stream else UNARY)[type(message)]
                call_of = channel.unary_stream if is_stream else channel.unary_unary
                rpc = call_of(
                    f"/manta.v1.MantaService/{method}",
                    request_serializer=lambda one: one.SerializeToString(),
                    response_deserializer=response.FromString,
                )
                try:
                    answer = rpc(message, timeout=60, metadata=tuple(metadata.items()))
                    if is_stream:
                        [_ async for _ in answer]
                    else:
                        await answer
                    seen[f"{method} OK"] += 1
                except grpc.aio.AioRpcError as error:
                    if error.code().name not in MINE:
                        raise AssertionError(f"{error} for {message} with {metadata}") from error
                    seen[f"{method} {error.code().name}"] += 1

            @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(messages, METADATA)
            def one(message: Message, metadata: dict[str, str]) -> None:
                asyncio.run_coroutine_threadsafe(call(message, metadata), loop).result(90)

            await asyncio.to_thread(one)
            assert running.source.ready()
            async with asyncio.timeout(30):
                while not running.source.is_idle:  # noqa: ASYNC110 (an engine's thread tells nobody)
                    await asyncio.sleep(0.01)

    asyncio.run(all_of_them())
    print(f"{seen.total()} calls: {dict(sorted(seen.items()))}")
    return seen


def both_happened(seen: Counter[str], methods: Iterable[tuple[str, type]], times: int) -> bool:
    """Fuzzing that only succeeds, or only fails, looks at half of the code."""
    return all(min(seen[f"{method} OK"], seen[f"{method} INVALID_ARGUMENT"]) >= times for method, _ in methods)


def test_no_values_in_a_message_break_the_grpc_front(tiny_folder: Path) -> None:
    seen = fuzz_grpc(tiny_folder, 200, MESSAGES_OF_UNARY_CALLS)
    assert both_happened(seen, UNARY.values(), 5), seen


def test_nothing_that_a_client_says_it_has_of_a_stream_breaks_the_grpc_front(tiny_folder: Path) -> None:
    seen = fuzz_grpc(tiny_folder, 100, MESSAGES_OF_STREAMS)
    assert both_happened(seen, STREAMS.values(), 5), seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_messages_do_not_break_the_grpc_front(tiny_folder: Path) -> None:
    seen = fuzz_grpc(tiny_folder, 10_000, MESSAGES_OF_UNARY_CALLS | MESSAGES_OF_STREAMS)
    assert both_happened(seen, (UNARY | STREAMS).values(), 100), seen


@pytest.mark.slow
def test_two_thousand_calls_for_vectors_do_not_break_the_grpc_front(tiny_folder: Path) -> None:
    seen = fuzz_grpc(tiny_folder, 2_000, EMBEDDINGS)
    assert both_happened(seen, [UNARY[service_pb2.EmbedRequest]], 100), seen
