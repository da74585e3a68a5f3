"""A simulated replica: the real `FrontProtocol`, and an engine whose token i is a hash of (prompt, seed, choice, i)."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.channel import Address
from cluster.directory import ReplicaRecord
from cluster.front_protocol import FrontProtocol
from cluster.health import State
from cluster.messages import Pong
from engine.engine import rejection
from engine.errors import EngineError, EngineStopped, InvalidLogits, PoisonedRequest, QueueFull
from engine.plan import TokenEvent
from engine.request import Request

FIRST_TOKEN, LAST_TOKEN = 8, 400
"""Tokens of the small vocabulary without control tokens and padding."""
POISON, NAN = 7, 6
"""Prompts with these tokens kill the ranks, or have NaN logits."""
MAX_LOSSES = 3


def token_of(request: Request, position: int) -> int:
    key = repr((request.prompt, request.sampling.seed, request.choice, position)).encode()
    return FIRST_TOKEN + int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % (LAST_TOKEN - FIRST_TOKEN)


@dataclass
class _Run:
    request: Request
    num_output: int
    losses: int

    def event(self, *tokens: int, finish: str | None = None, error: EngineError | None = None) -> TokenEvent:
        return TokenEvent(
            request_id=self.request.id,
            choice=self.request.choice,
            attempt=self.request.attempt,
            offset=self.num_output - len(tokens),
            tokens=tokens,
            finish_reason=finish,  # type: ignore[arg-type]
            error_kind=type(error).__name__ if error else None,
            error_message=str(error) if error else None,
            losses=self.losses,
        )


@dataclass
class SimReplica:
    """Runs steps until it is killed. Faults are its methods."""

    id: str
    chance: random.Random
    post: Callable[[bytes, bytes], None]
    step_s: float
    max_running: int = 4
    max_waiting: int = 8
    front_silence_s: float = 3.0
    runs: dict[tuple[str, int], _Run] = field(default_factory=dict)
    alive: bool = True
    stopped: bool = False
    ready: bool = True
    ranks_lost: bool = False
    frozen_until: float = 0.0
    backlog: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Messages that came while it was frozen."""

    def __post_init__(self) -> None:
        clock = asyncio.get_running_loop().time
        self.protocol = FrontProtocol(
            post=self.post, submit=self._submit, cancel=self._cancel, pong=self._pong, front_silence_s=self.front_silence_s,
            clock=clock, unix_clock=clock,
        )  # fmt: skip
        self._clock = clock
        self.task = asyncio.create_task(self._live())

    @property
    def record(self) -> ReplicaRecord:
        return ReplicaRecord(id=self.id, model="tiny", state=State.READY, address=Address(node="n", ipc=f"ipc:///{self.id}"))

    def receive(self, front: bytes, raw: bytes) -> None:
        if self.frozen or self.backlog:  # earlier messages come first
            self.backlog.append((front, raw))
        elif self.alive:
            self.protocol.receive(front, [raw])

    @property
    def frozen(self) -> bool:
        return self._clock() < self.frozen_until

    # --- faults

    def kill(self) -> None:
        self.alive = self.ready = False
        self.task.cancel()

    def freeze(self, seconds: float) -> None:
        self.frozen_until = self._clock() + seconds

    def lose_ranks(self, seconds: float, *, from_outside: bool = True) -> None:
        """Lose the ranks: all running requests are told, and go on once the ranks are back."""
        if self.ranks_lost or self.stopped or not self.alive:
            return
        running = self._running()
        events = []
        for run in running:
            run.losses += 1
            if run.losses >= (2 if len(running) == 1 and not from_outside else MAX_LOSSES):
                events.append(self._end(run, error=PoisonedRequest("it was there too often")))
            else:
                events.append(run.event())
        self.ranks_lost, self.ready = True, False
        self.protocol.enqueue(events)
        asyncio.get_running_loop().call_later(seconds, self._ranks_are_back)

    def compute_nan(self) -> None:
        """Compute NaN in one step, for all running requests."""
        if self.alive and not self.stopped and not self.ranks_lost:
            self.protocol.enqueue([self._end(run, error=InvalidLogits("NaN")) for run in self._running()])

    def stop(self) -> None:
        """Shut down: all running requests end with EngineStopped."""
        self.stopped, self.ready = True, False
        self.protocol.enqueue([self._end(run, error=EngineStopped("stopped")) for run in list(self.runs.values())])

    def _ranks_are_back(self) -> None:
        self.ranks_lost, self.ready = False, self.alive and not self.stopped

    # --- the engine

    def _submit(self, request: Request) -> None:
        if self.stopped:
            raise EngineStopped("stopped")
        if not request.attempt and len(self.runs) >= self.max_running + self.max_waiting:
            self.protocol.enqueue([rejection(request, QueueFull(limit=self.max_waiting))])
            return
        self.runs[request.key] = _Run(request, len(request.committed), request.losses)

    def _cancel(self, request_id: str, choice: int) -> None:
        self.runs.pop((request_id, choice), None)

    def _pong(self) -> Pong:
        running = len(self._running())
        return Pong(ready=self.ready, num_running=running, num_waiting=len(self.runs) - running, ranks_lost=self.ranks_lost)

    def _running(self) -> list[_Run]:
        """Suspects run alone, as in `engine.isolation`."""
        suspects = [run for run in self.runs.values() if run.losses and POISON in run.request.prompt]
        return suspects[:1] or list(self.runs.values())[: self.max_running]

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(self.step_s * self.chance.uniform(0.5, 1.5) if self.runs else 0.25)
            if self.frozen:
                await asyncio.sleep(self.frozen_until - self._clock())
            for front, raw in self.backlog:
                self.protocol.receive(front, [raw])
            self.backlog.clear()
            if not self.ranks_lost:
                self._step()
            self.protocol.run_once()

    def _step(self) -> None:
        running = self._running()
        if any(POISON in run.request.prompt for run in running):
            self.lose_ranks(self.chance.uniform(0.2, 1.0), from_outside=False)
            return
        self.protocol.enqueue([self._advance(run) for run in running])

    def _advance(self, run: _Run) -> TokenEvent:
        sampling = run.request.sampling
        if NAN in run.request.prompt and run.num_output >= 2:
            return self._end(run, error=InvalidLogits("NaN"))
        if run.num_output >= sampling.max_tokens:  # all tokens were committed before
            return self._end(run, finish="length")
        token = token_of(run.request, run.num_output)
        run.num_output += 1
        last = run.num_output >= sampling.max_tokens
        return self._end(run, token, finish="length") if last else run.event(token)

    def _end(self, run: _Run, *tokens: int, finish: str = "error", error: EngineError | None = None) -> TokenEvent:
        del self.runs[run.request.key]
        return run.event(*tokens, finish=finish, error=error)
