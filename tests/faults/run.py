"""One run: streams, a fault in the midst of them, and what is to be said of it afterwards."""

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from engine.failpoints import Failure, arm, disarm
from tests.faults.catalogue import Fault, Harm
from tests.faults.server import Victims
from tests.faults.streams import ASKS, Ask, Seen, follow, golden_of
from tests.history import LOGPROB_TOLERANCE, Golden, History, violations

MOMENTS = ("first", "second", "middle", "last")
POISON_PROMPT = "Привет"
CROWD = 1_000
STREAMS_END_S = 240.0


@dataclass
class Run:
    """What came of one."""

    fault: str
    seed: int
    streams: int = 0
    complete: int = 0
    lost: int = 0
    """Streams that did not come to their whole end, and did not leave."""
    wrong: list[str] = field(default_factory=list)
    """Broken promises."""
    resumed: int = 0
    pauses_s: list[float] = field(default_factory=list)
    recovery_s: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    logprobs_within: float = LOGPROB_TOLERANCE


class Goldens:
    """Undisturbed answers, made once for a server and asked for twice to see that they are."""

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


async def one_run(victims: Victims, fault: Fault, seed: int, goldens: Goldens) -> Run:
    chance = random.Random(f"{fault.name} {seed}")
    run = Run(fault.name, seed)
    before = await victims.resumed()
    seen = [Seen(ask, History(f"{ask.name} ({fault.name}, seed {seed})")) for ask in ASKS]
    moment, marked = asyncio.Event(), chance.choice(seen)
    _tell_at(marked, chance.choice(MOMENTS), goldens[marked.ask].num_tokens, moment)
    tasks = [asyncio.create_task(follow(victims.url, victims.target, one, delay_s=chance.uniform(0, 0.3))) for one in seen]
    leaving = _leaving(seen, tasks, chance) if fault.extra == "leave" else set()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            await moment.wait()
    begun = time.monotonic()
    harm = await fault.inject(victims, chance)
    ended_by = asyncio.create_task(harm.undo()) if harm.undo else None
    beside = asyncio.create_task(_beside(fault, victims, run))
    _, late = await asyncio.wait(tasks, timeout=STREAMS_END_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if ended_by is not None:
        await ended_by
    await beside
    await _become_whole(victims, harm, run, begun)
    run.resumed = max(0, await victims.resumed() - before)
    run.wrong += [f"{one.ask.name}: no end within {STREAMS_END_S:g} s" for one, task in zip(seen, tasks, strict=True) if task in late]
    for one in seen:
        _judge(one, fault, goldens[one.ask], run, left=one in leaving)
    run.wrong += await victims.at_rest()
    return run


def _tell_at(marked: Seen, when: str, num_tokens: int, moment: asyncio.Event) -> None:
    at = {"first": 1, "second": 2, "middle": num_tokens // 2, "last": num_tokens - 1}[when]

    def on_token(count: int) -> None:
        if count >= at:
            moment.set()

    marked.on_token = on_token


def _leaving(seen: list[Seen], tasks: "list[asyncio.Task[None]]", chance: random.Random) -> "set[Seen]":
    """Half of the clients, each after some number of tokens; before the first of them too."""
    chosen = chance.sample(range(len(seen)), len(seen) // 2)

    def leave_at(number: int, count: int) -> None:
        told = seen[number].on_token

        def on_token(so_far: int) -> None:
            told(so_far)
            if so_far >= count:
                tasks[number].cancel()

        seen[number].on_token = on_token

    for number in chosen:
        leave_at(number, chance.choice((0, 1, 2, 40, 100)))
    return {seen[number] for number in chosen}


async def _beside(fault: Fault, victims: Victims, run: Run) -> None:
    if fault.extra == "poison":
        await _poison(victims, run)
    elif fault.extra == "crowd":
        await _crowd(victims, run)
    elif fault.extra == "long answers":
        await _long_answers(victims, run)
    elif fault.extra == "long prompts":
        await asyncio.gather(*(_complete(victims, run, f"{run.seed} {at} " * 240, 16) for at in range(6)))


async def _long_answers(victims: Victims, run: Run) -> None:
    """Twelve of them would take 22,000 places, and two replicas have 15,600."""
    before = await victims.counted("manta_preemptions_total")
    await asyncio.gather(*(_complete(victims, run, f"{run.seed} {at}", 1_800) for at in range(12)))
    await asyncio.sleep(3.0)  # fronts tell their counts every two seconds
    if await victims.counted("manta_preemptions_total") == before:
        run.wrong.append("nothing was preempted, so this has shown nothing")


async def _complete(victims: Victims, run: Run, prompt: str, length: int) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": length, "ignore_eos": True}
    limits = aiohttp.ClientTimeout(total=STREAMS_END_S)
    async with aiohttp.ClientSession(timeout=limits) as session, session.post(f"{victims.url}/v1/completions", json=body) as answer:
        told = await answer.json()
    counted = told.get("usage", {}).get("completion_tokens")
    if counted != length:
        run.wrong.append(f"a request beside was answered by {answer.status}, {counted} tokens: {str(told)[:200]}")


async def _poison(victims: Victims, run: Run) -> None:
    """A request that kills whoever computes it must end with an error that says so, at its own cost alone."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=STREAMS_END_S)) as session:
        async with session.post(f"{victims.url}/tokenize", json={"prompt": POISON_PROMPT}) as answer:
            token = (await answer.json())["tokens"][0]
        arm(victims.failpoints, "rank.step", Failure(action="crash", token=token))
        try:
            body = {"model": "tiny", "prompt": [token, run.seed + 300], "max_tokens": 20}
            async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
                told = await answer.text()
            if "poison" not in told:
                run.wrong.append(f"the poisonous request was answered by {answer.status}: {told[:200]}")
        finally:
            disarm(victims.failpoints, "rank.step")


async def _crowd(victims: Victims, run: Run) -> None:
    """Whoever is refused must be told so; who is not is answered."""

    async def ask(session: aiohttp.ClientSession) -> str:
        try:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
            async with session.post(f"{victims.url}/v1/completions", json=body) as answer:
                await answer.read()
                return str(answer.status)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            return type(error).__name__

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=STREAMS_END_S)) as session:
        answers = await asyncio.gather(*(ask(session) for _ in range(CROWD)))
    for answer in set(answers):
        run.ends[f"crowd {answer}"] = answers.count(answer)
        if answer not in ("200", "429", "503"):
            run.wrong.append(f"{answers.count(answer)} of {CROWD} connections ended with {answer}")


async def _become_whole(victims: Victims, harm: Harm, run: Run, begun: float) -> None:
    for point in harm.points:
        disarm(victims.failpoints, point)
    try:
        await victims.until_whole(harm.gone)
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
