"""The five things that must hold after every bad request, whichever front got it."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2

from serve.grpc.generated import service_pb2, service_pb2_grpc
from tests.serve.bad_input.table import GRPC_PARAMS, Row

MOST_ERROR_BYTES = 2_000
MOST_GROWTH_BYTES = 20 << 20
GOLDEN = {"temperature": 0.9, "seed": 7, "max_tokens": 8, "ignore_eos": True}
QUESTION = "Tell me of the sea."


@dataclass
class Target:
    """A running server, and what it answered before anything bad came."""

    http: httpx.AsyncClient
    stub: service_pb2_grpc.MantaServiceStub
    model: str
    pids: Callable[[], frozenset[int]]
    """Everything that must live on: processes, or threads of this one."""
    rss: Callable[[], int]
    answer_s: float
    """How long an answer may take."""
    golden_text: str = ""
    golden_ids: tuple[int, ...] = ()
    golden_vector: tuple[float, ...] = ()
    golden_pids: frozenset[int] = frozenset()

    async def note_golden(self) -> None:
        self.golden_text = await self.ask_http()
        self.golden_ids, text = await self.ask_grpc()
        assert text == self.golden_text
        self.golden_vector = await self.embed_grpc()
        self.golden_pids = self.pids()

    async def ask_http(self) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": QUESTION}], **GOLDEN}
        answer = await self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    async def ask_grpc(self) -> tuple[tuple[int, ...], str]:
        request = service_pb2.ChatRequest(model=self.model, messages=[{"role": "ROLE_USER", "content": QUESTION}], options=GOLDEN)
        (choice,) = (await self.stub.Chat(request)).choices
        return tuple(choice.token_ids), choice.message.content

    async def embed_grpc(self) -> tuple[float, ...]:
        request = service_pb2.EmbedRequest(model=self.model, inputs=[{"text": QUESTION}])
        (embedding,) = (await self.stub.Embed(request)).embeddings
        return tuple(embedding.values)

    async def is_unharmed(self) -> None:
        """The next good request gives the golden tokens, a vector comes as well, and nobody was replaced."""
        (ids, text), over_http, vector = await asyncio.gather(self.ask_grpc(), self.ask_http(), self.embed_grpc())
        assert vector == pytest.approx(self.golden_vector, abs=1e-5)
        assert ids == self.golden_ids
        assert text == over_http == self.golden_text
        assert self.pids() >= self.golden_pids


async def refused_over_http(target: Target, row: Row) -> None:
    async with asyncio.timeout(target.answer_s):
        answer = await target.http.request(**row.http(model=target.model))
    assert answer.status_code == row.status, answer.text[:500]
    says_little(answer.text)
    if row.spec.get("method", "POST") == "HEAD":
        return
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert row.param is None or error["param"] == row.param
    assert row.code is None or error["code"] == row.code


async def refused_over_grpc(target: Target, row: Row) -> None:
    method, request = row.grpc(model=target.model)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(target.answer_s):
            await _ended(getattr(target.stub, method)(request, metadata=row.metadata))
    error = caught.value
    assert error.code().name == row.grpc_code, error
    says_little(error.details() or "")
    details = details_of(error)
    if row.code is not None:
        assert details["ErrorInfo"].reason == row.code.upper()
    if row.param is not None:
        (violation,) = details["BadRequest"].field_violations
        assert violation.field in GRPC_PARAMS.get(row.param, (row.param,))


async def _ended(call: grpc.aio.UnaryUnaryCall | grpc.aio.UnaryStreamCall) -> None:
    """A refused stream says its error as an event as well, and nothing before it."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        await call
        return
    async for response in call:
        assert response.WhichOneof("event") == "error"


def says_little(text: str) -> None:
    """No traceback, no path, nothing of what was sent at length, no control characters."""
    assert len(text.encode()) <= MOST_ERROR_BYTES
    assert not any(word in text for word in ("Traceback", 'File "', ".py", "site-packages", "/root", "/home"))
    assert "\x1b" not in text
    assert "aaaaaaaaaa" * 10 not in text


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """google.rpc details by name."""
    trailers = dict(error.trailing_metadata() or ())
    found: dict[str, Any] = {}
    for packed in status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details:
        kind = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])
        found[kind.DESCRIPTOR.name] = kind()
        packed.Unpack(found[kind.DESCRIPTOR.name])
    return found


def resident(*processes: psutil.Process) -> int:
    gc.collect()
    return sum(process.memory_info().rss for process in processes)


@asynccontextmanager
async def targeted(
    http: str, grpc_address: str, *, model: str, pids: Callable[[], frozenset[int]], rss: Callable[[], int], answer_s: float
) -> AsyncIterator[Target]:
    async with httpx.AsyncClient(base_url=http, timeout=60) as client, grpc.aio.insecure_channel(grpc_address) as channel:
        stub = service_pb2_grpc.MantaServiceStub(channel)
        target = Target(http=client, stub=stub, model=model, pids=pids, rss=rss, answer_s=answer_s)
        await target.note_golden()
        yield target


async def least_growth(target: Target, once_more: Callable[[], Awaitable[None]]) -> int:
    """Bytes that each of three rounds took anew, the least: what leaks does so every time, what an allocator keeps for later it keeps once.

    After a round that took less than `MOST_GROWTH_BYTES` nothing is open, and no other follows.
    """
    grown: list[int] = []
    while len(grown) < 3 and min(grown, default=MOST_GROWTH_BYTES) >= MOST_GROWTH_BYTES:
        before = target.rss()
        await once_more()
        grown.append(target.rss() - before)
    return min(grown)
