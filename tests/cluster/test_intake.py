"""A front's link and a replica's intake over real sockets, with an engine that only writes down what it is told."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import zmq
import zmq.asyncio

from cluster.channel import PrivateFolder, connect, shared_context
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import ChannelError, SlowReader
from cluster.health import State
from cluster.intake import Intake
from cluster.messages import FrontDropped, Pong, StepEvents, Submit, decode, encode
from cluster.replica_link import LinkLost, ReplicaLink
from engine.errors import QueueFull
from engine.plan import TokenEvent
from engine.request import Request
from tests.cluster.fakes import eventually

CONFIG = RouterConfig(ping_s=0.05, replica_silence_s=60, max_buffered_tokens=100)
SILENT = RouterConfig(ping_s=3600, replica_silence_s=3601)
"""No ping tells anything sooner than what is to tell it."""
FRONT_SILENCE_S = 0.5
"""Set where a front is to be dropped, and only then: on a busy machine everybody is silent for half a second at times."""
LONG_S = 60.0
"""Ends a hopeless wait; it is no promise."""


@dataclass
class Engine:
    submitted: list[Request] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)
    ready: bool = True
    full: bool = False
    failures: list[str] = field(default_factory=list)

    def submit(self, request: Request) -> None:
        if self.full:
            raise QueueFull(limit=1)
        self.submitted.append(request)

    def cancel(self, request_id: str, choice: int) -> None:
        self.cancelled.append((request_id, choice))

    def pong(self) -> Pong:
        return Pong(ready=self.ready, num_running=len(self.submitted), num_waiting=0)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateFolder]:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        made = PrivateFolder()
        yield made
        made.close()


@pytest.fixture
def intake(engine: Engine, folder: PrivateFolder) -> Iterator[Intake]:
    made = make_intake(engine, folder)
    yield made
    made.close()


def make_intake(engine: Engine, folder: PrivateFolder, tcp_host: str | None = None) -> Intake:
    made = Intake(
        folder=folder,
        node="here",
        tcp_host=tcp_host,
        submit=engine.submit,
        cancel=engine.cancel,
        pong=engine.pong,
        failed=engine.failures.append,
        front_silence_s=LONG_S,
        heartbeat_s=0.1,
    )
    made.start()
    return made


@asynccontextmanager
async def linked(intake: Intake, node: str = "here", config: RouterConfig = CONFIG) -> AsyncIterator[ReplicaLink]:
    record = ReplicaRecord(id="a", model="m", state=State.READY, address=intake.address, guest_keys=intake.guest_keys)
    link = ReplicaLink(record, node=node, config=config)
    try:
        await eventually(lambda: link._pong is not None)
        yield link
    finally:
        await link.close()


def events_for(request: Request, *tokens: int, end: bool = False) -> list[TokenEvent]:
    events = [TokenEvent(request.id, request.choice, request.attempt, offset, (token,)) for offset, token in enumerate(tokens)]
    return [*events, TokenEvent(request.id, request.choice, request.attempt, len(tokens), finish_reason="length")] if end else events


async def collect(link: ReplicaLink, request: Request) -> list[TokenEvent]:
    async with aclosing(link.stream(request)) as events:
        return [event async for event in events]


async def test_a_request_goes_in_and_its_events_come_out(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        requests = [Request(id=f"r{number}", prompt=(number,)) for number in range(3)]
        running = [asyncio.create_task(collect(link, request)) for request in requests]
        await eventually(lambda: len(engine.submitted) == 3)
        assert sorted(engine.submitted, key=lambda each: each.id) == requests
        intake.deliver([event for request in requests for event in events_for(request, *request.prompt, end=True)])
        for request, events in zip(requests, await asyncio.gather(*running), strict=True):
            assert events == events_for(request, *request.prompt, end=True)
        assert link.num_streams == 0
    assert engine.cancelled == []


async def test_a_link_whose_own_work_fails_is_lost_at_once(
    engine: Engine, intake: Intake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: object) -> None:
        raise RuntimeError("out of order")

    async with linked(intake) as link:
        running = asyncio.create_task(collect(link, Request(id="r", prompt=(1,))))
        await eventually(lambda: bool(engine.submitted))
        monkeypatch.setattr(link, "_handle", broken)
        with pytest.raises(LinkLost, match="out of order"):
            await running
        assert link.lost
    assert "the link to replica a failed" in caplog.text


async def test_a_front_of_another_host_is_let_in_by_its_key(engine: Engine, folder: PrivateFolder) -> None:
    intake = make_intake(engine, folder, tcp_host="127.0.0.1")
    try:
        async with linked(intake, node="there") as link:
            assert link.ready
    finally:
        intake.close()


async def test_a_refusal_comes_back_as_the_end_of_the_stream(engine: Engine, intake: Intake) -> None:
    engine.full = True
    async with linked(intake) as link:
        (event,) = await collect(link, Request(id="r", prompt=(1,), committed=(4, 5)))
    assert (event.finish_reason, event.error_kind, event.offset) == ("error", "QueueFull", 2)


async def test_a_stream_that_is_closed_is_cancelled_at_the_engine(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        request = Request(id="r", prompt=(1,))
        async with aclosing(link.stream(request)) as events:
            first = asyncio.create_task(anext(events))
            await eventually(lambda: engine.submitted)
            intake.deliver(events_for(request, 7))
            assert (await first).tokens == (7,)
        await eventually(lambda: engine.cancelled == [("r", 0)])


async def test_a_front_that_vanished_has_its_requests_cancelled_and_its_streams_end_should_it_still_be_there(
    engine: Engine, intake: Intake
) -> None:
    async with linked(intake, config=SILENT) as link:
        running = asyncio.create_task(collect(link, Request(id="r", prompt=(1,))))
        await eventually(lambda: engine.submitted)
        intake.protocol._front_silence_s = FRONT_SILENCE_S
        await eventually(lambda: engine.cancelled == [("r", 0)])
        with pytest.raises(LinkLost, match="dropped this front") as raised:
            await asyncio.wait_for(running, LONG_S)
        assert link.lost
        assert not raised.value.died


async def test_a_front_that_stood_still_begins_anew_though_the_replica_was_never_silent(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        running = asyncio.create_task(collect(link, Request(id="r", prompt=(1,))))
        await eventually(lambda: engine.submitted)
        intake.protocol._front_silence_s = FRONT_SILENCE_S
        deadline = time.monotonic() + LONG_S
        while not engine.cancelled:  # the whole event loop stands still, as in a process that is stopped
            assert time.monotonic() < deadline
            time.sleep(0.05)  # noqa: ASYNC251
        with pytest.raises(LinkLost):
            await asyncio.wait_for(running, LONG_S)


def test_a_front_that_does_not_read_is_told_after_what_it_has_still_to_read(
    engine: Engine, folder: PrivateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.intake.MAX_QUEUED_MESSAGES", 2)
    intake = make_intake(engine, folder)
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.rcvhwm = 1
        connect(socket, intake.address, node="here", keys=None)
        request = Request(id="r", prompt=(1,))
        socket.send(encode(Submit(request)))
        deadline, long = time.monotonic() + LONG_S, "x" * 100_000
        while not engine.cancelled:
            assert time.monotonic() < deadline
            if engine.submitted:
                intake.deliver([TokenEvent("r", 0, 0, 0, error_message=long)])
            time.sleep(0.002)
        heard: list[object] = []
        while not isinstance(heard[-1] if heard else None, FrontDropped):
            assert socket.poll(int(1000 * LONG_S))
            heard.append(decode(socket.recv()))
        assert sum(isinstance(message, StepEvents) for message in heard) > 2
    finally:
        context.destroy(linger=0)
        intake.close()


async def test_a_deadline_is_as_far_away_on_a_host_whose_clock_is_wrong(engine: Engine, intake: Intake) -> None:
    """Else whoever is ahead by more than what is left refuses everything."""
    intake.protocol._unix_clock = lambda: 5_000.0
    async with linked(intake) as link:
        link._unix_clock = lambda: 1_000.0
        running = [
            asyncio.create_task(collect(link, Request(id=f"{deadline_s}", prompt=(1,), deadline_s=deadline_s)))
            for deadline_s in (1_007.0, 999.0, None)
        ]
        await eventually(lambda: len(engine.submitted) == 3)
        assert [each.deadline_s for each in engine.submitted] == [5_007.0, 4_999.0, None]
        for request in engine.submitted:
            intake.deliver(events_for(request, end=True))
        await asyncio.gather(*running)


async def test_a_deadline_told_by_a_front_of_an_older_version_counts_as_it_is(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        link._send(Submit(Request(id="r", prompt=(1,), deadline_s=7.0)))
        await eventually(lambda: len(engine.submitted) == 1)
    assert engine.submitted[0].deadline_s == 7.0


async def test_the_same_attempt_once_more_leaves_the_owners_stream_alone(engine: Engine, intake: Intake) -> None:
    request = Request(id="r", prompt=(1,), attempt=1)
    async with linked(intake) as owner, linked(intake) as other:
        running = asyncio.create_task(collect(owner, request))
        await eventually(lambda: engine.submitted == [request])
        for again in (request, Request(id="r", prompt=(1,))):
            (event,) = await asyncio.wait_for(collect(other, again), LONG_S)
            assert (event.error_kind, event.attempt) == ("DuplicateRequest", again.attempt)
        owner._send(Submit(request))
        (refused,) = await asyncio.wait_for(collect(owner, Request(id="r", prompt=(1,))), LONG_S)  # an answer, so all before was read
        assert refused.error_kind == "DuplicateRequest"
        intake.deliver(events_for(request, 7, end=True))
        assert await asyncio.wait_for(running, LONG_S) == events_for(request, 7, end=True)
    assert engine.submitted == [request]
    assert engine.cancelled == []


async def test_an_intake_that_ends_by_itself_says_so(engine: Engine, intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Pong:
        raise RuntimeError("no load")

    monkeypatch.setattr(intake.protocol, "_pong", broken)
    intake.wake()
    await eventually(lambda: engine.failures)
    assert engine.failures == ["the intake ended: no load"]


async def test_a_later_attempt_takes_the_request_over_and_late_events_go_nowhere(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as old, linked(intake) as new:
        first, second = Request(id="r", prompt=(1,)), Request(id="r", prompt=(1,), attempt=1, committed=(7,))
        stale = asyncio.create_task(collect(old, first))
        await eventually(lambda: engine.submitted == [first])
        running = asyncio.create_task(collect(new, second))
        await eventually(lambda: engine.submitted == [first, second])
        assert engine.cancelled == [("r", 0)]
        intake.deliver([*events_for(first, 7, end=True), TokenEvent("r", 0, 1, 1, (8,), finish_reason="length")])
        assert [event.tokens for event in await running] == [(8,)]
        assert not stale.done()
        stale.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stale


async def test_a_change_of_readiness_is_told_at_once(engine: Engine, intake: Intake) -> None:
    async with linked(intake, config=SILENT) as link:
        assert link.ready
        engine.ready = False
        intake.wake()
        await eventually(lambda: not link.ready, within_s=LONG_S / 2)  # sooner than any ping or silence would tell


async def test_a_closed_connection_ends_the_streams_at_once(engine: Engine, intake: Intake) -> None:
    async with linked(intake, config=SILENT) as link:
        running = asyncio.create_task(collect(link, Request(id="r", prompt=(1,))))
        await eventually(lambda: engine.submitted)
        await asyncio.to_thread(intake.close)
        with pytest.raises(LinkLost, match="connection was closed"):
            await asyncio.wait_for(running, LONG_S / 2)  # sooner than silence would tell
        assert link.lost
        assert not link.ready


async def test_a_silent_replica_is_lost(engine: Engine, intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    async with linked(intake, config=RouterConfig(ping_s=0.05, replica_silence_s=0.6)) as link:
        monkeypatch.setattr(intake.protocol, "_handle", lambda front, message: None)  # it reads, and never answers: like a frozen engine
        with pytest.raises(LinkLost, match="silent"):
            await asyncio.wait_for(collect(link, Request(id="r", prompt=(1,))), LONG_S)


async def test_a_client_that_does_not_read_is_cut_off_at_the_bound(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        request = Request(id="r", prompt=(1,))
        async with aclosing(link.stream(request)) as events:
            first = asyncio.create_task(anext(events))
            await eventually(lambda: engine.submitted)
            intake.deliver(events_for(request, 0))
            await first
            intake.deliver(events_for(request, *range(150)))
            await eventually(lambda: link._streams["r", 0, 0]._end is not None)
            with pytest.raises(SlowReader):
                await _read_all(events)
        await eventually(lambda: engine.cancelled == [("r", 0)])


async def test_nonsense_from_a_front_is_dropped_and_the_next_message_is_heard(engine: Engine, intake: Intake) -> None:
    async with linked(intake) as link:
        link._transport._socket.send(b"\xff\xffnonsense")
        link._transport._socket.send_multipart([b"one part", b"too many"])
        link._send(Pong(ready=True, num_running=0, num_waiting=0))
        running = asyncio.create_task(collect(link, Request(id="r", prompt=(1,))))
        await eventually(lambda: engine.submitted)
        intake.deliver(events_for(engine.submitted[0], 1, end=True))
        assert len(await running) == 2


async def test_a_link_that_cannot_be_made_leaves_nothing_open(intake: Intake) -> None:
    held, tasks = shared_context()._sockets, asyncio.all_tasks()
    before = len(held)
    with pytest.raises(ChannelError, match="cannot be reached"):
        ReplicaLink(ReplicaRecord(id="a", model="m", state=State.READY, address=intake.address), node="there", config=CONFIG)
    assert len(held) == before
    assert asyncio.all_tasks() == tasks


async def test_a_link_that_is_closed_holds_no_socket(intake: Intake) -> None:
    held = shared_context()._sockets
    before = len(held)
    async with linked(intake):
        assert len(held) == before + 2
    assert len(held) == before


async def _read_all(events: AsyncIterator[TokenEvent]) -> None:
    async for _ in events:
        pass
