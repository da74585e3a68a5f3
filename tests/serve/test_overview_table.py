"""Status tables, from what an onlooker saw. No Ray."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.channel import Address
from cluster.directory import Load, RankPlace, ReplicaRecord
from cluster.health import Loading, State
from engine.stats import EngineStats
from serve.overview import AppView, FrontView, HostView, LatencyCounts, Overview
from serve.overview_table import Window, ranks_in_words, tables, wait_figures
from serve.quantiles import counts_between, merge_counts, quantile

READY = ReplicaRecord(
    id="manta#EngineDeployment-demo#abcdefgh",
    model="demo",
    state=State.READY,
    address=Address(node="n"),
    load=Load(num_running=3, num_waiting=2, kv_used=0.25),
    stats=EngineStats(sampled_tokens=100),
    ranks=tuple(RankPlace(rank=rank, host="gpu-1" if rank < 3 else "gpu-2", pid=rank) for rank in (0, 1, 2, 3, 5)),
)
HOST = HostView(name="gpu-1", ip="10.0.0.1", alive=True, resources={"CPU": 8.0, "GPU": 4.0}, free={"CPU": 6.0, "GPU": 1.0})
WAITS = LatencyCounts(
    first_token=merge_counts([(0.1, 0.0), (0.2, 10.0), (float("inf"), 10.0)]), next_token=merge_counts([(0.01, 4.0), (float("inf"), 4.0)])
)
SEEN = Overview(
    hosts=(HOST,),
    apps=(AppView(name="manta", status="RUNNING", message=""),),
    replicas=(("manta", READY),),
    waits={("manta", "demo"): WAITS},
    http="127.0.0.1:8000",
)


def shown(seen: Overview, window: Window | None = None) -> str:
    written = io.StringIO()
    Console(width=160, file=written).print(tables(seen, window))
    return " ".join(written.getvalue().split())


def test_a_healthy_server_is_told_with_its_hosts_ranks_load_and_waits() -> None:
    told = shown(SEEN)
    assert "gpu-1 10.0.0.1 alive 2 / 8 3 / 4 3" in told
    assert "manta is running, HTTP 127.0.0.1:8000" in told
    assert "demo abcdefgh ready gpu-1: 0-2, gpu-2: 3 5 25% 3 2" in told
    assert "demo 150 ms 195 ms 5 ms 10 ms" in told


def fronts(*states: str) -> tuple[tuple[str, FrontView], ...]:
    each = [FrontView(id=str(number), ready=state == "ready", draining=state == "draining") for number, state in enumerate(states)]
    return tuple(("manta", front) for front in each)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (("ready", "ready"), "manta is running, HTTP 127.0.0.1:8000 model"),
        (("ready", "draining"), "manta is running, HTTP 127.0.0.1:8000, 1 of 2 fronts draining"),
        (("draining",), "manta is draining (it refuses new requests), HTTP 127.0.0.1:8000 model"),
        (("draining", "not ready"), "manta is draining (it refuses new requests), HTTP 127.0.0.1:8000 model"),
        (("not ready",), "manta is not ready, HTTP 127.0.0.1:8000 model"),
    ],
)
def test_an_application_runs_only_if_one_of_its_fronts_accepts_requests(states: tuple[str, ...], words: str) -> None:
    assert words in shown(replace(SEEN, fronts=fronts(*states)))


def test_it_is_complete_only_if_all_fronts_and_replicas_are_ready_and_nothing_is_missing() -> None:
    assert replace(SEEN, fronts=fronts("ready", "ready")).complete
    assert not replace(SEEN, fronts=fronts("ready", "draining")).complete
    assert not replace(SEEN, replicas=(("manta", replace(READY, state=State.RECOVERING)),)).complete
    assert not replace(SEEN, missing=("Ray's head",)).complete
    assert not replace(SEEN, apps=(AppView(name="manta", status="DELETING", message=""),)).complete


def test_an_application_that_does_not_run_is_called_what_ray_serve_calls_it() -> None:
    deleting = AppView(name="manta", status="DELETING", message="")
    assert "manta is deleting, HTTP 127.0.0.1:8000, 1 of 1 fronts draining" in shown(
        replace(SEEN, apps=(deleting,), fronts=fronts("draining"))
    )


def test_what_is_wrong_is_told_with_its_reason() -> None:
    loading = replace(READY, state=State.STARTING, loading=Loading(doing="weights", done=0.5), last_loss="rank 1 on gpu-1 was lost")
    failed = AppView(name="manta", status="DEPLOY_FAILED", message="no such folder")
    told = shown(replace(SEEN, hosts=(replace(HOST, alive=False),), apps=(failed,), replicas=(("manta", loading),)))
    for words in ("gpu-1 10.0.0.1 dead", "manta is deploy_failed", "no such folder", "starting: weights 50%", "rank 1 on gpu-1 was lost"):
        assert words in told


def test_what_is_silent_is_told_and_does_not_look_like_nothing() -> None:
    told = shown(Overview(hosts=(HOST,), apps=(), replicas=(), waits={}, missing=("Ray Serve's controller: no answer within 5 s",)))
    assert "Ray Serve's controller: no answer within 5 s" in told
    assert "does not run" not in told


def test_where_nothing_runs_it_says_so() -> None:
    assert "nothing is deployed" in shown(Overview(hosts=(), apps=(), replicas=(), waits={}, http="127.0.0.1:8000"))
    assert "Ray Serve does not run" in shown(Overview(hosts=(), apps=(), replicas=(), waits={}))


def test_rates_and_waits_of_a_live_view_are_of_late() -> None:
    window = Window()
    assert "tokens/s" in shown(SEEN)
    window.add(0.0, SEEN)
    later = replace(
        SEEN,
        replicas=(("manta", replace(READY, stats=EngineStats(sampled_tokens=150))),),
        waits={
            ("manta", "demo"): LatencyCounts(
                first_token=merge_counts([(0.1, 5.0), (0.2, 15.0), (float("inf"), 15.0)]), next_token=WAITS.next_token
            )
        },
    )
    window.add(5.0, later)
    told = shown(later, window)
    assert "3 2 10.0" in told
    assert "demo 50 ms 95 ms" in told
    window.add(100.0, later)
    window.add(101.0, later)
    assert window.tokens_per_s(later.replicas[0][1]) == 0


def test_ranks_are_written_as_runs_by_host() -> None:
    assert ranks_in_words(READY) == "gpu-1: 0-2, gpu-2: 3 5"


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, 2.0: 10.0, float("inf"): 10.0}, 0.5, 1.5),
        ({1.0: 0.0, 2.0: 5.0, float("inf"): 10.0}, 0.9, 2.0),
        ({1.0: 10.0, float("inf"): 10.0}, 1.0, 1.0),
    ],
)
def test_quantiles_lie_on_a_straight_line_within_their_bucket(counts, share, value) -> None:
    assert quantile(counts, share) == value


def test_a_front_that_began_anew_counts_from_its_beginning() -> None:
    assert counts_between({1.0: 3.0}, {1.0: 10.0}) == {1.0: 3.0}
    assert wait_figures({}, {}) == dict.fromkeys(("first_token_p50_s", "first_token_p95_s", "next_token_p50_s", "next_token_p95_s"))
