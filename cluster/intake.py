"""Step 5 of a request, the door: the socket by which fronts hand in requests, and get one message of events per step."""

import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import zmq

from cluster.channel import Address, KeyGuard, KeyPair, PrivateFolder, listen, new_keys
from cluster.errors import ChannelError
from cluster.messages import BeginAnew, Cancel, Events, Message, Ping, Pong, Submit, decode, encode
from engine.engine import refusal
from engine.errors import DuplicateRequest, EngineError
from engine.places import mark
from engine.plan import TokenEvent
from engine.request import Request

logger = logging.getLogger(__name__)

Front = bytes
"""The routing id zmq gave to a front's connection; a front that comes back is another one."""
Key = tuple[str, int]
MAX_QUEUED_MESSAGES = 10_000
"""To one front; one that does not read so many is given up."""


class Intake:
    """Reads fronts in a thread of its own; `deliver` and `wake` may be called from any other.

    ``submit`` and ``cancel`` hand on to the engine. A front that vanished has all its requests cancelled; should it still be
    there, it is told to begin anew, as the ends of its streams will not come. ``failed`` is told why, if the thread ends by itself.
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
    ) -> None:
        self._submit, self._cancel, self._pong, self._failed = submit, cancel, pong, failed
        self._front_silence_s, self._heartbeat_s = front_silence_s, heartbeat_s
        self._owners: dict[Key, tuple[Front, int]] = {}
        self._seen: dict[Front, float] = {}
        self._given_up: set[Front] = set()
        """Fronts that must still be told so."""
        self._told_ready: bool | None = None
        self._outbox: deque[Sequence[TokenEvent]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.sndhwm = MAX_QUEUED_MESSAGES
        self._guest_keys = new_keys() if tcp_host else None
        self._guard = KeyGuard(self._context, {self._guest_keys.public}) if self._guest_keys else None
        self.address: Address = listen(self._socket, ipc=folder.socket("fronts"), tcp_host=tcp_host, keys=new_keys(), node=node)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    @property
    def guest_keys(self) -> KeyPair | None:
        """What a front of another host must hold to be let in."""
        return self._guest_keys

    def start(self) -> None:
        self._thread.start()

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Send a step's events on, each to the front that owns its request."""
        if events:
            self._outbox.append(events)
            self.wake()

    def wake(self) -> None:
        """Have the thread look at its outbox and at the replica's readiness now."""
        if not self._closing:
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Send what is still to be sent and end the thread."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._bell, 1)
        if self._thread.ident is not None:
            self._thread.join(5)
        if self._guard is not None:
            self._guard.close()
        self._context.destroy(linger=500)
        os.close(self._bell)

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
        poller.register(self._bell, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(int(self._heartbeat_s * 1000)))
            if self._bell in ready:
                os.eventfd_read(self._bell)
            if self._socket in ready:
                self._read_all()
            self._send_all()
            self._tell_readiness()
            self._give_up_silent()
            self._tell_given_up()
        self._send_all()

    def _read_all(self) -> None:
        while True:
            try:
                front, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._seen[front] = time.monotonic()
            try:
                if len(parts) != 1:
                    raise ChannelError(f"a message of {len(parts)} parts")
                self._take(front, decode(parts[0]))
            except ChannelError as error:
                logger.warning("a front's message was dropped: %s", error)

    def _take(self, front: Front, message: object) -> None:
        match message:
            case Submit(request):
                self._accept(front, request)
            case Cancel(request_id, choice, attempt):
                if self._owners.get((request_id, choice)) == (front, attempt):
                    del self._owners[request_id, choice]
                    self._cancel(request_id, choice)
            case Ping():
                self._send(front, self._pong())
            case _:
                raise ChannelError(f"a front does not send {type(message).__name__}")

    def _accept(self, front: Front, request: Request) -> None:
        """A front that comes back with a later attempt takes its request over from its own past."""
        mark(5, request.id)
        earlier = self._owners.get(request.key)
        if earlier is not None and earlier[1] >= request.attempt:
            if earlier != (front, request.attempt):  # to the owner it would look like the end of its own stream
                self._send(front, Events((refusal(request, DuplicateRequest(request.id)),)))
            return
        if earlier is not None:
            self._cancel(*request.key)
        self._owners[request.key] = (front, request.attempt)
        try:
            self._submit(request)
        except EngineError as error:
            del self._owners[request.key]
            self._send(front, Events((refusal(request, error),)))

    def _send_all(self) -> None:
        while self._outbox:
            by_front: dict[Front, list[TokenEvent]] = defaultdict(list)
            for event in self._outbox.popleft():
                owner = self._owners.get((event.request_id, event.choice))
                if owner is None or owner[1] != event.attempt:
                    continue  # its front has cancelled it, or taken it over
                by_front[owner[0]].append(event)
                if event.finish_reason is not None:
                    del self._owners[event.request_id, event.choice]
            for front, events in by_front.items():
                self._send(front, Events(tuple(events)))

    def _tell_readiness(self) -> None:
        pong = self._pong()
        if pong.ready != self._told_ready:
            self._told_ready = pong.ready
            for front in list(self._seen):
                self._send(front, pong)

    def _send(self, front: Front, message: Message) -> None:
        try:
            self._socket.send_multipart([front, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # EHOSTUNREACH: it is gone; EAGAIN: it does not read
            self._give_up(front, str(error))

    def _give_up_silent(self) -> None:
        limit = time.monotonic() - self._front_silence_s
        for front in [front for front, seen in self._seen.items() if seen < limit]:
            self._give_up(front, f"silent for {self._front_silence_s:g} s")

    def _tell_given_up(self) -> None:
        """What waits in a front's queue does not tell it that nothing will follow."""
        for front in list(self._given_up):
            try:
                self._socket.send_multipart([front, encode(BeginAnew())], zmq.NOBLOCK)
            except zmq.Again:
                continue  # until it reads, or is really gone
            except zmq.ZMQError as error:
                logger.debug("a front that was given up is gone: %s", error)
            self._given_up.discard(front)

    def _give_up(self, front: Front, reason: str) -> None:
        self._seen.pop(front, None)
        self._given_up.add(front)
        orphans = [key for key, owner in self._owners.items() if owner[0] == front]
        for key in orphans:
            del self._owners[key]
            self._cancel(*key)
        if orphans:
            logger.warning("a front is gone (%s); its %d requests are cancelled", reason, len(orphans))
