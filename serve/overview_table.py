"""An `Overview` as tables for a terminal."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Group
from rich.text import Text

from cluster.directory import ReplicaRecord
from serve.overview import AppView, FrontView, HostView, Overview
from serve.quantiles import Counts, counts_between, quantile
from serve.terminal import Column, ColumnTable

WINDOW_S = 10.0
COLOURS = {"ready": "green", "RUNNING": "green", "starting": "yellow", "recovering": "yellow", "DEPLOYING": "yellow", "draining": "cyan"}
"""Of states; those that are not here are red."""
SHARES = {"p50": 0.5, "p95": 0.95}


class Window:
    """The overviews of the last seconds, from which rates and recent latencies are computed."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Overview]] = deque()

    def add(self, at_s: float, seen: Overview) -> None:
        self._looks.append((at_s, seen))
        while at_s - self._looks[0][0] > WINDOW_S and len(self._looks) > 2:
            self._looks.popleft()

    def tokens_per_s(self, record: ReplicaRecord) -> float | None:
        (began_s, first), (now_s, _) = self._looks[0], self._looks[-1]
        earlier = next((old for _, old in first.replicas if old.id == record.id), None)
        if earlier is None or earlier.stats is None or record.stats is None or now_s <= began_s:
            return None
        return max(0, record.stats.sampled_tokens - earlier.stats.sampled_tokens) / (now_s - began_s)

    def recent_latency(self, key: tuple[str, str], first_token: Counts, next_token: Counts) -> tuple[Counts, Counts]:
        before = self._looks[0][1].waits.get(key)
        if before is None or len(self._looks) < 2:
            return first_token, next_token
        return counts_between(first_token, before.first_token), counts_between(next_token, before.next_token)


def tables(seen: Overview, window: Window | None) -> Group:
    return Group(*_parts(seen, window))


def _parts(seen: Overview, window: Window | None) -> Iterator[ColumnTable | Text]:
    yield _hosts(seen)
    for words in seen.missing:
        yield Text(words, style="red")
    if not (seen.apps or seen.replicas):
        if not seen.missing:
            yield Text("nothing is deployed" if seen.http else "Ray Serve does not run", style="yellow")
        return
    for app in seen.apps:
        yield _app(app, [front for name, front in seen.fronts if name == app.name], seen.http)
        if app.message and app.status != "RUNNING":
            yield Text(app.message.strip()[-2000:], style="red")
    yield _replicas(seen, window)
    if seen.waits:
        yield _waits(seen, window)


def _app(app: AppView, fronts: Sequence[FrontView], http: str | None) -> Text:
    """Ray Serve calls an application running also while its fronts refuse requests, or have no replicas for them."""
    states = Counter(front.state for front in fronts)
    none_ready = app.status == "RUNNING" and bool(fronts) and not states["ready"]
    state = app.status if not none_ready else "draining" if states["draining"] else "not ready"
    words = "draining (it refuses new requests)" if state == "draining" else state.lower()
    line = Text.assemble("\n", (app.name, "bold"), " is ", (words, COLOURS.get(state, "red")), f", HTTP {http}")
    for each, number in () if none_ready else states.items():
        if each != "ready":
            line.append(f", {number} of {len(fronts)} fronts {each}", COLOURS.get(each, "red"))
    return line


TEXTUAL = ("host", "address", "model", "state", "ranks", "last loss", "replica")
KEYS = ("host", "model", "replica")
LONG = ("state", "ranks", "last loss")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> ColumnTable:
    made = [Column(heading=name, is_text=name in TEXTUAL, wraps=name in LONG, is_key=name in KEYS) for name in columns]
    return ColumnTable(made, list(rows))


def _hosts(seen: Overview) -> ColumnTable:
    rows = []
    for host in seen.hosts:
        ranks = sum(place.host == host.name for _, record in seen.replicas for place in record.ranks)
        state = Text("alive", style="green") if host.alive else Text("dead", style="red")
        rows.append((host.name, host.ip, state, _used(host, "CPU"), _used(host, "GPU"), str(ranks)))
    return _table(("host", "address", "state", "CPU used", "GPU used", "ranks"), rows)


def _used(host: HostView, resource: str) -> str:
    total = host.resources.get(resource, 0.0)
    return f"{total - host.free.get(resource, 0.0):g} / {total:g}" if total and host.alive else ""


def _replicas(seen: Overview, window: Window | None) -> ColumnTable:
    rows = []
    for _, record in seen.replicas:
        state = f"{record.state}: {record.loading.doing} {record.loading.done:.0%}" if record.loading else str(record.state)
        speed = window.tokens_per_s(record) if window else None
        row = (
            record.model,
            record.id.rsplit("#", 1)[-1][-8:],
            Text(state + (f" ({record.reason})" if record.reason else ""), style=COLOURS.get(record.state, "red")),
            ranks_in_words(record),
            f"{record.load.kv_used:.0%}",
            str(record.load.num_running),
            str(record.load.num_waiting),
            "" if speed is None else f"{speed:.1f}",
            str(record.num_restarts),
            record.last_loss or "",
        )
        rows.append(row)
    return _table(("model", "replica", "state", "ranks", "KV", "running", "waiting", "tokens/s", "restarts", "last loss"), rows)


def ranks_in_words(record: ReplicaRecord) -> str:
    """Which ranks are on which host: ``gpu-1: 0-3, gpu-2: 4-7``"""
    by_host: dict[str, list[int]] = {}
    for place in record.ranks:
        by_host.setdefault(place.host, []).append(place.rank)
    return ", ".join(f"{host}: {_runs(sorted(ranks))}" for host, ranks in by_host.items())


def _runs(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2 5"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _waits(seen: Overview, window: Window | None) -> ColumnTable:
    rows = []
    for key, waits in seen.waits.items():
        both = (waits.first_token, waits.next_token)
        figures = wait_figures(*(window.recent_latency(key, *both) if window else both))
        rows.append((key[1], *("" if value is None else f"{value * 1e3:.0f} ms" for value in figures.values())))
    return _table(("model", "first token p50", "first token p95", "next token p50", "next token p95"), rows)


def wait_figures(first_token: Counts, next_token: Counts) -> Mapping[str, float | None]:
    """In seconds; None where nothing was measured."""
    each = {"first_token": first_token, "next_token": next_token}
    return {f"{name}_{label}_s": quantile(counts, share) for name, counts in each.items() for label, share in SHARES.items()}
