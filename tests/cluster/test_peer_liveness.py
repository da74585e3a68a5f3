"""Two ends of a connection between hosts know when they cannot hear each other, and what has come of the other."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import zmq

from cluster.channel import KeyAuthenticator, KeyPair, connect, listen, new_keys
from cluster.peer_liveness import DisconnectWatcher, PeerStatus, enable_heartbeats, probe_peer
from tests.cluster.fake_ranks import hang_in_native_code

SILENCE_S = 1.5
LONGER_SILENCES_S = (SILENCE_S, 6.0, 24.0)
"""To be tried in turn where silence would be a mistake: on a machine that is busy with other things nothing runs for a second."""
AT_MOST_S = 60.0


def listen_for_ever(told: Connection, replica_key: bytes, silence_s: float) -> None:
    context: zmq.Context[Any] = zmq.Context()
    guard = KeyAuthenticator(context, {replica_key})
    end = context.socket(zmq.PAIR)
    enable_heartbeats(end, silence_s)
    told.send(listen(end, ipc=None, tcp_host="127.0.0.1", keys=new_keys(), node="there"))
    told.send(end.recv())
    hang_in_native_code(3600)
    guard.close()


@contextmanager
def far_end(silence_s: float = SILENCE_S) -> Iterator[tuple[int, str, "zmq.Socket[Any]"]]:
    """A process that hangs in native code, where it listens, and what is readable here once it is not heard any more."""
    here, there = multiprocessing.Pipe()
    keys: KeyPair = new_keys()
    process = multiprocessing.get_context("spawn").Process(target=listen_for_ever, args=(there, keys.public, silence_s))
    process.start()
    context: zmq.Context[Any] = zmq.Context()
    near = context.socket(zmq.PAIR)
    try:
        assert here.poll(AT_MOST_S)
        address = here.recv()
        beats = enable_heartbeats(near, silence_s)
        connect(near, address, node="here", keys=keys)
        near.send(b"hello")
        assert here.poll(AT_MOST_S)
        assert here.recv() == b"hello"
        yield process.pid or 0, address.tcp, beats
    finally:
        process.kill()
        process.join()
        context.destroy(linger=0)


def is_heard_while_it_hangs(silence_s: float) -> bool:
    with far_end(silence_s) as (_, _, beats):
        return not beats.poll(3 * silence_s * 1000)


def test_a_process_that_hangs_in_native_code_is_heard_and_one_that_stands_still_is_not() -> None:
    assert any(is_heard_while_it_hangs(silence_s) for silence_s in LONGER_SILENCES_S)
    with far_end() as (pid, address, beats):
        os.kill(pid, signal.SIGSTOP)
        assert beats.poll(AT_MOST_S * 1000)
        assert probe_peer(address, 5.0) is PeerStatus.UNRESPONSIVE


def test_a_process_that_ended_is_told_from_a_host_that_is_gone() -> None:
    with far_end() as (pid, address, beats):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # on a busy machine silence may come before the end does
        assert beats.poll(AT_MOST_S * 1000)
        assert probe_peer(address, 5.0) is PeerStatus.ENDED


def test_where_nobody_even_refuses_the_host_is_gone() -> None:
    """As Linux answers nothing on a port where too many wait already, as little as from a host that is not there."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as waiting:
        port = full.getsockname()[1]
        for _ in range(2):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        assert probe_peer(f"tcp://127.0.0.1:{port}", 0.5) is PeerStatus.HOST_UNREACHABLE


def test_a_watcher_tells_once_that_nothing_is_heard_and_nothing_after_it_was_disarmed() -> None:
    for rests in (False, True):
        with far_end() as (pid, _, beats):
            told = threading.Event()
            watcher = DisconnectWatcher(beats, told.set)
            if rests:
                watcher.disarm()
            os.kill(pid, signal.SIGKILL)
            assert told.wait(2.0 if rests else AT_MOST_S) is not rests
            watcher.close()


def test_silence_is_noticed_by_a_listener_whose_other_end_is_cut_off() -> None:
    """A relay stands for the cable: it stops passing bytes on, and closes nothing."""
    context: zmq.Context[Any] = zmq.Context()
    end, near, keys = context.socket(zmq.PAIR), context.socket(zmq.PAIR), new_keys()
    guard = KeyAuthenticator(context, {keys.public})
    beats = enable_heartbeats(end, SILENCE_S)
    address = listen(end, ipc=None, tcp_host="127.0.0.1", keys=new_keys(), node="there")
    cut, port = threading.Event(), address.tcp.rpartition(":")[2] if address.tcp else ""
    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=relay, args=(door, int(port), cut), daemon=True).start()
        through = f"tcp://127.0.0.1:{door.getsockname()[1]}"
        connect(near, type(address)(node="there", tcp=through, public_key=address.public_key), node="here", keys=keys)
        near.send(b"hello")
        assert end.recv() == b"hello"
        cut.set()
        begun = time.monotonic()
        assert beats.poll(AT_MOST_S * 1000)
        assert time.monotonic() - begun > SILENCE_S / 3, "silence, not a closed connection"
    guard.close()
    context.destroy(linger=0)


def relay(door: socket.socket, port: int, cut: threading.Event) -> None:
    caller, _ = door.accept()
    callee = socket.create_connection(("127.0.0.1", port))

    def carry(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            if not cut.is_set():
                target.sendall(data)

    threading.Thread(target=carry, args=(caller, callee), daemon=True).start()
    carry(callee, caller)
