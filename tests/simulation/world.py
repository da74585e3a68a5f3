"""The simulation of one seed: replicas, one front, clients that differ in behaviour, and faults at random times."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.replica_link import ReplicaLink
from cluster.router import Router
from cluster.routing_policies import LeastLoaded, RoundRobin, RoutingPolicy
from engine.errors import EngineError
from engine.plan import TokenEvent
from engine.request import Request
from serve.errors import ServeError
from serve.model_facts import ModelFacts
from serve.request import CompletionRequest, Options
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.history import Golden, GoldenChoice, History, violations
from tests.simulation.network import Network, Weather
from tests.simulation.replica import FIRST_TOKEN, LAST_TOKEN, NAN, POISON, SimReplica, token_of

CONFIG = RouterConfig(stall_timeout_s=2.0, ready_wait_s=10.0, ping_s=0.5, replica_silence_s=2.0, refresh_s=0.25)
END_OF_ALL_S = 400.0
"""Timeout for all clients, in virtual time."""
QUIET_S = 15.0
"""Time for recovery after the last client, before the final checks."""
AGAIN = 5
"""Seconds that a link may take to be ready again while messages are being lost."""
SELDOM = 0.005
"""Up to this rate of lost messages, and four times this rate of reordered ones, no client may notice, unless there are other faults."""
LOST = frozenset({"ReplicaLost", "NoReplicaReady", "PoisonedRequest", "ResumesExhausted", "EngineStopped", "InvalidLogits"})


class Undisturbed:
    """A source of tokens without a router, a network or faults."""

    def ready(self) -> bool:
        return True

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        for position in range(request.sampling.max_tokens):
            last = position == request.sampling.max_tokens - 1
            yield TokenEvent(
                request.id, request.choice, 0, position, (token_of(request, position),), finish_reason="length" if last else None
            )


@dataclass
class Client:
    request: CompletionRequest
    arrives_s: float
    leaves_after: int | None
    reads_in_s: float
    may_fail: set[str] = field(default_factory=lambda: {"QueueFull"})
    history: History = field(init=False)
    golden: Golden = field(init=False)
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self.history = History(self.request.request_id)


@dataclass
class World:
    seed: int
    facts: ModelFacts
    tokenizer: Tokenizer
    wrong: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """A log of what happened, to understand a failing seed."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.num_replicas = self.chance.choice((1, 2, 2, 3, 3))
        self.num_faults = self.chance.choice((0, 1, 1, 1, 2, 3))
        kind = self.chance.random()
        self.weather = Weather(delay_s=self.chance.choice((0.001, 0.02, 0.1)))
        if kind > 0.5:
            self.weather.repeat = self.weather.overtake = self.chance.choice((0.02, 0.2))
        if kind > 0.75:
            self.weather.drop = self.chance.choice((0.005, 0.05))
        self.num_made = 0

    @property
    def is_calm(self) -> bool:
        return not (self.weather.repeat or self.weather.overtake or self.weather.drop)

    async def run(self) -> list[str]:
        self.network = Network(self.chance, self.weather)
        self.directory: dict[str, ReplicaRecord] = {}
        for _ in range(self.num_replicas):
            self._start_replica()
        self.router = Router(
            replicas=self,
            connect=self._connect,
            policy=self._policy(),
            config=CONFIG,
            clock=asyncio.get_running_loop().time,
            unix_clock=asyncio.get_running_loop().time,
        )
        await self.router.open()
        await asyncio.sleep(1.0)
        service = self._service(self.router)
        clients = [await self._client(number) for number in range(self.chance.randint(3, 9))]
        self._allow_failures(clients)
        faults = asyncio.create_task(self._faults())
        running = [asyncio.create_task(self._ask(service, client)) for client in clients]
        done, late = await asyncio.wait(running, timeout=END_OF_ALL_S)
        self.wrong += [
            f"{client.history.name}: no end within {END_OF_ALL_S:g} s"
            for client, task in zip(clients, running, strict=True)
            if task in late
        ]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()
        await faults
        for client in clients:
            self.wrong += violations(client.history, client.golden, may_fail=client.may_fail)
        await self._check_nothing_is_left()
        return self.wrong

    # --- the router's view

    @property
    def known(self) -> tuple[ReplicaRecord, ...]:
        return tuple(self.directory.values())

    async def refresh(self) -> tuple[ReplicaRecord, ...]:
        return self.known

    def _connect(self, record: ReplicaRecord) -> ReplicaLink:
        clock = asyncio.get_running_loop().time
        return ReplicaLink(record, node="n", config=CONFIG, clock=clock, unix_clock=clock, transport=self.network.connect(record.id))

    def _policy(self) -> RoutingPolicy:
        return self.chance.choice((LeastLoaded, RoundRobin))()

    def _service(self, source: object) -> Service:
        clock = asyncio.get_running_loop().time
        return Service(model=self.facts, tokenizer=self.tokenizer, source=source, clock=clock)  # type: ignore[arg-type]

    # --- clients

    async def _client(self, number: int) -> Client:
        chance = self.chance
        prompt = tuple(chance.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(chance.randint(1, 5)))
        trouble = chance.random()
        may_fail = {"QueueFull"}
        if trouble < 0.03:
            prompt, may_fail = (*prompt, POISON), may_fail | {"PoisonedRequest"}
        elif trouble < 0.08:
            prompt, may_fail = (*prompt, NAN), may_fail | {"InvalidLogits"}
        deadline_s = chance.uniform(1.0, 6.0) if chance.random() < 0.15 else None
        if deadline_s is not None:
            may_fail.add("DeadlineExceeded")
        options = Options(seed=number, n=chance.choice((1, 1, 2, 3)), max_tokens=chance.randint(1, 12), temperature=1.0, ignore_eos=True)
        arrives_s = chance.uniform(0.0, 3.0)
        client = Client(
            request=CompletionRequest(
                request_id=f"request-{number}",
                model="tiny",
                prompts=(prompt,),
                options=options,
                deadline_s=None if deadline_s is None else asyncio.get_running_loop().time() + arrives_s + deadline_s,
            ),
            arrives_s=arrives_s,
            leaves_after=chance.randint(0, 8) if chance.random() < 0.15 else None,
            reads_in_s=0.4 if chance.random() < 0.1 else 0.0,
            may_fail=may_fail,
        )
        await self._make_golden(client)
        return client

    async def _make_golden(self, client: Client) -> None:
        """Compute the answer of an undisturbed run; sometimes add a stop string that occurs in it."""
        service = self._service(Undisturbed())
        undated = dataclasses.replace(client.request, deadline_s=None)
        result = await service.collect(undated)
        text = result.choices[0].text
        if self.chance.random() < 0.2 and len(text) > 4:
            at = self.chance.randrange(len(text) - 2)
            stop = text[at : at + 2]
            if stop.strip() and "\ufffd" not in stop:
                options = dataclasses.replace(client.request.options, stop=(stop,))
                client.request = dataclasses.replace(client.request, options=options)
                result = await service.collect(dataclasses.replace(undated, options=options))
        client.golden = Golden(
            tuple(GoldenChoice(tuple(token.id for token in one.tokens), one.text, one.finish_reason) for one in result.choices),
            prompt_tokens=result.usage.prompt_tokens,
        )

    async def _ask(self, service: Service, client: Client) -> None:
        loop, history = asyncio.get_running_loop(), client.history
        await asyncio.sleep(client.arrives_s)
        offsets: dict[int, int] = {}
        usage = None
        try:
            async with aclosing(service.complete(client.request)) as events:
                num_events = 0
                if client.leaves_after == 0:
                    history.left()
                    return
                async for event in events:
                    ids = [token.id for token in event.tokens]
                    history.token(event.choice, offsets.get(event.choice, 0), ids, text=event.text)
                    offsets[event.choice] = offsets.get(event.choice, 0) + len(ids)
                    if event.finish_reason is not None:
                        history.finish(event.choice, event.finish_reason)
                    if event.usage is not None:
                        usage = event.usage
                        history.usage(usage.completion_tokens, usage.prompt_tokens)
                    num_events += 1
                    if num_events == client.leaves_after and usage is None:
                        history.left()
                        return
                    await asyncio.sleep(client.reads_in_s)
            if usage is None:
                history.wrong.append("ended without usage")
            history.complete()
        except (EngineError, ServeError) as error:
            history.failed(type(error).__name__)
            self.log.append(f"{loop.time():.2f} {history.name}: {type(error).__name__}: {error}")
        finally:
            client.ended_s = loop.time()
            deadline_s = client.request.deadline_s
            if deadline_s is not None and client.ended_s > deadline_s + 1.0 and not client.reads_in_s:
                self.wrong.append(f"{history.name}: ended {client.ended_s - deadline_s:.1f} s after its deadline")

    def _allow_failures(self, clients: list[Client]) -> None:
        """With another replica, a single fault must be invisible, and so must rare losses of messages; with more faults clients may get
        typed errors."""
        num_poisons = sum(POISON in client.request.prompts[0] for client in clients)
        num_wrong = self.num_faults + 2 * num_poisons
        is_bad = self.weather.drop > SELDOM or self.weather.overtake > 4 * SELDOM
        if num_wrong > (1 if self.num_replicas > 1 else 0) or (num_wrong and not self.is_calm) or is_bad:
            for client in clients:
                client.may_fail |= LOST

    # --- faults

    def _start_replica(self) -> None:
        self.num_made += 1
        replica = SimReplica(
            id=f"replica-{self.num_made}", chance=self.chance, post=self.network.post, step_s=self.chance.uniform(0.02, 0.1)
        )
        self.network.replicas[replica.id] = replica
        self.directory[replica.id] = replica.record

    async def _faults(self) -> None:
        chance, loop = self.chance, asyncio.get_running_loop()
        begun = loop.time()
        for at in sorted(chance.uniform(0.0, 4.0) for _ in range(self.num_faults)):
            await asyncio.sleep(max(0.0, begun + at - loop.time()))
            if not self.network.replicas:
                continue
            replica = self.network.replicas[chance.choice(sorted(self.network.replicas))]
            fault = chance.choice(("kill", "freeze", "ranks", "nan", "stop", "cut", "cut to", "cut from"))
            seconds = chance.choice((0.3, 1.0, 3.0, 8.0))
            self.log.append(f"{loop.time():.2f} {fault} {replica.id} {seconds:g} s")
            match fault:
                case "kill":
                    self.network.kill(replica.id)
                    loop.call_later(seconds, self._replace, replica.id)
                case "freeze":
                    replica.freeze(seconds)
                case "ranks":
                    replica.lose_ranks(seconds)
                case "nan":
                    replica.compute_nan()
                case "stop":
                    replica.stop()
                    loop.call_later(1.0, self._gone, replica.id)
                    loop.call_later(seconds, self._replace, replica.id)
                case _:
                    for direction in ("to", "from") if fault == "cut" else (fault.split()[1],):
                        self.network.cut_until[replica.id, direction] = loop.time() + seconds

    def _gone(self, replica_id: str) -> None:
        if replica_id in self.network.replicas:
            self.network.kill(replica_id)

    def _replace(self, replica_id: str) -> None:
        self._gone(replica_id)
        self.directory.pop(replica_id, None)
        self._start_replica()

    # --- afterwards

    async def _check_nothing_is_left(self) -> None:
        await asyncio.sleep(QUIET_S)
        for _ in range(AGAIN):  # messages are still being lost: a link that lost all its pongs is being reconnected
            if all(link.lost or link.ready for link in self.router._links.values()):
                break
            await asyncio.sleep(1.0)
        for replica in self.network.replicas.values():
            if replica.runs:
                self.wrong.append(f"{replica.id} still computes {sorted(replica.runs)}")
            if replica.protocol.num_owned:
                self.wrong.append(f"{replica.id} still has owners of {replica.protocol.num_owned} choices")
        for link in self.router._links.values():
            if link.num_streams:  # type: ignore[attr-defined]
                self.wrong.append(f"{link!r} still has streams")
            if not link.lost and not link.ready:
                self.wrong.append(f"{link!r} is not ready after all is over")
        if not self.router.ready():
            self.wrong.append("the router is not ready after all is over")
        await self.router.close()
        for replica in self.network.replicas.values():
            replica.kill()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            self.wrong.append(f"tasks are left: {sorted(task.get_name() for task in left)}")
