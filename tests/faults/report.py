"""Makes docs/faults.md of the lines that `python -m tests.faults` wrote: `python -m tests.faults.report FILE... > docs/faults.md`."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.faults.catalogue import FAULTS
from tests.faults.streams import ASKS, LENGTH
from tests.faults.sweep import SWEPT, says

HEAD = f"""# Faults

Written by `python -m tests.faults.report tests/faults/results.jsonl > docs/faults.md`; a test compares. Do not edit.

What was done to a real server on one machine, and what its clients saw of it. The server: two replicas of two ranks each (tensor
parallel, CPU, float32, a random model of two million parameters), two fronts. In every run {len(ASKS)} streams come within 0.3 s: over
HTTP and gRPC, greedy, seeded, `n=2`, with penalties, with log-probabilities and with a JSON schema, {LENGTH} tokens a
choice at most. The fault strikes when one of them has its first, second, middle or last token but one; which, and who is hurt,
is chosen by the run's seed. The next run begins when the server is whole again: both replicas with all their ranks ready, fronts,
proxy and controller there.

Every stream is compared with the same one in an undisturbed run (`tests/history.py`): one end, offsets without a gap or a repeat, the
same tokens, text, finish reason and usage, log-probabilities within 1e-5. Over HTTP tokens are
compared by their bytes where there are log-probabilities, else by their number and text. After each run no block, running choice or open
request may be left.

- *lost*: streams without their whole end. It must be 0 where clients must see nothing (T1); where the process that holds their sockets is
  hurt (T2) a plain client's stream breaks, and it must not end as if it were complete.
- *broken promises*: whatever the comparison found, a lost stream of T1 among it.
- *resumed*: choices that went on at another replica, or at the same one anew, as the fronts that are left count them.
- *pause*: the longest wait of a stream for its next token, its first included; the 99th percentile over all streams of the fault.
- *whole after*: from the fault to the next run's beginning, median and maximum; streams that still run are waited for in it.

The machine had 2 cores and many other jobs on them, and whatever was measured went before: times say what a crowded machine needs, not what
the server does at best. Fewer than 20 runs of a fault are what there was time for. Where a run found something it was mended, and the run
done again; such runs are not in the table, nor are nine of the first, of which it was not noted whether the fault struck anybody.

Log-probabilities: with the CPU kernels (`parallel/native/`; weights as float32, bfloat16 where oneDNN's tiles do not multiply it, int8
or int4) a token gives the same bits whether
it was decoded or taken in again with a prompt, alone or in any company, so a resumed stream's are equal; `tests/model/test_same_bits.py`
holds that for dense and mixture-of-experts models. Elsewhere (no compiler, GPUs) sums are in an order that depends on how many tokens a
step has; the same random model then differed by up to 9e-5 on this machine, of logits that span 20.
"""


def table(lines: Iterable[str]) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        run = json.loads(line)
        runs[run["fault"]].append(run)
    told = [HEAD, _all_in_all([run for name in FAULTS for run in runs[name]]), "", "## By fault", ""]
    told += [
        "| Fault | tier | runs | streams | lost | broken promises | resumed | p99 pause | whole after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    told += [_row(FAULTS[name].says, f"T{FAULTS[name].tier}", runs[name]) for name in FAULTS if runs[name]]
    swept = [name for name in SWEPT if name in runs]
    if swept:
        told += ["", "## By failpoint", "", "Named points of the code (`engine/failpoints.py`), made to fail at their k-th hit.", ""]
        told += ["| Where | what | tier | runs | streams | lost | broken promises | p99 pause |", "|---|---|---|---|---|---|---|---|"]
        told += [_swept_row(name, runs[name]) for name in swept]
    return "\n".join(told) + "\n"


def _all_in_all(runs: list[dict[str, Any]]) -> str:
    invisible = [run for run in runs if FAULTS[run["fault"]].tier == 1]
    days = sorted({run["day"] for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    wrong = sum(len(run["wrong"]) for run in runs)
    return (
        f"All in all, of {when}: {len(runs)} runs, {_sum(runs, 'streams')} streams, {_sum(runs, 'resumed')} resumed choices, "
        f"{wrong} broken promises; of the {_sum(invisible, 'streams')} streams of T1 {_sum(invisible, 'lost')} were lost."
    )


def _row(says_it: str, tier: str, runs: list[dict[str, Any]]) -> str:
    times = [run["recovery_s"] for run in runs]
    whole = f"{statistics.median(times):.1f} s, {max(times):.1f} s"
    return f"| {says_it} | {tier} | {len(runs)} | {_counts(runs)} | {_sum(runs, 'resumed')} | {_pause(runs)} | {whole} |"


def _swept_row(name: str, runs: list[dict[str, Any]]) -> str:
    where, what, tier = says(name)
    return f"| {where} | {what} | T{tier} | {len(runs)} | {_counts(runs)} | {_pause(runs)} |"


def _counts(runs: list[dict[str, Any]]) -> str:
    return f"{_sum(runs, 'streams')} | {_sum(runs, 'lost')} | {sum(len(run['wrong']) for run in runs)}"


def _sum(runs: list[dict[str, Any]], name: str) -> int:
    return sum(int(run[name]) for run in runs)


def _pause(runs: list[dict[str, Any]]) -> str:
    pauses = sorted(pause for run in runs for pause in run["pauses_s"])
    return f"{pauses[int(0.99 * (len(pauses) - 1))]:.1f} s"


if __name__ == "__main__":
    sys.stdout.write(table(line for file in sys.argv[1:] for line in Path(file).read_text().splitlines()))
