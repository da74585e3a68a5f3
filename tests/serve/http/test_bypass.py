"""What a client gets past Ray is what it would get through Ray, and a piece that is missing never goes unnoticed."""

import asyncio
import contextvars
import pickle
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import cluster.bypass
import serve.http.bypass
from cluster.bypass import PiecesLost, Sender
from serve.http.bypass import FrontBypass, ProxyBypass
from serve.http.sse import EventStream
from serve.request import TextEvent, Usage

NODE = "a-node"


@pytest.fixture(autouse=True)
def short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


class Chunks:
    """The text of each event."""

    def opening(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def of(self, event: TextEvent) -> dict[str, Any] | None:
        return {"text": event.text}

    def closing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        return iter(())


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
    async def events() -> AsyncIterator[TextEvent]:
        for text in texts[1:]:
            if delays is not None:
                await asyncio.sleep(delays.choice((0, 0, 0, 0.002)))
            yield TextEvent(choice=0, text=text)
        yield TextEvent(choice=0, text="", usage=Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStream(TextEvent(choice=0, text=texts[0]), events(), Chunks())(scope, receive, send)  # type: ignore[arg-type]

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
    proxies = ProxyBypass(lambda *asgi: between[current.get()](*asgi), node=NODE)
    fronts = FrontBypass(lambda *asgi: front(texts[current.get()], delays)(*asgi), node=NODE)
    between = {number: Between(fronts, delays) for number in texts}

    async def one(number: int) -> bytes:
        current.set(number)
        return body(await asked(proxies))

    assert dict(zip(texts, await asyncio.gather(*map(one, texts)), strict=True)) == plain
    assert not any(ray.bodies for ray in between.values())
    assert proxies._receiver is not None
    assert not proxies._receiver._passages
    await proxies._receiver.close()


async def test_all_that_is_ready_at_once_goes_as_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[int] = []
    decode = cluster.bypass._decode
    monkeypatch.setattr(cluster.bypass, "_decode", lambda raw: messages.append(len(raw)) or decode(raw))
    receiver = cluster.bypass.Receiver()
    sender, passages = Sender(receiver.address), [receiver.open() for _ in range(32)]
    for turn in range(3):
        for passage in passages:
            sender.put(passage.number, b"%d" % turn)
        assert [await passage.take(turn, 10) for passage in passages] == [[b"%d" % turn]] * 32
    assert len(messages) == 3
    sender.close()
    await receiver.close()


async def test_a_front_of_another_host_answers_by_ray() -> None:
    ray = Between(FrontBypass(front(["a", "b"]), node="another"))
    proxy = ProxyBypass(ray, node=NODE)
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert proxy._receiver is not None
    await proxy._receiver.close()


async def test_a_front_without_a_bypass_answers_by_ray() -> None:
    ray = Between(front(["a", "b"]))
    proxy = ProxyBypass(ray, node=NODE)
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    assert proxy._receiver is not None
    await proxy._receiver.close()


async def test_a_piece_that_is_missing_breaks_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.http.bypass, "LATE_S", 0.2)
    put = Sender.put
    monkeypatch.setattr(Sender, "put", lambda sender, stream, piece: None if b'"b"' in piece else put(sender, stream, piece))
    proxy = ProxyBypass(Between(FrontBypass(front(["a", "b", "c"]), node=NODE)), node=NODE)
    with pytest.raises(PiecesLost, match="of 5 pieces 4 came"):
        await asked(proxy)
    assert proxy._receiver is not None
    await proxy._receiver.close()


async def test_a_front_that_is_lost_leaves_an_answer_without_an_end() -> None:
    async def dies(scope: Any, receive: Any, send: Any) -> None:
        way = scope[serve.http.bypass.WAY]
        await send({"type": "http.response.start", "status": 200, "headers": [], serve.http.bypass.PASSED: True})
        way.put(b"a")
        await asyncio.sleep(0.05)
        raise RuntimeError("lost")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    proxy = ProxyBypass(Between(FrontBypass(dies, node=NODE)), node=NODE)
    with pytest.raises(RuntimeError, match="lost"):
        await proxy({"type": "http", "method": "POST", "headers": []}, None, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["more_body"]
    assert proxy._receiver is not None
    assert not proxy._receiver._passages
    await proxy._receiver.close()


async def test_a_front_that_does_not_see_the_proxys_socket_answers_by_ray() -> None:
    ray = Between(FrontBypass(front(["a", "b"]), node=NODE))
    proxy = ProxyBypass(ray, node=NODE)
    proxy._receiver = cluster.bypass.Receiver()
    seen, proxy._receiver.address = proxy._receiver.address, proxy._receiver.address + "-elsewhere"
    assert body(await asked(proxy)) == body(await asked(front(["a", "b"])))
    assert ray.bodies > 0
    proxy._receiver.address = seen
    await proxy._receiver.close()


async def test_whoever_writes_to_a_proxy_that_is_gone_is_told_and_a_new_one_is_written_to() -> None:
    receivers = [cluster.bypass.Receiver(), cluster.bypass.Receiver()]
    fronts = FrontBypass(front(["a"]), node=NODE)
    told = [f"{NODE} 0 {receiver.address}" for receiver in receivers]
    way = fronts._way(told[0])
    assert way is not None
    passage = receivers[0].open()
    way.put(b"a")
    assert await passage.take(0, 10) == [b"a"]
    await receivers[0].close()
    while not way.sender._is_broken:
        way.put(b"b")
        await asyncio.sleep(0.001)
    with pytest.raises(PiecesLost):
        way.put(b"b")
    assert fronts._way(told[0]) is None
    passage, way = receivers[1].open(), fronts._way(told[1])
    assert way is not None
    way.put(b"c")
    assert await passage.take(0, 10) == [b"c"]
    assert list(fronts._senders) == [receivers[1].address]
    await receivers[1].close()


async def test_a_message_that_cannot_be_read_ends_nobody_elses_stream() -> None:
    receiver = cluster.bypass.Receiver()
    sender, passage = Sender(receiver.address), receiver.open()
    sender._socket.send(b"no message")
    sender.put(passage.number, b"a")
    assert await passage.take(0, 10) == [b"a"]
    sender.close()
    await receiver.close()
