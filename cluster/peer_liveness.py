"""Step 8 of a request, between hosts: whether a replica and a rank can still hear each other, and what is wrong if not.

zmq itself beats (ZMTP 3.1, PING and PONG) from a thread that needs no interpreter, so a rank in native code is heard as well.
A cut cable tells nobody anything: without beats it shows only when a step's deadline has passed.
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
"""How long a host may take to answer when it is asked whether it is still there."""
LOOK_MS = 200
"""How often a `DisconnectWatcher` looks whether it is still wanted."""


def enable_heartbeats(socket: "zmq.Socket[bytes]", silence_s: float) -> "zmq.Socket[Any]":
    """Have ``socket`` beat, and drop a connection over which nothing came for ``silence_s``. To be called before it is bound or
    connected. What is returned becomes readable once a connection was dropped, or closed by the other end."""
    socket.heartbeat_ivl = max(1, round(silence_s * 1000 / 3))
    socket.heartbeat_timeout = max(1, round(silence_s * 2000 / 3))
    monitor: zmq.Socket[Any] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    return monitor


class PeerStatus(Enum):
    """What a process on another host that is not heard any more has come to."""

    ENDED = "its process ended"
    UNRESPONSIVE = "its process does not answer"
    HOST_UNREACHABLE = "its host cannot be reached"


def probe_peer(address: str, timeout_s: float) -> PeerStatus:
    """Try the port ``tcp://host:port`` on which the process listened: the kernel of a host that is there refuses one that is closed."""
    parts = urlsplit(address)
    try:
        with sockets.create_connection((parts.hostname or "", parts.port or 0), timeout_s):
            return PeerStatus.UNRESPONSIVE
    except OSError as error:
        return PeerStatus.ENDED if error.errno == errno.ECONNREFUSED else PeerStatus.HOST_UNREACHABLE


class DisconnectWatcher:
    """Calls ``unheard`` from a thread of its own once the other end is not heard any more, unless it was closed before."""

    def __init__(self, monitor: "zmq.Socket[Any]", unheard: Callable[[], None]) -> None:
        self._monitor, self._unheard = monitor, unheard
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="far-end", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """What happens from now on is no news: the other end was told, or told us, to end."""
        self._over.set()

    def close(self) -> None:
        """To be called before the socket's context is destroyed."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._monitor.poll(LOOK_MS) and not self._over.is_set():
                self._unheard()
                return
