"""CPU time of the control plane per step, with simulated ranks that answer immediately.

    python -m benchmarks.control_plane [--sequences 256] [--steps 600] [--rounds 5] [--speculate lookup]

A step is one turn of a real engine (inbox, deadlines, plan, record, statistics), encoding the plan, decoding the result, and encoding the
messages with tokens to one front. Each part is timed with the CPU clock of this thread; the simulated ranks' work is not counted. All
sequences decode. With blocks of 16 tokens, a sixteenth of them gets a new block in every step and publishes a full one. With `--churn`
answers are short, so that in every step some requests end and as many start. With `--speculate` the engine may draft tokens; the ranks
report 5 ms per step plus 0.2 ms per token.

Also measured: the receivers' work (a rank decodes the plan and builds the batch; a front decodes the events and passes them to its
streams). No model, no sockets.
"""

import argparse
import asyncio
import gc
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.front_protocol import FrontProtocol
from cluster.health import State
from cluster.messages import Pong, Submit, decode, encode
from cluster.replica_link import ReplicaLink, StreamBuffer
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.fair_share import FairShare
from engine.plan import SampledTokens, StepPlan, StepResult, TokenEvent
from engine.request import Request, SamplingParams
from engine.run.batch_builder import build_batch
from engine.run.block_tables import BlockTables
from engine.shard_results import pack_tokens

PROMPT_TOKENS = 128
BLOCK_TOKENS = 16
TURN = "engine's turn"
COUNTED = (TURN, "plan to bytes", "result from bytes", "tokens to bytes")
WITHIN = ("plan to bytes", "rank: plan read", "rank: batch made", "ranks", "result from bytes")
"""Parts that run inside an engine turn; subtracted from it."""
BESIDE = ("rank: plan read", "rank: batch made", "front: tokens read", "front: handed out")
T = TypeVar("T")


