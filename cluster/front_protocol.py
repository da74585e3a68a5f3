"""Place 5 of a request: the replica's side of the protocol with the fronts. It knows which front owns which request.

It has no sockets and no threads: `cluster.intake` hands it the messages that came, and a function that sends.
"""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from cluster.block_journal import BlockJournal
from cluster.errors import ChannelError
from cluster.messages import Cancel, FrontDropped, Message, Ping, Pong, StepEvents, Submit, SubscribeBlocks, decode, encode
from cluster.stream_table import Front, StreamTable, untagged_rows
from engine.counted import counted
from engine.engine import rejection
from engine.errors import DuplicateRequest, EngineError
from engine.output import EngineOutput
from engine.plan import TokenEvent
from engine.request import Request
from engine.request_trace import trace_place

logger = logging.getLogger(__name__)

Key = tuple[str, int]
BLOCK_UPDATE_INTERVAL_S = 0.05
"""Shortest time between two messages to the fronts about changes in the prefix cache."""


class FrontGone(Exception):
    """The front's connection is closed."""


class FrontFull(Exception):
    """The queue of messages to this front is full, because it does not read."""


PostToFront = Callable[[Front, bytes], None]
"""Sends a message without waiting. Raises FrontGone or FrontFull."""


class _Owner(NamedTuple):
    front: Front
    attempt: int
    tag: int
    """The number of the stream in the engine's output; see `cluster.stream_table`."""


