"""Place 5 of a request: the replica's server socket for fronts. They submit requests; each gets one message with its tokens per step."""

import logging
import os
import threading
from collections.abc import Callable, Sequence

import zmq

from cluster.block_journal import BlockJournal
from cluster.channel import Address, KeyAuthenticator, KeyPair, PrivateFolder, listen, new_keys
from cluster.front_protocol import FrontFull, FrontGone, FrontProtocol
from cluster.messages import Pong
from cluster.stream_table import Front
from engine.failpoints import hit
from engine.output import EngineOutput
from engine.plan import TokenEvent
from engine.request import Request

logger = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 10_000
"""Messages queued for one front; a front that lets more pile up is dropped."""


class Intake:
    """Serves the fronts in a thread of its own; `deliver` and `wake` may be called from any other thread.

    ``submit`` and ``cancel`` pass requests to the engine. ``failed`` is called with the reason if the thread ends by an error. The
    protocol itself is in `cluster.front_protocol`.
    """

    def __init__(
        self,
        *,
        folder: PrivateFolder,
        node: str,
        tcp_host: str | None,
        submit: Callable[[Request], None],
        cancel: Callable[[str, int], None],
        pong: Callable[[], Pong],
        failed: Callable[[str], None],
        front_silence_s: float,
        heartbeat_s: float,
        journal: BlockJournal | None = None,
    ) -> None:
        self._failed, self._heartbeat_s = failed, heartbeat_s
        self.protocol = FrontProtocol(
            post=self._post, submit=submit, cancel=cancel, pong=pong, front_silence_s=front_silence_s, journal=journal
        )
        self._wake_event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.sndhwm = MAX_QUEUED_MESSAGES
        self._guest_keys = new_keys() if tcp_host else None
        self._guard = KeyAuthenticator(self._context, {self._guest_keys.public}) if self._guest_keys else None
        self.address: Address = listen(self._socket, ipc=folder.socket("fronts"), tcp_host=tcp_host, keys=new_keys(), node=node)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    @property
    def guest_keys(self) -> KeyPair | None:
        """The CURVE keys that a front on another host must use to be let in."""
        return self._guest_keys

    def start(self) -> None:
        self._thread.start()

    def deliver(self, events: EngineOutput | Sequence[TokenEvent]) -> None:
        """Send a step's events, each to the front that owns its request."""
        if events:
            self.protocol.enqueue(events)
            self.wake()

    def wake(self) -> None:
        """Have the thread send queued events and a changed readiness now."""
        if not self._closing:
            os.eventfd_write(self._wake_event, 1)

    def close(self) -> None:
        """Send the queued events and end the thread."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_event, 1)
        if self._thread.ident is not None:
            self._thread.join(5)
        if self._guard is not None:
            self._guard.close()
        self._context.destroy(linger=500)
        os.close(self._wake_event)

    # --- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            if not self._closing:
                logger.exception("the intake ended")
                self._failed(f"the intake ended: {error}")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_event, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(int(self._heartbeat_s * 1000)))
            if self._wake_event in ready:
                os.eventfd_read(self._wake_event)
            if self._socket in ready:
                self._read_all()
            self.protocol.run_once()
        self.protocol.send_all()

    def _read_all(self) -> None:
        while True:
            try:
                front, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not hit("intake.read"):
                self.protocol.receive(front, parts)

    def _post(self, front: Front, raw: bytes) -> None:
        if hit("intake.send"):
            return
        try:
            self._socket.send_multipart([front, raw], zmq.NOBLOCK)
        except zmq.Again as error:
            raise FrontFull from error
        except zmq.ZMQError as error:  # EHOSTUNREACH
            raise FrontGone from error