class Clock:
    """CPU seconds of this thread by part."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    def of(self, part: str, do: Callable[[], T]) -> T:
        began = time.thread_time()
        done = do()
        self.spent[part] += time.thread_time() - began
        return done


class Ranks:
    """An executor that serialises plans and results, and a rank that decodes them."""

    def __init__(self, clock: Clock, num_sequences: int, far_ends: bool) -> None:
        self.capacity = Capacity(num_blocks=num_sequences * 512, block_tokens=BLOCK_TOKENS, max_context_tokens=8192)
        self._clock, self._far_ends, self._tables = clock, far_ends, BlockTables()

    def submit(self, plan: StepPlan) -> "Answer":
        raw = self._clock.of("plan to bytes", lambda: encode(plan))
        if self._far_ends:
            read = self._clock.of("rank: plan read", lambda: decode(raw))
            self._clock.of("rank: batch made", lambda: self._build(read))
        return Answer(self._clock.of("ranks", lambda: self._answered(plan)), self._clock)

    def _answered(self, plan: StepPlan) -> bytes:
        sampled = [SampledTokens(work.sequence, (1000 + work.start,)) for work in plan.works if work.samples]
        tokens, rest = pack_tokens(plan.decodes, sampled)
        return encode(StepResult(plan.step, rest, 0.005 + 0.0002 * plan.num_tokens, tokens=tokens))

    def _build(self, plan: StepPlan) -> None:
        for number in plan.closed:
            self._tables.close(number)
        for opening in plan.opened:
            self._tables.open(opening.sequence)
        works = plan.works
        for work in works:
            self._tables.append(work)
        build_batch(works, self._tables, BLOCK_TOKENS, torch.device("cpu"))

    def close(self) -> None:
        pass


class Answer:
    def __init__(self, raw: bytes, clock: Clock) -> None:
        self._raw, self._clock = raw, clock

    def result(self) -> StepResult:
        result: StepResult = self._clock.of("result from bytes", lambda: decode(self._raw))
        return result


class NullSocket:
    """A socket that never receives anything; messages are passed to the link directly."""

    def send(self, raw: bytes) -> None:
        pass

    def receive(self) -> Any:
        return asyncio.get_running_loop().create_future()

    closed = receive

    def close(self) -> None:
        pass


def request_of(number: int, max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=number, max_tokens=max_tokens, stop_token_ids=(151_643, 151_645))
    prompt = tuple(100 * number % 100_000 + place for place in range(PROMPT_TOKENS + number % BLOCK_TOKENS))
    return Request(id=f"{number:032x}", prompt=prompt, sampling=sampling, tenant=f"tenant-{number % 8}", deadline_s=2e9, tag=number)


async def one_round(
    num_sequences: int, steps: int, churn: bool, speculate: Literal["lookup"] | None, *, far_ends: bool
) -> tuple[dict[str, list[float]], float]:
    """(CPU seconds per step by part, mean number of tokens per step).

    ``far_ends``: do the ranks' and the front's parts too. They are other processes; here they would leave the engine's part cold caches
    and their garbage, so that they have rounds of their own.
    """
    clock, parts, sent = Clock(), defaultdict(list), []
    config = EngineConfig(
        block_tokens=BLOCK_TOKENS,
        max_running=num_sequences,
        max_step_tokens=max(8192, num_sequences * (PROMPT_TOKENS + BLOCK_TOKENS)),
        speculate=speculate,
    )
    engine = Engine(Ranks(clock, num_sequences, far_ends), config, policy=FairShare())
    protocol = FrontProtocol(
        post=lambda front, raw: sent.append(raw),
        submit=engine.submit,
        cancel=engine.cancel,
        pong=lambda: Pong(ready=True, num_running=0, num_waiting=0),
        front_silence_s=1e9,
    )
    record = ReplicaRecord(id="r", model="m", state=State.READY, address=None)
    link = ReplicaLink(record, node="n", config=RouterConfig(max_buffered_tokens=10**9), transport=NullSocket())
    made, tokens = 0, 0

    def submit_one(max_tokens: int) -> None:
        nonlocal made
        request = request_of(made, max_tokens)
        protocol.receive(b"front", [encode(Submit(request))])
        made += 1

    for _ in range(num_sequences):
        submit_one(made % 200 + 20 if churn else 8000)
    for step in range(-20, steps):
        clock.spent.clear()
        told = clock.of(TURN, engine.turn)
        ends = [event for event in told.events if event.finish_reason is not None]
        protocol.enqueue(told)
        sent.clear()
        clock.of("tokens to bytes", protocol.send_all)
        if far_ends:
            _dispatch_events(clock, link, told.events, sent)
        clock.spent[TURN] -= sum(clock.spent[part] for part in WITHIN)
        for _ in ends:
            submit_one(made % 200 + 20)
        if step >= 0:
            tokens += len(told)
            for part, seconds in clock.spent.items():
                parts[part].append(seconds)
    await link.close()
    return parts, tokens / steps


def _dispatch_events(clock: Clock, link: ReplicaLink, events: list[TokenEvent], sent: list[bytes]) -> None:
    for event in events:
        key = (event.request_id, event.choice, event.attempt)
        link._streams[key] = link._by_number[int(event.request_id, 16)] = StreamBuffer(10**9, key=key)
    for raw in sent:
        message = clock.of("front: tokens read", lambda raw=raw: decode(raw))
        clock.of("front: handed out", lambda message=message: link._dispatch_events(message))
    for buffer in link._by_number.values():  # as readers do
        buffer._events.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--churn", action="store_true", help="answers of 20 to 219 tokens, each followed by another request")
    parser.add_argument("--speculate", choices=["lookup"], help="with speculative decoding")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, with_far_ends = [], []
    for kept, far_ends in ((rounds, False), (with_far_ends, True)):
        for _ in range(arguments.rounds):
            gc.collect()
            kept.append(
                asyncio.run(one_round(arguments.sequences, arguments.steps, arguments.churn, arguments.speculate, far_ends=far_ends))
            )
    print(
        f"{arguments.sequences} sequences, {rounds[0][1]:.0f} tokens a step, {'with churn' if arguments.churn else 'all decode'}, "
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; us of CPU per step, the quietest of {arguments.rounds} rounds"
    )
    print(f"{'':<24}{'tenth':>10}{'median':>10}{'mean':>10}")
    totals = [[sum(step) for step in zip(*(parts[part] for part in COUNTED), strict=True)] for parts, _ in rounds]
    for part in COUNTED:
        _print(part, [parts[part] for parts, _ in rounds])
    _print("a step of the engine", totals)
    for part in BESIDE:
        _print(part, [parts[part] for parts, _ in with_far_ends])


def _print(name: str, rounds: list[list[float]]) -> None:
    """The first decile shows what the code costs when other processes disturb little."""
    figures = [[statistics.quantiles(one, n=10)[0], statistics.median(one), statistics.mean(one)] for one in rounds]
    tenth, median, mean = (min(figure) * 1e6 for figure in zip(*figures, strict=True))
    print(f"{name:<24}{tenth:>10,.0f}{median:>10,.0f}{mean:>10,.0f}")


if __name__ == "__main__":
    main()
