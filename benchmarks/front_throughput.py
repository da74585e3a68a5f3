"""Throughput of one front process in tokens per second: 512 streams from a replica that always has the next token ready.

    python -m benchmarks.front_throughput [--streams 512] [--seconds 10]

The replica is a separate process with a real intake. It sends one message per step with a token for every stream, in columns, as soon as
the front has consumed earlier ones. The front is this process, with a front's real parts: link and router; then also the service; then also
the frames of server-sent events. Each of the three figures includes the previous parts. No HTTP server and no model.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.channel import Address, PrivateFolder
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.health import State
from cluster.intake import Intake
from cluster.messages import Pong
from cluster.replica_link import ReplicaLink
from cluster.router import Router
from engine.gc_tuning import tune_gc
from engine.output import EngineOutput, TokenBatch
from engine.plan import TokenEvent
from engine.request import Request, SamplingParams
from serve.caller import ANONYMOUS
from serve.http.chat import ChatStreamFormat
from serve.http.context import RequestContext
from serve.http.schema import ChatBody
from serve.http.sse import event_bytes
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, Message, Options
from serve.service import Service
from serve.text.tokenizer import Tokenizer

IN_FLIGHT = 4
"""Steps that may be in flight to the front, so that the front is the bottleneck."""


@dataclass
class Stream:
    """The replica's state of one choice."""

    request: Request
    offset: int

    def first(self, token: int) -> TokenEvent:
        self.offset += 1
        return TokenEvent(self.request.id, self.request.choice, self.request.attempt, self.offset - 1, (token,))


