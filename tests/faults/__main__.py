"""The fault suite: `python -m tests.faults [--faults a,b | --sweep | --pairs | --hosts] [--runs 20 | --missing 20 --seconds 450]
[--results FILE]`.

All runs use one server, so each also shows that the server has recovered from the one before. Every run adds a line to the results;
`python -m tests.faults.report FILE... > docs/faults.md` makes a table of them. With ``--missing`` the fault with the fewest runs in the
results comes next, so that many short sessions add up to the same number of runs of each fault.
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.catalogue import FAULTS
from tests.faults.host_faults import HOST_FAULTS
from tests.faults.host_server import hosts_under_test
from tests.faults.pairs import PAIRS
from tests.faults.run import GoldenAnswers, one_run
from tests.faults.server import Victims, server_under_test
from tests.faults.sweep import SWEPT

MOST_TRIES = 3
"""Tries for one run whose fault hits something. A failpoint that is never reached often enough (a rank loads only once) is given up."""


async def run_all(victims: Victims, turns: Iterator[tuple[str, int]], results: Path, ends_at: float) -> int:
    """Run all; returns the number of runs with violations."""
    goldens, num_wrong = GoldenAnswers(), 0
    await victims.wait_until_recovered()
    await goldens.learn(victims)
    for name, seed in turns:
        if (begun := time.monotonic()) > ends_at:
            break
        run = await one_run(victims, (FAULTS | PAIRS | SWEPT | HOST_FAULTS)[name], seed, goldens)
        if run.fired:
            with results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(run)) + "\n")
        num_wrong += bool(run.wrong)
        told = f"{name} {seed}: {run.complete}/{run.streams} whole, {run.lost} lost, {run.resumed} resumed"
        told += "" if run.fired else ", nobody came to the failpoint"
        told += f", pause {max(run.pauses_s):.1f} s, struck after {run.struck_s:.1f} s, whole after {run.recovery_s:.1f} s"
        print(f"{told}, all in all {time.monotonic() - begun:.0f} s", flush=True)
        for one in run.wrong[:6]:
            print("    " + one, flush=True)
        if any("not whole after" in one for one in run.wrong):
            print("\n".join(victims.server.lines[-60:]))
            return num_wrong
    return num_wrong


def in_rounds(names: Sequence[str], seeds: range) -> Iterator[tuple[str, int]]:
    """Every fault once, then again, so that all have about as many runs whenever the suite is stopped."""
    return ((name, seed) for seed in seeds for name in names)


def rarest_first(names: Sequence[str], wanted: int, results: Path) -> Iterator[tuple[str, int]]:
    """Repeatedly the fault with the fewest runs, and the seed after its last, until each has ``wanted`` runs whose fault hit something."""
    last, turns = Counter[str](), Counter[str]()
    while True:
        told = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        seeds = {name: [run["seed"] for run in told if run["fault"] == name] for name in names}
        turns |= Counter({name: len(seeds[name]) for name in names})
        missing = [name for name in names if len(seeds[name]) < wanted and turns[name] < MOST_TRIES * wanted]
        if not missing:
            return
        name = min(missing, key=lambda name: turns[name])
        last[name] = max([last[name], *seeds[name]]) + 1
        turns[name] += 1
        yield name, last[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", help="by name, with commas between; all of them unless told")
    parser.add_argument("--sweep", action="store_true", help="every failpoint instead")
    parser.add_argument("--pairs", action="store_true", help="two faults of different kinds at once instead")
    parser.add_argument("--hosts", action="store_true", help="faults of hosts instead, on three of them (root, iproute2 and redis-server)")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--missing", type=int, help="whatever fault has the fewest runs in the results, until each has so many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long, the server's start included")
    parser.add_argument("--results", type=Path, default=Path("/tmp/manta-faults.jsonl"))
    parser.add_argument("--keep-logs", type=Path, help="a folder for Ray's logs of the server")
    given = parser.parse_args()
    ends_at = time.monotonic() + given.seconds
    on_one_host = SWEPT if given.sweep else PAIRS if given.pairs else FAULTS
    known, under_test = (HOST_FAULTS, hosts_under_test) if given.hosts else (on_one_host, server_under_test)
    names = given.faults.split(",") if given.faults else list(known)
    seeds = range(given.first_seed, given.first_seed + given.runs)
    turns = in_rounds(names, seeds) if given.missing is None else rarest_first(names, given.missing, given.results)
    if (first := next(turns, None)) is None:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the server is ended on the way out
    with under_test(keep_logs=given.keep_logs) as victims:
        num_wrong = asyncio.run(run_all(victims, itertools.chain([first], turns), given.results, ends_at))
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
