"""What a client gets past Ray is what it would get through Ray, and a chunk that is missing never goes unnoticed."""

import asyncio
import contextlib
import contextvars
import os
import pickle
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import cluster.bypass
import serve.bypass
import serve.http.bypass
from cluster.bypass import ChunksLost, Receiver, Sender, new_answer_number, socket_exists
from serve.bypass import FrontEndpoint, ProxyEndpoint
from serve.errors import ErrorBody
from serve.http.bypass import FrontBypass, ProxyBypass
from serve.http.sse import EventStreamResponse
from serve.request import TextEvent, Usage

NODE = "a-node"


@pytest.fixture(autouse=True)
def short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


class TextFormat:
    """The text of each event."""

    def start(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def event(self, event: TextEvent) -> Iterator[dict[str, Any]]:
        yield {"text": event.text}

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        return iter(())

    def error(self, error: ErrorBody) -> Iterator[dict[str, Any]]:
        raise AssertionError(error)


class Between:
    """Ray Serve between proxy and front: messages are pickled, and come when they like."""

    def __init__(self, app: Any, delays: random.Random | None = None) -> None:
        self._app, self._delays, self.bodies = app, delays, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def put(message: Any) -> None:
            queue.put_nowait(pickle.dumps(message))

        async def run() -> None:
            try:
                await self._app({**scope, "headers": list(scope["headers"])}, receive, put)
            finally:
                queue.put_nowait(None)

        running = asyncio.create_task(run())
        while (raw := await queue.get()) is not None:
            await self._pause()
            message = pickle.loads(raw)
            self.bodies += message["type"] == "http.response.body" and bool(message["body"])
            await send(message)
        await running

    async def _pause(self) -> None:
        if self._delays is not None:
            await asyncio.sleep(self._delays.choice((0, 0, 0.001, 0.01)))


def front(texts: list[str], delays: random.Random | None = None) -> Any:
    """Answers with these texts, each time it is asked."""

    async def events() -> AsyncIterator[TextEvent]:
        for text in texts[1:]:
            if delays is not None:
                await asyncio.sleep(delays.choice((0, 0, 0, 0.002)))
            yield TextEvent(choice=0, text=text)
        yield TextEvent(choice=0, text="", usage=Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStreamResponse(TextEvent(choice=0, text=texts[0]), events(), TextFormat())(scope, receive, send)  # type: ignore[arg-type]

    return app


async def asked(proxy: Any) -> list[dict[str, Any]]:
    """What a client is sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        sent.append(message)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    await proxy({"type": "http", "method": "POST", "headers": [(b"host", b"a")]}, receive, send)
    return sent


async def come_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (zmq's threads have no event for it)
            await asyncio.sleep(0.001)


async def acquaint(fronts: FrontBypass, proxy: ProxyBypass) -> None:
    """The first request through a proxy goes by Ray, and has the front connect."""
    receiver = proxy._endpoint._open_receiver()
    assert receiver is not None
    await come_true(lambda: fronts._bypass._stream(f"{NODE} 0 {receiver.address}") is not None)


def body(sent: list[dict[str, Any]]) -> bytes:
    assert sent[0]["type"] == "http.response.start"
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    assert all(message.keys() <= {"type", "status", "headers", "body", "more_body"} for message in sent)
    return b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize("seed", range(6))
async def test_the_client_gets_the_same_bytes_in_order_whatever_comes_first(seed: int) -> None:
    delays = random.Random(seed)
    texts = {number: [f"{number}-{place} " for place in range(delays.randint(1, 40))] for number in range(8)}
    plain = {number: body(await asked(front(texts[number]))) for number in texts}
    current: contextvars.ContextVar[int] = contextvars.ContextVar("current")
    proxies = ProxyBypass(lambda *asgi: between[current.get()](*asgi), endpoint=ProxyEndpoint(NODE))
    fronts = FrontBypass(lambda *asgi: front(texts[current.get()], delays)(*asgi), bypass=FrontEndpoint(NODE))
    between = {number: Between(fronts, delays) for number in texts}
    await acquaint(fronts, proxies)

    async def one(number: int) -> bytes:
        current.set(number)
        return body(await asked(proxies))

    assert dict(zip(texts, await asyncio.gather(*map(one, texts)), strict=True)) == plain
    assert not any(ray.bodies for ray in between.values())
    assert proxies._endpoint._receiver is not None
    assert not proxies._endpoint._receiver._streams
    await proxies._endpoint._receiver.close()


async def test_all_that_is_ready_at_once_goes_as_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[int] = []
    decode = cluster.bypass._decode
    monkeypatch.setattr(cluster.bypass, "_decode", lambda raw: messages.append(len(raw)) or decode(raw))
    receiver = cluster.bypass.Receiver()
    sender, endpoint = Sender(receiver.address), [receiver.open() for _ in range(32)]
    await come_true(lambda: sender.is_connected)
    answers = [new_answer_number(incoming.number) for incoming in endpoint]
    for incoming, answer in zip(endpoint, answers, strict=True):
        incoming.begin(answer)
    for turn in range(3):
        for answer in answers:
            sender.put(answer, b"%d" % turn)
        assert [await incoming.take(turn, 10) for incoming in endpoint] == [[b"%d" % turn]] * 32
    assert len(messages) == 3
    sender.close()
    await receiver.close()


async def test_a_front_of_another_host_answers_by_ray() -> None:
    ray = Between(FrontBypass(front(["a", "b"]), bypass=FrontEndpoint("another")))
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_a_front_without_a_bypass_answers_by_ray() -> None:
    ray = Between(front(["a", "b"]))
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_a_chunk_that_is_missing_breaks_the_answer_and_those_after_it_go_by_ray(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve.bypass, "LATE_S", 0.2)
    put = Sender.put
    monkeypatch.setattr(Sender, "put", lambda sender, answer, chunk: None if b'"b"' in chunk else put(sender, answer, chunk))
    fronts = FrontBypass(front(["a", "b", "c"]), bypass=FrontEndpoint(NODE))
    ray = Between(fronts)
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    await acquaint(fronts, proxy)
    with pytest.raises(ChunksLost, match="of 5 chunks 4 came"):
        await asked(proxy)
    assert not ray.bodies
    for _ in range(2):  # one stream is enough to lose
        assert body(await asked(proxy)) == body(await asked(front(["a", "b", "c"])))
    assert ray.bodies == 2 * 5
    assert caplog.text.count("the bypass failed") == 1
    proxy._endpoint._paused_until = 0
    monkeypatch.setattr(Sender, "put", put)
    assert body(await asked(proxy)) == body(await asked(front(["a", "b", "c"])))
    assert ray.bodies == 2 * 5
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_a_front_that_is_lost_leaves_an_answer_without_an_end() -> None:
    async def dies(scope: Any, receive: Any, send: Any) -> None:
        stream = scope[serve.http.bypass.BYPASS_STREAM]
        await send({"type": "http.response.start", "status": 200, "headers": [], serve.http.bypass.PASSED: stream.answer})
        stream.put(b"a")
        await asyncio.sleep(0.05)
        raise RuntimeError("lost")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    fronts = FrontBypass(dies, bypass=FrontEndpoint(NODE))
    proxy = ProxyBypass(Between(fronts), endpoint=ProxyEndpoint(NODE))
    await acquaint(fronts, proxy)
    with pytest.raises(RuntimeError, match="lost"):
        await proxy({"type": "http", "method": "POST", "headers": []}, None, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["more_body"]
    assert proxy._endpoint._receiver is not None
    assert not proxy._endpoint._receiver._streams
    await proxy._endpoint._receiver.close()


async def test_a_front_that_does_not_see_the_proxys_socket_answers_by_ray() -> None:
    ray = Between(FrontBypass(front(["a", "b"]), bypass=FrontEndpoint(NODE)))
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    proxy._endpoint._receiver = cluster.bypass.Receiver()
    seen, proxy._endpoint._receiver.address = proxy._endpoint._receiver.address, proxy._endpoint._receiver.address + "-elsewhere"
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    proxy._endpoint._receiver.address = seen
    await proxy._endpoint._receiver.close()


async def test_whoever_writes_to_a_proxy_that_is_gone_is_told_and_a_new_one_is_written_to() -> None:
    receivers = [cluster.bypass.Receiver(), cluster.bypass.Receiver()]
    fronts = FrontBypass(front(["a"]), bypass=FrontEndpoint(NODE))
    told = [f"{NODE} 0 {receiver.address}" for receiver in receivers]
    await come_true(lambda: fronts._bypass._stream(told[0]) is not None)
    stream = fronts._bypass._stream(told[0])
    assert stream is not None
    incoming = receivers[0].open()
    incoming.begin(stream.answer)
    stream.put(b"a")
    assert await incoming.take(0, 10) == [b"a"]
    await receivers[0].close()
    while not stream.sender._is_broken:
        stream.put(b"b")
        await asyncio.sleep(0.001)
    with pytest.raises(ChunksLost):
        stream.put(b"b")
    assert fronts._bypass._stream(told[0]) is None
    await come_true(lambda: fronts._bypass._stream(told[1]) is not None)
    incoming, stream = receivers[1].open(), fronts._bypass._stream(told[1])
    assert stream is not None
    incoming.begin(stream.answer)
    stream.put(b"c")
    assert await incoming.take(0, 10) == [b"c"]
    assert list(fronts._bypass._senders) == [receivers[1].address]
    await receivers[1].close()


async def test_a_message_that_cannot_be_read_ends_nobody_elses_stream() -> None:
    receiver = cluster.bypass.Receiver()
    sender, incoming = Sender(receiver.address), receiver.open()
    await come_true(lambda: sender.is_connected)
    incoming.begin(answer := new_answer_number(incoming.number))
    sender._socket.send(b"no message")
    sender.put(answer, b"a")
    assert await incoming.take(0, 10) == [b"a"]
    sender.close()
    await receiver.close()


async def test_a_way_that_nobody_answers_is_not_taken_but_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fronts = FrontBypass(front(["a", "b"]), bypass=FrontEndpoint(NODE))
    ray = Between(fronts)
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    proxy._endpoint._receiver = Receiver()
    with socket.socket(socket.AF_UNIX) as silent:
        path = proxy._endpoint._receiver.address.removeprefix("ipc://") + "-silent"
        silent.bind(path)
        silent.listen()
        listening, proxy._endpoint._receiver.address = proxy._endpoint._receiver.address, f"ipc://{path}"
        for _ in range(3):
            assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
        assert ray.bodies == 3 * 4
    assert not caplog.text
    (lost,) = fronts._bypass._senders.values()
    assert not lost.is_lost
    monkeypatch.setattr(lost, "_connect_deadline", 0)
    os.unlink(path)
    os.symlink(listening.removeprefix("ipc://"), path)
    await acquaint(fronts, proxy)
    assert caplog.text.count("does not take connections") == 1
    assert lost._socket.closed
    before = ray.bodies
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies == before
    await proxy._endpoint._receiver.close()


async def test_a_proxy_that_no_longer_reads_breaks_its_streams_and_goes_on_by_ray(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fronts = FrontBypass(front(["a", "b"]), bypass=FrontEndpoint(NODE))
    ray = Between(fronts)
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    await acquaint(fronts, proxy)
    receiver, stream = proxy._endpoint._receiver, fronts._bypass._stream(f"{NODE} 0 {proxy._endpoint._receiver.address}")  # type: ignore[union-attr]
    assert receiver is not None
    assert stream is not None

    def broken(raw: bytes) -> None:
        raise RuntimeError("our own mistake")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.bypass, "_decode", broken)
        stream.put(b"a")
        await come_true(lambda: receiver.is_over and not socket_exists(receiver.address))
    assert "our own mistake" in caplog.text
    await come_true(lambda: not stream.sender.is_connected)
    stream.put(b"b")
    await come_true(lambda: stream.sender._is_broken)
    with pytest.raises(ChunksLost):
        stream.put(b"b")
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert caplog.text.count("the bypass failed") == 1
    proxy._endpoint._paused_until = 0
    await acquaint(fronts, proxy)
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_of_two_answers_to_a_request_that_ray_routed_twice_only_the_one_that_began_is_handed_on() -> None:
    fronts = {name: FrontBypass(front([f"{name}{place}" for place in range(3)]), bypass=FrontEndpoint(NODE)) for name in "AB"}

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        async def unheard(message: Any) -> None:
            pass

        await fronts["A"](scope, receive, unheard)
        await asyncio.gather(Between(fronts["B"])(scope, receive, send), fronts["A"](scope, receive, unheard))

    proxy = ProxyBypass(twice, endpoint=ProxyEndpoint(NODE))
    for one in fronts.values():
        await acquaint(one, proxy)
    assert body(await asked(proxy)) == body(await asked(front(["B0", "B1", "B2"])))
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_more_chunks_than_were_sent_are_a_mistake_that_nobody_waits_for() -> None:
    receiver = Receiver()
    for num_taken, num_waiting in ((0, 3), (3, 0), (2, 1)):
        incoming = receiver.open()
        incoming.begin(1)
        for _ in range(num_waiting):
            incoming.put(1, b"a")
        incoming.end_after(2)
        async with asyncio.timeout(60):
            with pytest.raises(ChunksLost, match="of 2 chunks 3 came"):
                await incoming.take(num_taken, late_s=3600)
    await receiver.close()


async def test_a_proxy_that_can_make_no_socket_answers_by_ray_and_tries_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    fronts = FrontBypass(front(["a", "b"]), bypass=FrontEndpoint(NODE))
    ray = Between(fronts)
    proxy = ProxyBypass(ray, endpoint=ProxyEndpoint(NODE))
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(long))
        for _ in range(2):
            assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert caplog.text.count("too long for a Unix socket") == 1
    assert not list(long.iterdir())
    proxy._endpoint._paused_until = 0
    await acquaint(fronts, proxy)
    assert proxy._endpoint._receiver is not None
    await proxy._endpoint._receiver.close()


async def test_a_front_that_can_make_no_socket_or_is_told_nonsense_answers_by_ray(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver()
    there = tmp_path / ("long" * 30)
    there.touch()
    path = receiver.address.removeprefix("ipc://")
    for rest in (f"0 ipc://{there}", f"x {receiver.address}", f"0 {path}", "", "0"):
        ray = Between(FrontBypass(front(["a", "b"]), bypass=FrontEndpoint(NODE)))

        async def told(scope: Any, receive: Any, send: Any, rest: str = rest, ray: Between = ray) -> None:
            header = (serve.http.bypass.HEADER, f"{NODE} {rest}".encode())
            await ray({**scope, "headers": [header]}, receive, send)

        for _ in range(2):
            assert body(await asked(told)) == body(await asked(front(["a", "b"])))
        assert ray.bodies == 2 * 4
        assert caplog.text.count("by Ray") == 1
        caplog.clear()
    await receiver.close()


async def test_what_may_wait_for_a_proxy_that_stands_still_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.bypass, "MAX_QUEUED_BYTES", 1 << 19)
    monkeypatch.setattr(cluster.bypass, "MAX_WAITING_BYTES", 1 << 19)
    folder = cluster.bypass.PrivateFolder()
    with zmq.Context.instance().socket(zmq.PULL) as still:
        still.rcvhwm, still.linger = 1, 0
        still.bind(folder.socket("still"))
        sender, num_bytes = Sender(folder.socket("still")), 0
        await come_true(lambda: sender.is_connected)
        while not sender._is_broken and num_bytes < 64 << 20:
            num_bytes += 128 * len(chunk := bytes(8 << 10))
            with contextlib.suppress(ChunksLost):
                for answer in range(128):
                    sender.put(answer, chunk)
            await asyncio.sleep(0)
        assert sender._is_broken
        assert num_bytes < 8 << 20, "what the kernel takes besides is less"
        assert len(still.recv()) < 80 << 10
        sender.close()
    folder.close()
