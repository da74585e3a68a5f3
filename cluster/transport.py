"""Place 4 of a request: the transport of bytes between a front and one replica."""

import contextlib
import itertools
from collections.abc import Awaitable
from typing import Any, Protocol

import zmq

from cluster.channel import connect, shared_context
from cluster.directory import ReplicaRecord

_numbers = itertools.count()


class TransportBroken(Exception):
    """The transport can send nothing more."""


class Transport(Protocol):
    """A connection. Messages arrive complete or not at all; their order and delivery are not guaranteed."""

    def send(self, raw: bytes) -> None:
        """Send without waiting. Raises TransportBroken."""
        ...

    def receive(self) -> Awaitable[bytes]:
        """The next message."""
        ...

    def closed(self) -> Awaitable[object]:
        """Completes once the peer has closed the connection."""
        ...

    def close(self) -> None: ...


class ZmqTransport:
    """A DEALER socket to a replica's intake. Create it in a running event loop.

    Raises:
        ChannelError: the replica does not listen for other hosts.
        zmq.ZMQError: no socket can be opened.
    """

    def __init__(self, record: ReplicaRecord, *, node: str) -> None:
        with contextlib.ExitStack() as undone:
            self._socket = undone.enter_context(shared_context().socket(zmq.DEALER))
            self._socket.linger = 200
            self._monitor = undone.enter_context(
                self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED, f"inproc://transport-{next(_numbers)}")
            )
            connect(self._socket, record.address, node=node, keys=record.guest_keys)  # type: ignore[arg-type]
            undone.pop_all()

    def send(self, raw: bytes) -> None:
        """zmq queues the message, so its future is done at once or fails."""
        if self._socket.closed:
            return
        future: Any = self._socket.send(raw, zmq.NOBLOCK)
        if future.done() and (error := future.exception()) is not None:
            raise TransportBroken(str(error))

    def receive(self) -> Awaitable[bytes]:
        received: Awaitable[bytes] = self._socket.recv()
        return received

    def closed(self) -> Awaitable[object]:
        return self._monitor.recv_multipart()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
