"""Step 5 of a request, behind the door: which front owns which request, and which fronts are still there.

No sockets and no threads: `cluster.intake` gives it what came, turn by turn, and a way to send.
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
from engine.engine import refusal
from engine.errors import DuplicateRequest, EngineError
from engine.output import EngineOutput
from engine.plan import TokenEvent
from engine.request import Request
from engine.request_trace import trace_place

logger = logging.getLogger(__name__)

Key = tuple[str, int]
NEWS_EVERY_S = 0.05
"""How often at most the fronts are told what has changed in the prefix cache."""


class FrontGone(Exception):
    """There is no such connection any more."""


class FrontFull(Exception):
    """So much waits to be read by it that nothing more is taken."""


Post = Callable[[Front, bytes], None]
"""Sends without waiting. Raises FrontGone or FrontFull."""


class _Owner(NamedTuple):
    front: Front
    attempt: int
    tag: int
    """By which the engine is asked to speak of it; see `cluster.stream_table`."""


class FrontProtocol:
    """The state of an intake. `put` may be called from any thread, everything else from the intake's own.

    A front that vanished has all its requests cancelled; should it still be there, it is told to begin anew, as the ends of
    its streams will not come.
    """

    def __init__(
        self,
        *,
        post: Post,
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
        self._given_up: set[Front] = set()
        """Fronts that must still be told so."""
        self._told_ready: bool | None = None
        self._journal = journal or BlockJournal()
        self._followers: set[Front] = set()
        """Fronts that have been told the whole of the journal."""
        self._news_due = 0.0
        self._outbox: deque[EngineOutput | Sequence[TokenEvent]] = deque()

    @property
    def num_owned(self) -> int:
        """Choices that a front waits for."""
        return len(self._owners)

    def enqueue(self, events: EngineOutput | Sequence[TokenEvent]) -> None:
        """A step's events, to be sent in the next turn."""
        self._outbox.append(events)

    def receive(self, front: Front, parts: Sequence[bytes]) -> None:
        """One message of a front. What cannot be understood is dropped."""
        self._seen[front] = self._clock()
        try:
            if len(parts) != 1:
                raise ChannelError(f"a message of {len(parts)} parts")
            self._take(front, decode(parts[0]))
        except ChannelError as error:
            logger.warning("a front's message was dropped: %s", error)

    def run_once(self) -> None:
        """Send what is due, and look after the fronts."""
        self.send_all()
        self._tell_readiness()
        self._tell_news()
        self._give_up_silent()
        self._tell_given_up()

    def send_all(self) -> None:
        """Send the events, those of one step to one front as one message."""
        while self._outbox:
            output = self._outbox.popleft()
            if isinstance(output, EngineOutput):
                for batch in output.token_batches:
                    for front, columns in self._streams.sorted(batch):
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
                continue  # its front has cancelled it, or taken it over
            by_front[owner.front].append(event)
            if event.finish_reason is not None:
                self._disown(key)
        for front, all_of_front in by_front.items():
            self._send(front, StepEvents(tuple(all_of_front)))

    def _disown(self, key: Key) -> None:
        self._streams.leave(self._owners.pop(key).tag)

    def _take(self, front: Front, message: object) -> None:
        match message:
            case Submit(request, left_s):
                self._accept(front, request if left_s is None else replace(request, deadline_s=self._unix_clock() + left_s))
            case Cancel(request_id, choice, attempt):
                owner = self._owners.get((request_id, choice))
                if owner is not None and (owner.front, owner.attempt) == (front, attempt):
                    self._disown((request_id, choice))
                    self._cancel(request_id, choice)
            case Ping():
                self._send(front, self._pong())
            case SubscribeBlocks(wanted):
                self._follow(front, wanted)
            case _:
                raise ChannelError(f"a front does not send {type(message).__name__}")

    def _accept(self, front: Front, request: Request) -> None:
        """A front that comes back with a later attempt takes its request over from its own past."""
        trace_place(5, request.id)
        earlier = self._owners.get(request.key)
        if earlier is not None and earlier.attempt >= request.attempt:
            if (earlier.front, earlier.attempt) != (front, request.attempt):  # to the owner it would look like the end of its own stream
                self._send(front, StepEvents((refusal(request, DuplicateRequest(request.id)),)))
            return
        if earlier is not None:
            self._disown(request.key)
            self._cancel(*request.key)
        tag = self._streams.enter(front, request.tag)
        self._owners[request.key] = _Owner(front, request.attempt, tag)
        try:
            self._submit(replace(request, tag=tag))
        except EngineError as error:
            self._disown(request.key)
            self._send(front, StepEvents((refusal(request, error),)))

    def _tell_readiness(self) -> None:
        pong = self._pong()
        if pong.ready != self._told_ready:
            self._told_ready = pong.ready
            for front in list(self._seen):
                self._send(front, pong)

    def _follow(self, front: Front, wanted: bool) -> None:
        self._followers.discard(front)
        if wanted:
            self._tell_news(now=True)  # numbers below the whole's are for the others only
            self._followers.add(front)
            self._send(front, self._journal.snapshot())

    def _tell_news(self, *, now: bool = False) -> None:
        """What has changed in the prefix cache; read also if nobody follows, so that it does not pile up."""
        if (now or self._clock() >= self._news_due) and (news := self._journal.changes()) is not None:
            self._news_due = self._clock() + NEWS_EVERY_S
            for front in list(self._followers):
                self._send(front, news)

    def _send(self, front: Front, message: Message) -> None:
        try:
            self._post(front, encode(message))
        except FrontGone:
            self._give_up(front, "its connection is closed")
        except FrontFull:
            self._give_up(front, "it does not read")

    def _give_up_silent(self) -> None:
        limit = self._clock() - self._front_silence_s
        for front in [front for front, seen in self._seen.items() if seen < limit]:
            self._give_up(front, f"silent for {self._front_silence_s:g} s")

    def _tell_given_up(self) -> None:
        """What waits in a front's queue does not tell it that nothing will follow."""
        for front in list(self._given_up):
            try:
                self._post(front, encode(FrontDropped()))
            except FrontFull:
                continue  # until it reads, or is really gone
            except FrontGone:
                logger.debug("a front that was given up is gone")
            self._given_up.discard(front)

    def _give_up(self, front: Front, reason: str) -> None:
        self._seen.pop(front, None)
        self._followers.discard(front)
        self._given_up.add(front)
        orphans = [key for key, owner in self._owners.items() if owner.front == front]
        for key in orphans:
            self._disown(key)
            self._cancel(*key)
        self._streams.forget(front)
        if orphans:
            logger.warning("a front is gone (%s); its %d requests are cancelled", reason, len(orphans))