class FrontProtocol:
    """The state of an intake. `enqueue` may be called from any thread, everything else from the intake's thread.

    If a front goes silent or does not read, it is dropped: all its requests are cancelled. Should it still be alive, `FrontDropped`
    tells it that its streams will get no end.
    """

    def __init__(
        self,
        *,
        post: PostToFront,
        submit: Callable[[Request], None],
        cancel: Callable[[str, int], None],
        pong: Callable[[], Pong],
        front_silence_s: float,
        journal: BlockJournal | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._post, self._submit, self._cancel, self._pong = post, submit, cancel, pong
        self._front_silence_s, self._clock, self._unix_clock = front_silence_s, clock, unix_clock
        self._owners: dict[Key, _Owner] = {}
        self._streams = StreamTable()
        self._seen: dict[Front, float] = {}
        self._dropped: set[Front] = set()
        """Dropped fronts that have not been sent `FrontDropped` yet."""
        self._sent_ready: bool | None = None
        self._journal = journal or BlockJournal()
        self._subscribers: set[Front] = set()
        """Fronts that have the snapshot of the prefix cache's blocks and get its changes."""
        self._block_changes_due = 0.0
        self._outbox: deque[EngineOutput | Sequence[TokenEvent]] = deque()

    @property
    def num_owned(self) -> int:
        """Choices that fronts are waiting for."""
        return len(self._owners)

    def enqueue(self, events: EngineOutput | Sequence[TokenEvent]) -> None:
        """Add a step's events, to be sent by the next `run_once`."""
        self._outbox.append(events)

    def receive(self, front: Front, parts: Sequence[bytes]) -> None:
        """Handle one message of a front. A malformed one is logged and ignored."""
        self._seen[front] = self._clock()
        try:
            if len(parts) != 1:
                raise ChannelError(f"a message of {len(parts)} parts")
            self._handle(front, decode(parts[0]))
        except ChannelError as error:
            logger.warning("a front's message was dropped: %s", error)

    def run_once(self) -> None:
        """Send everything that is due, and drop silent fronts."""
        self.send_all()
        self._send_readiness()
        self._send_block_changes()
        self._drop_silent_fronts()
        self._notify_dropped()

    def send_all(self) -> None:
        """Send the enqueued events. Tokens of one step to one front are one message."""
        while self._outbox:
            output = self._outbox.popleft()
            if isinstance(output, EngineOutput):
                for batch in output.token_batches:
                    for front, columns in self._streams.by_front(batch):
                        self._send(front, StepEvents((), columns.streams, columns.offsets, columns.tokens))
                    if rows := untagged_rows(batch):
                        self._send_events(batch.events(rows))
                self._send_events(output.events)
            else:
                self._send_events(output)

    def _send_events(self, events: Iterable[TokenEvent]) -> None:
        by_front: defaultdict[Front, list[TokenEvent]] = defaultdict(list)
        for event in events:
            key = (event.request_id, event.choice)
            owner = self._owners.get(key)
            if owner is None or owner.attempt != event.attempt:
                continue  # its front has cancelled it, or submitted a later attempt
            by_front[owner.front].append(event)
            if event.finish_reason is not None:
                self._release(key)
        for front, all_of_front in by_front.items():
            self._send(front, StepEvents(tuple(all_of_front)))

    def _release(self, key: Key) -> None:
        self._streams.remove(self._owners.pop(key).tag)

    def _handle(self, front: Front, message: object) -> None:
        match message:
            case Submit(request, left_s):
                self._accept(front, request if left_s is None else replace(request, deadline_s=self._unix_clock() + left_s))
            case Cancel(request_id, choice, attempt):
                owner = self._owners.get((request_id, choice))
                if owner is not None and (owner.front, owner.attempt) == (front, attempt):
                    self._release((request_id, choice))
                    self._cancel(request_id, choice)
            case Ping():
                self._send(front, self._pong())
            case SubscribeBlocks(wanted):
                self._subscribe(front, wanted)
            case _:
                raise ChannelError(f"a front does not send {type(message).__name__}")

    def _accept(self, front: Front, request: Request) -> None:
        """Submit a request to the engine. A later attempt of a choice replaces the earlier one."""
        trace_place(5, request.id)
        earlier = self._owners.get(request.key)
        if earlier is not None and earlier.attempt >= request.attempt:
            if (earlier.front, earlier.attempt) != (front, request.attempt):  # the owner would take the refusal for the end of its stream
                self._send(front, StepEvents((rejection(request, DuplicateRequest(request.id)),)))
            return
        if earlier is not None:
            self._release(request.key)
            self._cancel(*request.key)
        tag = self._streams.add(front, request.tag)
        self._owners[request.key] = _Owner(front, request.attempt, tag)
        try:
            self._submit(replace(request, tag=tag))
        except EngineError as error:
            self._release(request.key)
            self._send(front, StepEvents((rejection(request, error),)))

    def _send_readiness(self) -> None:
        pong = self._pong()
        if pong.ready != self._sent_ready:
            self._sent_ready = pong.ready
            for front in list(self._seen):
                self._send(front, pong)

    def _subscribe(self, front: Front, wanted: bool) -> None:
        self._subscribers.discard(front)
        if wanted:
            self._send_block_changes(now=True)  # these changes are part of the snapshot, so only the other fronts need them
            self._subscribers.add(front)
            self._send(front, self._journal.snapshot())

    def _send_block_changes(self, *, now: bool = False) -> None:
        """Send the changes in the prefix cache. They are taken from the journal also without subscribers, so that they do not pile up."""
        if (now or self._clock() >= self._block_changes_due) and (changes := self._journal.changes()) is not None:
            self._block_changes_due = self._clock() + BLOCK_UPDATE_INTERVAL_S
            for front in list(self._subscribers):
                self._send(front, changes)

    def _send(self, front: Front, message: Message) -> None:
        try:
            self._post(front, encode(message))
        except FrontGone:
            self._drop_front(front, "its connection is closed")
        except FrontFull:
            self._drop_front(front, "it does not read")

    def _drop_silent_fronts(self) -> None:
        limit = self._clock() - self._front_silence_s
        for front in [front for front, seen in self._seen.items() if seen < limit]:
            self._drop_front(front, f"silent for {self._front_silence_s:g} s")

    def _notify_dropped(self) -> None:
        """Send `FrontDropped` to the dropped fronts that are still connected: nothing else tells them that their streams have ended."""
        for front in list(self._dropped):
            try:
                self._post(front, encode(FrontDropped()))
            except FrontFull:
                continue  # try again until it reads or is gone
            except FrontGone:
                logger.debug("a front that was dropped is gone")
            self._dropped.discard(front)

    def _drop_front(self, front: Front, reason: str) -> None:
        self._seen.pop(front, None)
        self._subscribers.discard(front)
        self._dropped.add(front)
        orphans = [key for key, owner in self._owners.items() if owner.front == front]
        for key in orphans:
            self._release(key)
            self._cancel(*key)
        self._streams.remove_front(front)
        if orphans:
            logger.warning(
                "a front is gone (%s), and %s cancelled", reason, counted(len(orphans), "request of it is", "requests of it are")
            )
