"""Liveness of a peer on another host: heartbeats over its socket, and a probe that tells what is wrong once they stop.

The heartbeats are zmq's own (ZMTP 3.1 PING and PONG). Its I/O thread sends them without the interpreter lock, so a rank in native code
still answers. Without heartbeats an interrupted network would be noticed only at the deadline of a step.
"""

import errno
import socket as sockets
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import zmq

PROBE_TIMEOUT_S = 1.0
"""How long a host may take to answer a probe."""
POLL_MS = 200
"""How often a `DisconnectWatcher` checks whether it was closed."""


def enable_heartbeats(socket: "zmq.Socket[bytes]", silence_s: float) -> "zmq.Socket[Any]":
    """Have ``socket`` send heartbeats, and drop a connection over which nothing came for ``silence_s``. Call it before bind or connect.

    Returns a monitor socket, which becomes readable once a connection is dropped or closed by the peer.
    """
    socket.heartbeat_ivl = max(1, round(silence_s * 1000 / 3))
    socket.heartbeat_timeout = max(1, round(silence_s * 2000 / 3))
    monitor: zmq.Socket[Any] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    return monitor


class PeerStatus(Enum):
    """What is wrong with a process on another host that is no longer heard."""

    ENDED = "its process ended"
    UNRESPONSIVE = "its process does not answer"
    HOST_UNREACHABLE = "its host cannot be reached"


def probe_peer(address: str, timeout_s: float) -> PeerStatus:
    """Try to connect to ``tcp://host:port``, on which the process listened. A reachable host refuses a port that is closed."""
    parts = urlsplit(address)
    try:
        with sockets.create_connection((parts.hostname or "", parts.port or 0), timeout_s):
            return PeerStatus.UNRESPONSIVE
    except OSError as error:
        return PeerStatus.ENDED if error.errno == errno.ECONNREFUSED else PeerStatus.HOST_UNREACHABLE


class DisconnectWatcher:
    """Calls ``on_disconnect`` from its own thread once the peer is no longer heard, unless it is disarmed or closed before."""

    def __init__(self, monitor: "zmq.Socket[Any]", on_disconnect: Callable[[], None]) -> None:
        self._monitor, self._on_disconnect = monitor, on_disconnect
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disconnect-watcher", daemon=True)
        self._thread.start()

    def disarm(self) -> None:
        """Ignore what happens from now on: one end has asked the other to end."""
        self._over.set()

    def close(self) -> None:
        """Call this before the socket's context is destroyed."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._monitor.poll(POLL_MS) and not self._over.is_set():
                self._on_disconnect()
                return
