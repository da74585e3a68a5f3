"""Generates docs/faults.md from the results of `python -m tests.faults`: `python -m tests.faults.report FILE... > docs/faults.md`."""

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

HEAD = f"""# Fault injection results

Written by `python -m tests.faults.report tests/faults/*.jsonl > docs/faults.md`; a test compares. Do not edit.

- [Results by fault](#by-fault), [by host fault](#by-host), [by failpoint](#by-failpoint)

## Method

Faults are injected into a real server on one machine, and its clients' streams are compared with an undisturbed run.

**Server:** two replicas of two ranks each (tensor parallel, CPU, float32, a random model of two million parameters), two fronts.

**Load:** in every run {len(ASKS)} streams start within 0.3 s: over HTTP and gRPC, greedy, seeded, `n=2`, with penalties, with
log-probabilities and with a JSON schema, at most {LENGTH} tokens per choice. The fault is injected when one of them has received its
first, second, middle or last but one token; the run's seed determines which, and the victim. The next run begins when the server has
recovered completely: both replicas with all their ranks ready, fronts, proxy and controller running.

**Comparison** (`tests/history.py`): every stream must have one end, offsets without gaps or repeats, the same tokens, text, finish reason
and usage, and log-probabilities within 1e-5. Over HTTP, tokens are compared by their bytes if there are log-probabilities, else by their
number and text. After each run no block, running choice or open request may be left.

**Tiers:** in T1, clients must not notice anything. In T2 the fault hits the process that holds the clients' sockets: a plain client's
stream breaks, and must not end as if it were complete.

| Column | Meaning |
|---|---|
| lost | streams without a complete end; must be 0 in T1 |
| violations | differences that the comparison found, including lost streams of T1 |
| resumed | choices that continued on another replica, or anew on the same one, as counted by the surviving fronts |
| p99 pause | the longest time that a stream waited for its next token, including the first; 99th percentile over all streams of the fault |
| recovered after | time from the fault to the start of the next run, median and maximum; includes waiting for streams that still run |

The machine had 2 cores and many other jobs, and measurements had priority over these runs: times show what a crowded machine needs, not
the server's best. Where a fault has fewer than 20 runs, there was no time for more. If a run found a bug, it was fixed and the run
repeated; such runs are not in the table, nor are nine of the first, for which it was not recorded whether the fault hit anything.

**Log-probabilities:** with the CPU kernels (`parallel/native/`; weights as float32, bfloat16, int8
or int4), a token gives the same bits whether it was decoded or recomputed as part of a prompt, alone or in any batch, so those of a resumed
stream are equal if both hosts use the same variant of the kernels (AMX, AVX-512 or AVX2); `tests/model/test_same_bits.py` checks this for
dense and mixture-of-experts models. Elsewhere (no compiler, GPUs) the order of sums depends on the number of tokens in a step; the same
random model then differed by up to 9e-5 on this machine, with logits that span 20.
"""

MANY = 8
SWEPT_HEAD = """
## By failpoint

`python -m tests.faults --sweep`: each named point in the code (`engine/failpoints.py`) is made to fail when a process reaches it for the
first, the second or the fifth time after some stream's first, second, middle or last but one token. The process is killed (SIGKILL),
raises, hangs, or loses the current message or logits. If a point is only reached after the loss of a rank or a replica, or with more
requests, these are added.

- *lost*: streams that ended neither completely nor with a typed error. It must be 0 unless the front itself is killed (T2).
- *failed*: streams that received an error: those whose own handling raised in a front, those whose front was killed before it had answered
  (T2: 503), and no others.
- *identical*: resumed choices of runs in which no stream differed from the undisturbed one.
"""

HOSTS = """
## By host

Three hosts: network namespaces of one machine, connected by a switch, each with a Ray started by `ray start --block`. The *head* has no
CPUs for ranks; it runs Ray's GCS, which keeps its state in Redis, and Ray Serve's controller. A second host has the front, the proxy that
clients use and a replica of one rank; the third has another replica. The victim is the third host, or the head. A host that has ended is
restarted, as its supervisor would do. The streams are those from above, plus one every half second from the fault to its end. No client is
connected to the victim, so all faults are T1. Ray's head was configured to declare a silent host dead after about 12 s
(`RAY_health_check_period_ms=1000`, `_timeout_ms=3000`, `_failure_threshold=3`; without these settings 65 s were seen), and the other hosts
to wait 300 s for a head (`RAY_gcs_rpc_server_reconnect_timeout_s`). *Recovered after* includes the time for which the host is away, the
start of its Ray, and Ray Serve's restart of what was lost there.
"""

KNOWN = FAULTS | HOST_FAULTS
COLUMNS = [
    "| Fault | Tier | Runs | Streams | Lost | Violations | Resumed | p99 pause | Recovered after |",
    "|---|---|---|---|---|---|---|---|---|",
]


def table(lines: Iterable[str]) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        run = json.loads(line)
        runs[run["fault"]].append(run)
    told = [HEAD, _all_in_all([run for name in KNOWN for run in runs[name]]), "", "## By fault", "", *COLUMNS]
    told += [_row(FAULTS[name].description, f"T{FAULTS[name].tier}", runs[name]) for name in FAULTS if runs[name]]
    if hosts := [name for name in HOST_FAULTS if runs[name]]:
        told += [HOSTS, *COLUMNS, *(_row(HOST_FAULTS[name].description, f"T{HOST_FAULTS[name].tier}", runs[name]) for name in hosts)]
    return "\n".join(told) + "\n" + _swept_part({name: runs[name] for name in SWEPT if runs[name]})


def _swept_part(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each point and tier, and what nobody came to."""
    if not runs:
        return ""
    rows = [
        "| Failpoint | Reached by | Fault (runs) | Tier | Runs | Streams | Lost | Failed | Resumed | Identical | Violations |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        for tier in (1, 2):
            names = [name for name in runs if point_of(name) == point and SWEPT[name].tier == tier]
            rows += [_swept_row(point, names, [run for name in names for run in runs[name]])] if names else []
    every = [run for of_one in runs.values() for run in of_one]
    said = f"{len(every)} runs, {_sum(every, 'streams')} streams, {sum(len(run['wrong']) for run in every)} violations."
    if missing := [name for name in SWEPT if name not in runs]:
        said += (
            f" Of {len(SWEPT)} combinations {len(missing)} are missing: the point was not reached while streams ran, or time was short: "
        )
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
        f"Total, {when}: {len(runs)} runs, {_sum(runs, 'streams')} streams, {_sum(runs, 'resumed')} resumed choices, "
        f"{wrong} violations; of the {_sum(invisible, 'streams')} streams in T1, {_sum(invisible, 'lost')} were lost."
    )


def _row(description: str, tier: str, runs: list[dict[str, Any]]) -> str:
    times = [run["recovery_s"] for run in runs]
    whole = f"{statistics.median(times):.1f} s, {max(times):.1f} s"
    return f"| {description} | {tier} | {len(runs)} | {_counts(runs)} | {_sum(runs, 'resumed')} | {_pause(runs)} | {whole} |"


def _swept_row(point: str, names: list[str], runs: list[dict[str, Any]]) -> str:
    what = Counter(SWEPT[run["fault"]].description for run in runs)
    done = ", ".join(f"{description} ({count})" for description, count in what.items())
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
