"""Soak test: twenty minutes at 70 % of the server's peak load, to find anything that grows.

    python -m benchmarks.soak [--minutes 20] [--share 0.7] [--warm-up-minutes 4]

The server's model is simulated (`benchmarks.simulated_server`); everything else is real. Arrivals are Poisson, and one client in ten
disconnects during its answer. Memory, open files and threads of the front and replica processes are sampled every ten seconds. Reported
after the warm-up: the slope of a line fitted to the memory, files and threads at the end against those at the end of the warm-up,
KV blocks still held once all requests have ended, and p99 of the time per token in the last quarter against the first.

Targets: 5 MB per hour and process; no more files, threads or blocks; p99 within 10 %.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

import aiohttp
import psutil

from benchmarks.overload import LENGTH, RequestRecord, ask, open_loop, quantile
from benchmarks.simulated_server import SimulatedServer, StepCost, simulated_server

SAMPLE_S = 10.0
LEAVES = 0.1


@dataclass
class Samples:
    """Samples of one process."""

    at_s: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def take(self, process: psutil.Process, at_s: float) -> None:
        self.at_s.append(at_s)
        self.rss.append(process.memory_info().rss)
        self.files.append(process.num_fds())
        self.threads.append(process.num_threads())

    def growth_mb_per_hour(self, after_s: float) -> float:
        """Slope of the least-squares line through memory samples."""
        points = [(at, rss) for at, rss in zip(self.at_s, self.rss, strict=True) if at >= after_s]
        mean_at, mean_rss = (sum(column) / len(points) for column in zip(*points, strict=True))
        over = sum((at - mean_at) * (rss - mean_rss) for at, rss in points)
        return over / sum((at - mean_at) ** 2 for at, _ in points) * 3600 / 1e6

    def tell(self, name: str, after_s: float) -> None:
        first = next(index for index, at in enumerate(self.at_s) if at >= after_s)
        print(
            f"{name}: memory {self.rss[first] / 1e6:.1f} -> {self.rss[-1] / 1e6:.1f} MB, {self.growth_mb_per_hour(after_s):+.1f} MB/h;"
            f" files {self.files[first]} -> {self.files[-1]}; threads {self.threads[first]} -> {self.threads[-1]}"
        )


async def leaving(session: aiohttp.ClientSession, url: str, per_s: float, seconds: float) -> int:
    """Clients that disconnect during their answer. Returns how many."""
    chance, number, until = random.Random(3), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(chance.expovariate(per_s))
        number += 1
        task = asyncio.create_task(ask(session, url, 1_000_000 + number))
        asyncio.get_running_loop().call_later(chance.uniform(0.0, 1.5), task.cancel)
    return number


async def run(server: SimulatedServer, cost: StepCost, seconds: float, share: float, warm_up_s: float) -> None:
    per_s = share * cost.max_running / (LENGTH * (cost.base_s + cost.token_s * cost.max_running))
    samples = {"front": Samples(), "replica": Samples()}
    begun = time.monotonic()

    async def watch() -> None:
        while True:
            for name, process in (("front", server.front), ("replica", server.replica)):
                samples[name].take(process, time.monotonic() - begun)
            await asyncio.sleep(SAMPLE_S)

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), connector=connector) as session:
        watching = asyncio.create_task(watch())
        answers, num_left = await asyncio.gather(
            open_loop(session, server.url, per_s * (1 - LEAVES), seconds, seed=4), leaving(session, server.url, per_s * LEAVES, seconds)
        )
        await asyncio.sleep(5.0)
        watching.cancel()
    stats = server.stats()
    print(f"{seconds / 60:.0f} minutes at {per_s:.1f} requests/s ({share:.0%}): {len(answers)} asked, {num_left} left in the middle")
    refused = sum(answer.status in (429, 503) for answer in answers)
    print(f"not whole: {sum(not answer.is_whole for answer in answers) - refused}; refused: {refused}")
    _tell_drift([answer for answer in answers if answer.is_whole and answer.sent - begun > warm_up_s])
    for name, seen in samples.items():
        seen.tell(name, warm_up_s)
    print(f"blocks held after all is over: {stats.blocks_used}; running {stats.num_running}, waiting {stats.num_waiting}")


def _tell_drift(answers: list[RequestRecord]) -> None:
    quarter = len(answers) // 4
    p99 = [
        quantile([(one.end - one.first) / (one.tokens - 1) * 1000 for one in part], 0.99)
        for part in (answers[:quarter], answers[-quarter:])
    ]
    print(f"p99 of the time per token: {p99[0]:.1f} ms in the first quarter, {p99[1]:.1f} ms in the last ({p99[1] / p99[0] - 1:+.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--warm-up-minutes", type=float, default=4.0)
    given = parser.parse_args()
    cost = StepCost(max_waiting=64)
    with simulated_server(cost) as server:
        asyncio.run(run(server, cost, given.minutes * 60, given.share, given.warm_up_minutes * 60))


if __name__ == "__main__":
    main()
