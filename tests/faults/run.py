"""One run: start the streams, inject the fault, wait for recovery, and compare the streams with undisturbed ones."""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.failpoints import disarm
from serve.deployment import METRICS_EVERY_S
from tests.faults.catalogue import Fault, Injected
from tests.faults.server import Victims
from tests.faults.streams import ASKS, Ask, Seen, follow, golden_of
from tests.history import LOGPROB_TOLERANCE, Golden, History, violations

MOMENTS = ("first", "second", "middle", "last")
NEXT_AFTER_S = 0.5
"""Time between the additional streams of faults with `keeps_coming`."""
STREAMS_END_S = 240.0
COUNTED_S = METRICS_EVERY_S + 0.2
"""Wait after the last stream, until the fronts have exchanged their counters."""


@dataclass
class Run:
    """The result of one run: a line of the results file."""

    fault: str
    seed: int
    streams: int = 0
    complete: int = 0
    lost: int = 0
    """Streams without a complete end whose clients did not disconnect."""
    wrong: list[str] = field(default_factory=list)
    """Violations."""
    fired: bool = True
    """Whether the fault hit anything. A failpoint that no process reached proves nothing."""
    resumed: int = 0
    pauses_s: list[float] = field(default_factory=list)
    struck_s: float = 0.0
    """Seconds from the start of the run to the fault."""
    recovery_s: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    logprobs_within: float = LOGPROB_TOLERANCE
    day: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


class GoldenAnswers:
    """The answers of undisturbed streams. They are requested twice, to check that they are reproducible."""

    def __init__(self) -> None:
        self._known: dict[Ask, Golden] = {}

    async def learn(self, victims: Victims, asks: Sequence[Ask] = ASKS) -> None:
        for _ in range(2):
            seen = [Seen(ask, History(ask.name)) for ask in asks]
            await asyncio.gather(*(follow(victims.url, victims.target, one) for one in seen))
            for one in seen:
                golden = self._known.setdefault(one.ask, golden_of(one.history))
                assert not (apart := violations(one.history, golden)), f"not the same twice without any fault: {apart}"

    def __getitem__(self, ask: Ask) -> Golden:
        return self._known[ask]


async def one_run(victims: Victims, fault: Fault, seed: int, goldens: GoldenAnswers) -> Run:
    chance = random.Random(f"{fault.name} {seed}")
    run, asked = Run(fault.name, seed), time.monotonic()
    before = await victims.resumed()
    seen = [Seen(ask, History(f"{ask.name} ({fault.name}, seed {seed})")) for ask in ASKS]
    moment, marked = asyncio.Event(), chance.choice(seen)
    _set_event_at(marked, chance.choice(MOMENTS), goldens[marked.ask].num_tokens, moment)
    tasks = [asyncio.create_task(follow(victims.url, victims.target, one, delay_s=chance.uniform(0, 0.3))) for one in seen]
    leaving = _leaving(seen, tasks, chance) if fault.clients_leave else set()
    if not fault.clients_leave:  # the stream whose tokens are counted may be among those that leave
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                await moment.wait()
    begun = time.monotonic()
    run.struck_s = begun - asked
    some_run = any(not one.history.ends for one in seen)
    injected = await fault.inject(victims, chance)
    ended_by = asyncio.ensure_future(injected.undo()) if injected.undo else None
    beside = asyncio.ensure_future(fault.side_requests(victims, seed)) if fault.side_requests else None
    if fault.keeps_coming and ended_by is not None:
        await _keep_asking(victims, fault, seed, seen, tasks, until=ended_by)
    _, late = await asyncio.wait(tasks, timeout=STREAMS_END_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ended = time.monotonic()
    if ended_by is not None:
        try:
            await ended_by
        except Exception as error:
            run.wrong.append(f"what was done could not be undone: {error!r}"[:400])
    if beside is not None:
        try:
            run.wrong += await beside
        except Exception as error:  # record it as a violation and go on with the next run
            run.wrong.append(f"the requests beside: {type(error).__name__}: {error}")
    await _wait_for_recovery(victims, injected, run, begun)
    run.fired &= some_run
    run.wrong += [f"{one.ask.name}: no end within {STREAMS_END_S:g} s" for one, task in zip(seen, tasks, strict=True) if task in late]
    for one in seen:
        _judge(one, fault, goldens[one.ask], run, left=one in leaving)
    run.wrong += await victims.leftovers()
    await asyncio.sleep(max(0.0, ended + COUNTED_S - time.monotonic()))
    run.resumed = max(0, await victims.resumed() - before)
    return run


async def _keep_asking(
    victims: Victims, fault: Fault, seed: int, seen: list[Seen], tasks: "list[asyncio.Task[None]]", *, until: "asyncio.Future[None]"
) -> None:
    for number in itertools.count(1):
        if until.done():
            return
        ask = ASKS[number % len(ASKS)]
        seen.append(Seen(ask, History(f"{ask.name}, {number} after it ({fault.name}, seed {seed})")))
        tasks.append(asyncio.create_task(follow(victims.url, victims.target, seen[-1])))
        await asyncio.wait([until], timeout=NEXT_AFTER_S)


def _set_event_at(marked: Seen, when: str, num_tokens: int, moment: asyncio.Event) -> None:
    at = {"first": 1, "second": 2, "middle": num_tokens // 2, "last": num_tokens - 1}[when]

    def on_token(count: int) -> None:
        if count >= at:
            moment.set()

    marked.on_token = on_token


def _leaving(seen: list[Seen], tasks: "list[asyncio.Task[None]]", chance: random.Random) -> "set[Seen]":
    """Have half of the clients disconnect after some number of tokens, maybe 0. Returns their streams."""
    chosen = chance.sample(range(len(seen)), len(seen) // 2)

    def leave_at(number: int, count: int) -> None:
        told = seen[number].on_token

        def on_token(so_far: int) -> None:
            told(so_far)
            if so_far >= count:
                tasks[number].cancel()

        seen[number].on_token = on_token

    for number in chosen:
        leave_at(number, chance.choice((0, 1, 2, 10, 40)))
    return {seen[number] for number in chosen}


async def _wait_for_recovery(victims: Victims, injected: Injected, run: Run, begun: float) -> None:
    armed = [point for point in injected.points if disarm(victims.failpoints, point)]
    run.fired = not armed if injected.lost is None else bool(injected.lost)
    try:
        await victims.wait_until_recovered(injected.gone)
    except AssertionError as error:
        run.wrong.append(str(error))
    run.recovery_s = time.monotonic() - begun


def _judge(one: Seen, fault: Fault, golden: Golden, run: Run, *, left: bool) -> None:
    history = one.history
    run.streams += 1
    run.complete += history.is_complete
    run.lost += not history.is_complete and not left
    run.pauses_s.append(round(one.longest_pause_s, 3))
    end = history.ends[0] if history.ends else "no end"
    run.ends[end] = run.ends.get(end, 0) + 1
    run.wrong += violations(history, golden, may_fail=fault.may_fail, may_break=fault.tier > 1)