def replica(tell: Any, taken: Any, num_streams: int, vocabulary: list[int]) -> None:
    """A replica without a model: every stream gets its next token in every step, sent in columns as the engine does."""
    streams: dict[tuple[str, int], Stream] = {}
    lock, folder = threading.Lock(), PrivateFolder()

    def submit(request: Request) -> None:
        with lock:
            streams[request.key] = Stream(request, len(request.committed))

    intake = Intake(
        folder=folder,
        node="n",
        tcp_host=None,
        submit=submit,
        cancel=lambda id, choice: streams.pop((id, choice), None) and None,
        pong=lambda: Pong(ready=True, num_running=0, num_waiting=0),
        failed=print,
        front_silence_s=600.0,
        heartbeat_s=0.5,
    )
    intake.start()
    tell.send(intake.address)
    sent = 0
    try:
        while not tell.poll(0.01 if len(streams) < num_streams else 0):
            with lock:
                all_of_them = list(streams.values()) if len(streams) >= num_streams else []
            if all_of_them and sent - taken.value < IN_FLIGHT * len(all_of_them):
                token = vocabulary[sent // len(all_of_them) % len(vocabulary)]
                begun = [stream for stream in all_of_them if stream.offset]
                output = EngineOutput(
                    events=[stream.first(token) for stream in all_of_them if not stream.offset], token_batches=_token_batches(begun, token)
                )
                intake.deliver(output)
                sent += len(all_of_them)
            elif all_of_them:
                time.sleep(0.0002)
    finally:
        intake.close()
        folder.close()


def _token_batches(streams: list[Stream], token: int) -> list[TokenBatch]:
    if not streams:
        return []
    columns = np.array([(stream.request.tag, stream.offset, token) for stream in streams], dtype=np.int64)
    for stream in streams:
        stream.offset += 1
    return [TokenBatch(columns[:, 0], columns[:, 1], columns[:, 2], [None] * len(streams))]  # type: ignore[list-item]


@dataclass
class Front:
    router: Router
    service: Service


@contextlib.asynccontextmanager
async def front_of(address: Address, folder: Path) -> AsyncGenerator[Front, None]:
    record = ReplicaRecord(id="r", model="m", state=State.READY, address=address)

    class Only:
        known = (record,)

        async def refresh(self) -> tuple[ReplicaRecord, ...]:
            return self.known

    config = RouterConfig(max_buffered_tokens=1_000_000, replica_silence_s=600.0, stall_timeout_s=600.0, policy="least_loaded")
    router = Router(replicas=Only(), connect=lambda record: ReplicaLink(record, node="n", config=config), config=config)
    tokenizer = Tokenizer.from_folder(folder)
    service = Service(model=ModelFacts.from_checkpoint(folder, name="m", tokenizer=tokenizer), tokenizer=tokenizer, source=router)
    await router.open()
    while not router.ready():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield Front(router, service)
    finally:
        await router.close()


class Count:
    """Counts tokens that reached their consumers. ``shared`` makes the count visible to the replica."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self._tokens = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    @tokens.setter
    def tokens(self, value: int) -> None:
        self._tokens = value
        if value - self._shared.value >= 64:
            self._shared.value = value


async def router_only(front: Front, number: int, count: Count) -> None:
    request = Request(id=f"router-{number}", prompt=(1,), sampling=SamplingParams(max_tokens=10**9))
    async with aclosing(front.router.stream(request)) as events:
        async for event in events:
            count.tokens += len(event.tokens)


def asked(number: int, kind: str) -> ChatRequest:
    # Practically endless: a stream that ended would have to be replaced.
    options = Options(max_tokens=1_000_000, ignore_eos=True, seed=number)
    return ChatRequest(request_id=f"{kind}-{number}", model="m", messages=(Message(role="user", content="hi"),), options=options)


async def with_text(front: Front, number: int, count: Count) -> None:
    async with aclosing(front.service.chat(asked(number, "text"))) as events:
        async for event in events:
            count.tokens += len(event.tokens)


async def with_frames(front: Front, number: int, count: Count) -> None:
    body = ChatBody(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)  # type: ignore[list-item]
    context = RequestContext(
        id="c",
        created=0,
        model="m",
        arrived_s=0.0,
        session="",
        caller=ANONYMOUS,
        priority=0,
        wants_timing=False,
        deadline_s=None,
        idempotency_key="",
    )
    events = front.service.chat(asked(number, "frames"))
    first = await anext(events)
    async with aclosing(event_bytes(first, events, ChatStreamFormat(context, body))) as written:
        async for frame in written:
            count.tokens += frame.count(b"data: ")


@dataclass(frozen=True)
class Figure:
    tokens_per_s: float
    cpu_us_per_token: float


async def measure(
    front: Front, relay: Callable[[Front, int, Count], Awaitable[None]], taken: Any, num_streams: int, seconds: float
) -> Figure:
    """Measure for ``seconds`` once all streams have started."""
    count = Count(taken)
    tasks = [asyncio.ensure_future(relay(front, number, count)) for number in range(num_streams)]
    while count.tokens < 8 * num_streams and not any(task.done() for task in tasks):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    begun, cpu, before = time.perf_counter(), time.process_time(), count.tokens
    await asyncio.sleep(seconds)
    took, cpu_took, num = time.perf_counter() - begun, time.process_time() - cpu, count.tokens - before
    failed = [task.exception() for task in tasks if task.done() and task.exception()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if failed:
        raise RuntimeError(f"{len(failed)} streams failed, the first with {failed[0]!r}")
    return Figure(num / took, cpu_took / max(num, 1) * 1e6)


async def run(num_streams: int, seconds: float, folder: Path) -> dict[str, Figure]:
    tokenizer = Tokenizer.from_folder(folder)
    whole = [token for token in range(3, tokenizer.num_real_tokens) if tokenizer.token_bytes(token).isalpha()]  # each gives a frame
    figures = {}
    for name, relay in (("router", router_only), ("and text", with_text), ("and frames", with_frames)):
        spawn = multiprocessing.get_context("spawn")
        (here, there), taken = spawn.Pipe(), spawn.Value("q", 0, lock=False)
        process = spawn.Process(target=replica, args=(there, taken, num_streams, whole))
        process.start()
        try:
            address = await asyncio.to_thread(here.recv)
            async with front_of(address, folder) as front:
                figures[name] = await measure(front, relay, taken, num_streams, seconds)
        finally:
            here.send("end")
            process.join(10)
            process.kill()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--model", type=Path, default=None, help="a folder with config.json and tokenizer; a tiny one is made otherwise")
    arguments = parser.parse_args()
    tune_gc()  # as a front does
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.model or _tiny(Path(made))
        figures = asyncio.run(run(arguments.streams, arguments.seconds, folder))
    print(f"{arguments.streams} streams, a token each per step, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for name, figure in figures.items():
        print(f"{name:<12}{figure.tokens_per_s:>12,.0f} tokens/s {figure.cpu_us_per_token:>8.1f} us of the front's CPU per token")


def _tiny(folder: Path) -> Path:
    from tests.serve.vocabularies import write_smol

    config = json.loads((write_smol(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**8}))  # so that no stream ends
    return folder


if __name__ == "__main__":
    main()
