"""Hostile values in well-formed protobuf messages: each is answered or refused as the client's mistake, and the engine lives."""

import asyncio
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.grpc.generated import service_pb2
from tests.serve.in_process import MODEL, fronts

NUMBERS = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e300]))
WHOLE = st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1), st.integers(-2, 24))
OPTIONS = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from([1, 2, 3, 4, 0, 2**31 - 1])},
    optional=dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), NUMBERS)
    | dict.fromkeys(("top_k", "n", "min_tokens", "logprobs"), WHOLE)
    | {
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": st.dictionaries(st.integers(-5, 700), st.floats(), max_size=3),
        "stop": st.lists(st.text(max_size=5), max_size=5),
        "stop_token_ids": st.lists(st.integers(-2, 700), max_size=3),
        "ignore_eos": st.booleans(),
    },
)
MODELS = st.sampled_from([MODEL] * 12 + ["", "../x"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from([1, 2, 2, 3, 3, 0, 99]), "content": st.text(max_size=40)}), max_size=4)
PROMPTS = st.lists(
    st.one_of(
        st.builds(lambda text: {"text": text}, st.text(max_size=40)),
        st.builds(lambda ids: {"token_ids": {"ids": ids}}, st.lists(st.integers(-2, 700), max_size=8)),
        st.just({}),
    ),
    max_size=3,
)
CHATS = st.builds(
    lambda model, messages, options: service_pb2.ChatRequest(model=model, messages=messages, options=_said(options)),
    MODELS,
    MESSAGES,
    OPTIONS,
)
COMPLETIONS = st.builds(
    lambda model, prompts, options, echo: service_pb2.GenerateRequest(model=model, prompts=prompts, options=_said(options), echo=echo),
    MODELS,
    PROMPTS,
    OPTIONS,
    st.booleans(),
)
MINE = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
"""What a client may have done wrong. Anything else is the server's fault."""


def _said(options: dict) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def fuzz_grpc(folder: Path, cases: int) -> None:
    """So many calls of well-formed messages with hostile values; the engine must live and be idle at the end."""

    async def all_of_them() -> None:
        async with fronts(folder) as running, grpc.aio.insecure_channel(running.grpc.removeprefix("grpc://")) as channel:
            loop, seen = asyncio.get_running_loop(), []

            async def call(message: object) -> None:
                method = "Chat" if isinstance(message, service_pb2.ChatRequest) else "Generate"
                rpc = channel.unary_unary(
                    f"/manta.v1.MantaService/{method}",
                    request_serializer=lambda one: one.SerializeToString(),
                    response_deserializer=(service_pb2.ChatResponse if method == "Chat" else service_pb2.GenerateResponse).FromString,
                )
                try:
                    await rpc(message, timeout=60)
                    seen.append("OK")
                except grpc.aio.AioRpcError as error:
                    if error.code().name not in MINE:
                        raise AssertionError(f"{error} for {message}") from error
                    seen.append(error.code().name)

            @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(st.one_of(CHATS, COMPLETIONS))
            def one(message: object) -> None:
                asyncio.run_coroutine_threadsafe(call(message), loop).result(90)

            await asyncio.to_thread(one)
            assert running.source.ready()
            async with asyncio.timeout(30):
                while not running.source.is_idle:  # noqa: ASYNC110 (an engine's thread tells nobody)
                    await asyncio.sleep(0.01)
            print(f"{len(seen)} calls: { {code: seen.count(code) for code in sorted(set(seen))} }")

    asyncio.run(all_of_them())


def test_no_values_in_a_message_break_the_grpc_front(tiny_folder: Path) -> None:
    fuzz_grpc(tiny_folder, 200)


@pytest.mark.slow
def test_ten_thousand_messages_do_not_break_the_grpc_front(tiny_folder: Path) -> None:
    fuzz_grpc(tiny_folder, 10_000)
