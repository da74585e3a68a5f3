"""The streams that are compared: two protocols, six kinds of requests, each recorded as a `History`."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict

from serve.grpc.generated import messages_pb2, service_pb2, service_pb2_grpc
from tests.history import Golden, GoldenChoice, History

MODEL = "tiny"
LENGTH = 64
FORM = {"type": "array", "items": {"type": "boolean"}, "minItems": 30, "maxItems": 30}
PROMPTS = ("Once upon a time", "The capital of France is", "def hello(name):", "It was the best of times")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11},
    "two": {"temperature": 0.8, "seed": 5, "n": 2},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.7, "seed": 3, "top_p": 0.9},
    "schema": {"temperature": 0.9, "seed": 2},
}
REASONS = {messages_pb2.FINISH_REASON_STOP: "stop", messages_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True)
class Ask:
    """One request; the same in every run."""

    protocol: str
    way: str
    prompt: str
    length: int = LENGTH

    @property
    def name(self) -> str:
        return f"{self.protocol} {self.way} {self.prompt.split()[-1]}"


@dataclass(eq=False)
class Seen:
    """The recording of one stream."""

    ask: Ask
    history: History
    at: list[float] = field(default_factory=list)
    """When the request was sent, and when each chunk of the answer came; `time.monotonic`."""
    on_token: Callable[[int], None] = lambda _count: None

    @property
    def longest_pause_s(self) -> float:
        return max((after - before for before, after in zip(self.at, self.at[1:], strict=False)), default=0.0)

    def tick(self) -> None:
        self.at.append(time.monotonic())
        self.on_token(self.history.num_tokens)


ASKS = tuple(
    Ask(protocol, way, PROMPTS[(at + shift) % 4]) for shift, protocol in enumerate(("http", "grpc")) for at, way in enumerate(WAYS)
)


def golden_of(history: History) -> Golden:
    """The reference from an undisturbed stream."""
    assert history.is_complete, (history.ends, history.wrong)
    assert not history.wrong, history.wrong
    choices = (history.choices[index] for index in sorted(history.choices))
    return Golden(
        tuple(GoldenChoice(tuple(one.tokens), one.text, str(one.finish_reason), tuple(one.logprobs)) for one in choices),
        prompt_tokens=history.prompt_tokens,
    )


async def over_http(url: str, seen: Seen) -> None:
    """Stream by server-sent events. Tokens are identified by their bytes if there are log-probabilities, else by their number and text."""
    ask, history = seen.ask, seen.history
    body: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": ask.length, **WAYS[ask.way]}
    body |= {
        "messages": [{"role": "user", "content": ask.prompt}],
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if ask.way == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "f", "schema": FORM}}
    body |= {"logprobs": True, "top_logprobs": 2} if ask.way == "logprobs" else {}
    seen.tick()
    try:
        limits = aiohttp.ClientTimeout(total=None, sock_read=180)
        async with aiohttp.ClientSession(timeout=limits) as session, session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                history.failed(f"{answer.status} {_code(await answer.text())}")
                return
            counted = 0
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    history.complete()
                    continue
                counted = _take_chunk(seen, json.loads(line.removeprefix(b"data: ")), counted)
            if not history.ends:
                history.broken("no [DONE]")
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        if not history.ends:
            history.broken(f"{type(error).__name__}: {error}"[:120])


def _take_chunk(seen: Seen, chunk: dict[str, Any], counted: int) -> int:
    """Returns the number of completion tokens so far."""
    history = seen.history
    if "error" in chunk:
        history.failed(str(chunk["error"].get("code")))
        return counted
    usage = chunk.get("usage")
    for part in chunk["choices"]:
        index, text = part["index"], part["delta"].get("content") or ""
        known = len(history.choices[index].tokens) if index in history.choices else 0
        if part.get("logprobs"):
            told = part["logprobs"]["content"]
            history.token(index, known, [_id(bytes(one["bytes"])) for one in told], [one["logprob"] for one in told], text)
        elif usage is not None:
            history.token(index, known, [0] * (usage["completion_tokens"] - counted), text=text)
        if usage is not None:
            counted = usage["completion_tokens"]
            seen.tick()
        if part["finish_reason"]:
            history.finish(index, part["finish_reason"])
    if not chunk["choices"] and usage is not None:
        history.usage(usage["completion_tokens"], usage["prompt_tokens"])
    return counted


def _id(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "big")


def _code(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return text[:80]


async def over_grpc(target: str, seen: Seen) -> None:
    """Stream by gRPC messages, which have token ids and offsets."""
    ask, history = seen.ask, seen.history
    options = {"max_tokens": ask.length, "ignore_eos": ask.way != "schema", **WAYS[ask.way]}
    options |= {"logprobs": 2} if ask.way == "logprobs" else {}
    options |= {"response_format": {"json_schema": json.dumps(FORM)}} if ask.way == "schema" else {}
    request = {"model": MODEL, "prompts": [{"text": ask.prompt}], "options": options}
    message = ParseDict({"request": request}, service_pb2.GenerateStreamRequest())
    seen.tick()
    async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            async for event in service_pb2_grpc.MantaServiceStub(channel).GenerateStream(message, timeout=240):
                _take_event(seen, event)
            if not history.ends:
                history.complete()
        except grpc.aio.AioRpcError as error:
            if not history.ends:
                history.broken(f"{error.code().name}: {error.details()}"[:120])


def _take_event(seen: Seen, event: service_pb2.GenerateStreamResponse) -> None:
    history, kind = seen.history, event.WhichOneof("event")
    if kind == "delta":
        one = event.delta
        history.token(one.index, one.offset, list(one.token_ids), [each.logprob for each in one.logprobs], one.text)
        seen.tick()
    elif kind == "finish":
        history.finish(event.finish.index, REASONS[event.finish.finish_reason])
        if event.finish.completion_tokens != len(history.choices[event.finish.index].tokens):
            history.wrong.append(f"choice {event.finish.index}: its end counts {event.finish.completion_tokens} tokens")
    elif kind == "usage":
        history.usage(event.usage.completion_tokens, event.usage.prompt_tokens)
    else:
        history.failed(event.error.reason)


async def follow(url: str, target: str, seen: Seen, *, delay_s: float = 0.0) -> None:
    await asyncio.sleep(delay_s)
    try:
        await (over_http(url, seen) if seen.ask.protocol == "http" else over_grpc(target, seen))
    except asyncio.CancelledError:
        if not seen.history.ends:
            seen.history.left()
        raise
