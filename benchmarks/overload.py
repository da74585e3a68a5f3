"""Overload: goodput, refusals and recovery when ten times the peak load arrives for a minute.

    python -m benchmarks.overload [--times 10] [--seconds 60]

The server's model is simulated (`benchmarks.simulated_server`): a step takes a fixed time. Everything else is the real server, over HTTP.

1. Closed loop with as many clients as the server runs sequences at once: this gives the peak rate.
2. Open loop at ``--times`` the peak rate.
3. Open loop at half the peak rate. The server has recovered once no later request's time to first token exceeds twice that of the peak.

Targets: goodput at least 90 % of the peak, p99 of refusals below 100 ms, recovery within 5 s.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from benchmarks.simulated_server import MODEL, StepCost, simulated_server

LENGTH = 32
PROMPT_WORDS = 24


@dataclass
class RequestRecord:
    """Times of one request, in seconds of `time.monotonic`."""

    sent: float
    status: int = 0
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def took_s(self) -> float:
        return self.end - self.sent

    @property
    def ttft_s(self) -> float:
        return self.first - self.sent


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> RequestRecord:
    prompt = " ".join(str((number * 7919 + at) % 100) for at in range(PROMPT_WORDS))
    body = {"model": MODEL, "prompt": prompt, "max_tokens": LENGTH, "ignore_eos": True, "stream": True}
    asked = RequestRecord(sent=time.monotonic())
    try:
        async with session.post(f"{url}/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as answer:
            asked.status = answer.status
            if answer.status != 200:
                await answer.read()
                if answer.status in (429, 503) and "retry-after" not in answer.headers:
                    asked.error = "refused without Retry-After"
                return asked
            asked.error = "no end"
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    asked.first = asked.first or time.monotonic()
                    event = json.loads(line[6:])
                    if "error" in event:
                        asked.error = str(event["error"]["code"])
                        break
                    asked.tokens = (event.get("usage") or {}).get("completion_tokens", asked.tokens)
                elif line.startswith(b"data: [DONE]"):
                    asked.error = ""
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        asked.error = type(error).__name__
    finally:
        asked.end = time.monotonic()
    return asked


async def closed_loop(session: aiohttp.ClientSession, url: str, clients: int, seconds: float) -> list[RequestRecord]:
    """Closed loop: each client sends its next request as soon as it has its answer."""
    until = time.monotonic() + seconds

    async def client(number: int) -> list[RequestRecord]:
        answers = []
        while time.monotonic() < until:
            answers.append(await ask(session, url, number + clients * len(answers)))
        return answers

    return [answer for answers in await asyncio.gather(*map(client, range(clients))) for answer in answers]


async def open_loop(session: aiohttp.ClientSession, url: str, per_s: float, seconds: float, seed: int) -> list[RequestRecord]:
    """Open loop: requests are sent at Poisson arrival times, whatever happened to earlier ones."""
    tasks = [asyncio.create_task(ask(session, url, number)) async for number in _arrivals(per_s, seconds, random.Random(seed))]
    return list(await asyncio.gather(*tasks))


async def _arrivals(per_s: float, seconds: float, chance: random.Random) -> AsyncGenerator[int, None]:
    due, number, begun = 0.0, 0, time.monotonic()
    while (due := due + chance.expovariate(per_s)) < seconds:
        await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
        yield number
        number += 1


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def goodput(answers: list[RequestRecord], begun: float, seconds: float) -> float:
    """Tokens per second of complete answers that ended within ``seconds`` after ``begun``."""
    return sum(answer.tokens for answer in answers if answer.is_whole and begun <= answer.end <= begun + seconds) / seconds


async def run(url: str, cost: StepCost, times: float, seconds: float, stats: Callable[[], Awaitable[object]]) -> None:
    limits = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        await closed_loop(session, url, cost.max_running, 5.0)
        begun = time.monotonic()
        answers = await closed_loop(session, url, cost.max_running, 20.0)
        peak = goodput(answers, begun, 20.0)
        ttft_s = quantile([answer.ttft_s for answer in answers], 0.9)
        print(f"peak: {peak:.0f} tokens/s, {peak / LENGTH:.1f} answers/s, p90 of the first token {ttft_s * 1000:.0f} ms")

        begun = time.monotonic()
        storm = asyncio.create_task(open_loop(session, url, times * peak / LENGTH, seconds, seed=1))
        await asyncio.sleep(seconds)
        calm_from = time.monotonic()
        after = await open_loop(session, url, 0.5 * peak / LENGTH, 20.0, seed=2)
        answers = await storm
        print("the replica afterwards:", await stats())
    print(f"{times:g} times that for {seconds:g} s:")
    _tell(answers, peak, goodput(answers, begun + 5.0, seconds - 5.0))
    restless = [answer.first - calm_from for answer in after if not answer.is_whole or answer.ttft_s > 2 * ttft_s]
    left = sum(not one.is_whole for one in after)
    print(f"calm after {max(restless, default=0.0):.1f} s ({len(after)} requests at half the peak, {left} of them not whole)")


def _tell(answers: list[RequestRecord], peak: float, good: float) -> None:
    refused = [answer for answer in answers if answer.status in (429, 503) and not answer.error]
    whole = [answer for answer in answers if answer.is_whole]
    others = [answer for answer in answers if not answer.is_whole and answer not in refused]
    print(f"{len(answers)} requests: {len(whole)} whole, {len(refused)} refused, {len(others)} otherwise")
    print(f"goodput: {good:.0f} tokens/s, {good / peak:.0%} of the peak")
    first, took = ([getattr(one, name) for one in whole] for name in ("ttft_s", "took_s"))
    print(f"accepted: p99 of the first token {quantile(first, 0.99):.2f} s, of the whole {quantile(took, 0.99):.2f} s")
    took = [1000 * one.took_s for one in refused]
    print(f"refusals: p50 {quantile(took, 0.5):.0f} ms, p99 {quantile(took, 0.99):.0f} ms")
    for answer in others[:5]:
        print("   ", answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    cost = StepCost()
    with simulated_server(cost) as server:

        async def stats() -> object:
            return await asyncio.to_thread(server.stats)

        asyncio.run(run(server.url, cost, given.times, given.seconds, stats))


if __name__ == "__main__":
    main()
