"""Makes docs/faults.md of the lines that `python -m tests.faults` wrote: `python -m tests.faults.report FILE... > docs/faults.md`."""

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.failpoints import POINTS
from tests.faults.catalogue import FAULTS
from tests.faults.host_faults import HOST_FAULTS
from tests.faults.streams import ASKS, LENGTH
from tests.faults.sweep import HITS, SWEPT, hit_of, point_of

HEAD = f"""# Faults

Written by `python -m tests.faults.report tests/faults/*.jsonl > docs/faults.md`; a test compares. Do not edit.

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

MANY = 8
SWEPT_HEAD = """
## By failpoint

`python -m tests.faults --sweep`: each named point of the code (`engine/failpoints.py`) is made to fail, when
a process comes there for the first, the second or the fifth time after some stream's first, second, middle or last token but one: it
is killed (SIGKILL), raises, stands still, or loses the message or logits at hand. Where it
takes the loss of a rank or a replica, or more requests, that somebody comes there, there are these, too.

- *lost*: streams that ended neither whole nor with a typed error. It must be 0 but where the front itself is killed (T2).
- *failed*: streams that were told an error: those in whose own handling a front raised, and nobody else's.
- *identical*: of the resumed choices those of runs in which no stream differed in anything from the undisturbed one.
"""

HOSTS = """
## By host

Three hosts: network namespaces of the one machine on a switch, each with a Ray as `ray start --block` starts it. The *head* has no CPUs for
ranks: Ray's GCS, which keeps what it knows in Redis, and Ray Serve's controller. A second host has the front, the proxy that clients talk
to and a replica of one rank, the third another replica. It is the third that is hurt, or the head. A host that has ended is
started anew, as its supervisor would do. The streams are those from above, and one more every half second from the fault to its end; no
client sits on the host that is hurt, so that all is T1. Ray's head was told to give up a silent host after some 12 s
(`RAY_health_check_period_ms=1000`, `_timeout_ms=3000`, `_failure_threshold=3`; 65 s were seen unless it is told), and
the other hosts to wait 300 s for a head (`RAY_gcs_rpc_server_reconnect_timeout_s`). *Whole after* has the time in it for which the host is
away, the start of its Ray, and Ray Serve's start of what was lost there.
"""

KNOWN = FAULTS | HOST_FAULTS
COLUMNS = [
    "| Fault | tier | runs | streams | lost | broken promises | resumed | p99 pause | whole after |",
    "|---|---|---|---|---|---|---|---|---|",
]


def table(lines: Iterable[str]) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        run = json.loads(line)
        runs[run["fault"]].append(run)
    told = [HEAD, _all_in_all([run for name in KNOWN for run in runs[name]]), "", "## By fault", "", *COLUMNS]
    told += [_row(FAULTS[name].says, f"T{FAULTS[name].tier}", runs[name]) for name in FAULTS if runs[name]]
    if hosts := [name for name in HOST_FAULTS if runs[name]]:
        told += [HOSTS, *COLUMNS, *(_row(HOST_FAULTS[name].says, f"T{HOST_FAULTS[name].tier}", runs[name]) for name in hosts)]
    return "\n".join(told) + "\n" + _swept_part({name: runs[name] for name in SWEPT if runs[name]})


def _swept_part(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each point and tier, and what nobody came to."""
    if not runs:
        return ""
    rows = [
        "| Failpoint | who comes there | fault (runs) | tier | runs | streams | lost | failed | resumed | identical | broken promises |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        for tier in (1, 2):
            names = [name for name in runs if point_of(name) == point and SWEPT[name].tier == tier]
            rows += [_swept_row(point, names, [run for name in names for run in runs[name]])] if names else []
    every = [run for of_one in runs.values() for run in of_one]
    said = f"{len(every)} runs, {_sum(every, 'streams')} streams, {sum(len(run['wrong']) for run in every)} broken promises."
    if missing := [name for name in SWEPT if name not in runs]:
        said += f" Of {len(SWEPT)} ways {len(missing)} are missing, as nobody came there while streams ran, or for lack of time: "
        by_hit = {hit: [f"`{name}`" for name in missing if hit_of(name) == hit] for hit in HITS}
        said += "; ".join(
            f"at hit {hit} " + (", ".join(names) if len(names) < MANY else f"{len(names)}") for hit, names in by_hit.items() if names
        )
        said += "."
    return "\n".join([SWEPT_HEAD, *rows, "", said]) + "\n"


def _all_in_all(runs: list[dict[str, Any]]) -> str:
    invisible = [run for run in runs if KNOWN[run["fault"]].tier == 1]
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


def _swept_row(point: str, names: list[str], runs: list[dict[str, Any]]) -> str:
    what = Counter(SWEPT[run["fault"]].says for run in runs)
    done = ", ".join(f"{says_it} ({count})" for says_it, count in what.items())
    ends = Counter[str]()
    for run in runs:
        for end, count in run["ends"].items():
            ends[end.partition(":")[0]] += count
    identical = _sum([run for run in runs if not run["wrong"]], "resumed")
    wrong = sum(len(run["wrong"]) for run in runs)
    counts = f"{len(runs)} | {_sum(runs, 'streams')} | {_sum(runs, 'lost') - ends['failed']} | {ends['failed']}"
    return (
        f"| `{point}` | {POINTS[point]} | {done} | T{SWEPT[names[0]].tier} | {counts} | {_sum(runs, 'resumed')} | {identical} | {wrong} |"
    )


def _counts(runs: list[dict[str, Any]]) -> str:
    return f"{_sum(runs, 'streams')} | {_sum(runs, 'lost')} | {sum(len(run['wrong']) for run in runs)}"


def _sum(runs: list[dict[str, Any]], name: str) -> int:
    return sum(int(run[name]) for run in runs)


def _pause(runs: list[dict[str, Any]]) -> str:
    pauses = sorted(pause for run in runs for pause in run["pauses_s"])
    return f"{pauses[int(0.99 * (len(pauses) - 1))]:.1f} s"


if __name__ == "__main__":
    sys.stdout.write(table(line for file in sys.argv[1:] for line in Path(file).read_text().splitlines()))
