"""The two ends of the bypass by themselves: what tests/serve/http/test_bypass.py, which looks at whole answers, would not notice."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

import pytest
import zmq

import cluster.bypass
from cluster.bypass import NONCE_BITS, ChunksLost, IncomingStream, Receiver, Sender, is_listening, new_answer_number
from cluster.channel import PrivateFolder


@pytest.fixture(autouse=True)
def short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


async def come_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (zmq's threads have no event for it)
            await asyncio.sleep(0.001)


def incoming() -> IncomingStream:
    return IncomingStream(0, lambda: None)


async def test_a_stream_may_pause_for_longer_than_what_is_late_takes() -> None:
    """Until its end is known nothing of it is late: a token takes as long as it takes."""
    one = incoming()
    one.begin(1)
    waiting = asyncio.create_task(one.take(0, late_s=0.01))
    await asyncio.sleep(0.1)
    one.put(1, b"a")
    assert await waiting == [b"a"]


async def test_who_waits_is_woken_by_the_end_when_all_had_come() -> None:
    one = incoming()
    one.begin(1)
    one.put(1, b"a")
    assert await one.take(0, late_s=3600) == [b"a"]
    waiting = asyncio.create_task(one.take(1, late_s=3600))
    await asyncio.sleep(0)
    one.end_after(1)
    async with asyncio.timeout(60):
        assert await waiting == []


async def test_chunks_of_other_answers_are_not_kept() -> None:
    """Else whoever answers a request in vain holds memory until its stream ends."""
    one = incoming()
    one.put(1, b"a")
    one.put(2, b"b")
    one.begin(1)
    one.put(2, b"c")
    assert await one.take(0, late_s=0) == [b"a"]
    assert not one._chunks_by_answer


async def test_a_chunk_that_comes_after_no_end_was_to_be_waited_for_is_nobodys() -> None:
    one = incoming()
    one.begin(1)
    one.put(1, b"a")
    one.end_here()
    one.put(1, b"b")
    assert await one.take(0, late_s=0) == [b"a"]
    assert await one.take(1, late_s=0) == []


def test_answers_to_one_request_have_numbers_of_their_own() -> None:
    answers = {new_answer_number(7) for _ in range(20)}
    assert len(answers) > 1
    assert {answer >> NONCE_BITS for answer in answers} == {7}


async def test_after_much_at_once_what_is_ready_still_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[int] = []
    decode = cluster.bypass._decode
    monkeypatch.setattr(cluster.bypass, "_decode", lambda raw: messages.append(len(raw)) or decode(raw))
    receiver = Receiver()
    sender, one = Sender(receiver.address), receiver.open()
    await come_true(lambda: sender.is_connected)
    one.begin(answer := new_answer_number(one.number))
    sender.put(answer, bytes(cluster.bypass.MESSAGE_BYTES))
    assert len(await one.take(0, late_s=60)) == 1
    for _ in range(32):
        sender.put(answer, b"b")
    assert len(await one.take(1, late_s=60)) == 32
    assert len(messages) == 2
    sender.close()
    await receiver.close()


async def test_a_proxy_that_stands_still_for_a_while_loses_nothing_however_many_steps_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.bypass, "MAX_QUEUED_BYTES", cluster.bypass.MESSAGE_BYTES)
    monkeypatch.setattr(cluster.bypass, "CHECK_INTERVAL_S", 0.01)
    folder, chunks, num_steps, come = PrivateFolder(), list[bytes](), 400, list[list[bytes]]()
    with zmq.Context.instance().socket(zmq.PULL) as still:
        still.rcvhwm, still.linger = 1, 0
        still.bind(folder.socket("still"))
        sender = Sender(folder.socket("still"))
        await come_true(lambda: sender.is_connected)
        had_no_place = False
        for step in range(num_steps):
            chunks.append(str(step).encode() + bytes(4 << 10))
            sender.put(1, chunks[-1])
            await asyncio.sleep(0)
            had_no_place |= not sender.is_connected
            assert not sender.is_lost
        assert had_no_place

        def has_come() -> bool:
            while still.poll(0):
                come.append(cluster.bypass._decode(still.recv())[1])
            return sum(map(len, come)) == num_steps

        await come_true(has_come)
        assert [chunk for message in come for chunk in message] == chunks
        assert len(come) < num_steps
        sender.put(1, b"a")
        await come_true(lambda: bool(still.poll(0)))
        sender.close()
    folder.close()


async def test_behind_a_proxy_that_is_gone_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is still in the folder, as after a kill."""
    folder = PrivateFolder()
    with zmq.Context.instance().socket(zmq.PULL) as still, socket.socket(socket.AF_UNIX) as left:
        still.rcvhwm, still.linger = 1, 0
        still.bind(folder.socket("still"))
        sender = Sender(folder.socket("still"))
        await come_true(lambda: sender.is_connected)
        still.close()
        await come_true(lambda: not sender.is_connected)
        path = folder.socket("still").removeprefix("ipc://")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        left.bind(path)
        left.listen()
        sender.put(1, b"a")
        await asyncio.sleep(0)
        assert not sender._is_broken
        assert not sender.is_lost
        with monkeypatch.context() as patch:
            patch.setattr(cluster.bypass, "MAX_STALL_S", 0.0)  # a lost connection looks like that, and never comes again
            assert sender.is_lost
        assert not sender.is_lost
        left.close()
        assert sender.is_lost
        sender._flush()
        with pytest.raises(ChunksLost):
            sender.put(1, b"b")
        sender.close()
    os.unlink(path)
    folder.close()


def test_without_a_file_descriptor_nobody_is_thought_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*kind: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cluster.bypass.socket, "socket", none_left)
    assert is_listening("ipc:///tmp/nobody")


async def test_who_was_given_up_is_given_up_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something was lost on the way; that there is room again makes no difference."""
    monkeypatch.setattr(cluster.bypass, "MAX_QUEUED_BYTES", 1 << 19)
    monkeypatch.setattr(cluster.bypass, "MAX_WAITING_BYTES", 1 << 19)
    folder = PrivateFolder()
    with zmq.Context.instance().socket(zmq.PULL) as still:
        still.rcvhwm, still.linger = 1, 0
        still.bind(folder.socket("still"))
        sender = Sender(folder.socket("still"))
        await come_true(lambda: sender.is_connected)
        while not sender._is_broken:
            sender.put(1, bytes(256 << 10))
        while not int(sender._socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            while still.poll(10):
                still.recv()
        assert not sender.is_connected
        assert sender.is_lost
        with pytest.raises(ChunksLost):
            sender.put(1, b"a")
        sender.close()
    folder.close()


async def test_a_proxy_that_closed_its_socket_is_lost_before_anything_is_written_to_it() -> None:
    receiver = Receiver()
    sender = Sender(receiver.address)
    await come_true(lambda: sender.is_connected)
    assert not sender.is_lost
    await receiver.close()
    assert sender.is_lost
    sender.close()


async def test_what_is_closed_holds_no_socket_and_takes_nothing() -> None:
    receiver = Receiver()
    sender = Sender(receiver.address)
    sender.close()
    with pytest.raises(ChunksLost):
        sender.put(1, b"a")
    await receiver.close()
    assert receiver.is_over
    assert receiver._socket.closed
    assert sender._socket.closed
