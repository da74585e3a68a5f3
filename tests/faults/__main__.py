"""The fault suite: `python -m tests.faults [--faults a,b | --sweep] [--runs 20] [--first-seed 1] [--results FILE]`.

One server is up for all runs: that it is whole again after each is a part of what is shown. Every run is a line of the results;
`python -m tests.faults.report FILE... > docs/faults.md` makes the table of them.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

from tests.faults.catalogue import FAULTS
from tests.faults.run import Goldens, one_run
from tests.faults.server import Victims, server_under_test
from tests.faults.sweep import SWEPT


async def run_all(victims: Victims, names: list[str], seeds: range, results: Path) -> int:
    goldens, num_wrong = Goldens(), 0
    await victims.until_whole()
    await goldens.learn(victims)
    for seed in seeds:  # every fault once, then again: whenever it is stopped all have been tried about as often
        for name in names:
            begun = time.monotonic()
            run = await one_run(victims, (FAULTS | SWEPT)[name], seed, goldens)
            with results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(run)) + "\n")
            num_wrong += bool(run.wrong)
            told = f"{name} {seed}: {run.complete}/{run.streams} whole, {run.lost} lost, {run.resumed} resumed"
            print(
                f"{told}, pause {max(run.pauses_s):.1f} s, whole after {run.recovery_s:.1f} s, {time.monotonic() - begun:.0f} s", flush=True
            )
            for one in run.wrong[:6]:
                print("    " + one, flush=True)
            if any("not whole after" in one for one in run.wrong):
                print("\n".join(victims.server.lines[-60:]))
                return num_wrong
    return num_wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help="by name, with commas between")
    parser.add_argument("--sweep", action="store_true", help="every failpoint instead")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("/tmp/manta-faults.jsonl"))
    parser.add_argument("--keep-logs", type=Path, help="a folder for Ray's logs of the server")
    given = parser.parse_args()
    names, seeds = list(SWEPT) if given.sweep else given.faults.split(","), range(given.first_seed, given.first_seed + given.runs)
    with server_under_test(keep_logs=given.keep_logs) as victims:
        num_wrong = asyncio.run(run_all(victims, names, seeds, given.results))
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
