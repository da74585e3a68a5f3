"""What an onlooker is told of replicas that should be there, and of fronts."""

from serve import metric_names as names
from serve.metrics import Instruments, Snapshot
from serve.overview import HostView, _fronts, _unheard

HOST = HostView(name="gpu-1", ip="10.0.0.1", alive=True, resources={}, free={})
NAME = "EngineDeployment-tiny"


def replica(name: str, state: str = "RUNNING") -> dict[str, str]:
    return {"replica_id": name, "state": state, "node_ip": "10.0.0.1"}


def told(wanted: int, *replicas: dict[str, str], reported: set[str]) -> list[str]:
    app = {"deployments": {NAME: {"target_num_replicas": wanted, "replicas": list(replicas)}}}
    return list(_unheard(app, reported, [HOST]))


def test_nothing_is_missing_where_all_run_and_have_reported() -> None:
    assert told(2, replica("a"), replica("b"), reported={"a", "b"}) == []


def test_a_replica_that_runs_and_does_not_report_is_named_with_its_host() -> None:
    (words,) = told(2, replica("a"), replica("b"), reported={"a"})
    assert words == f"replica b of {NAME} on host gpu-1: it has not reported of late"


def test_a_replica_that_has_no_place_is_missing_too() -> None:
    (words,) = told(2, replica("a"), replica("b", "STARTING"), reported={"a"})
    assert words == f"{NAME}: 1 of 2 replicas run"


def note(front: str, *, ready: bool, draining: bool | None) -> Snapshot:
    instruments = Instruments(front)
    instruments.set(names.FRONT_READY, ready)
    if draining is not None:
        instruments.set(names.FRONT_DRAINING, draining)
    return instruments.snapshot()


def seen(*notes: Snapshot, running: list[str] | None) -> list[tuple[str, str]]:
    app = {} if running is None else {"deployments": {"FrontDeployment": {"replicas": [replica(name) for name in running]}}}
    return [(front.id, front.state) for front in _fronts(app, notes)]


def test_fronts_are_told_by_what_they_have_published() -> None:
    notes = (note("b", ready=False, draining=True), note("a", ready=True, draining=False), note("c", ready=False, draining=False))
    assert seen(*notes, running=["a", "b", "c"]) == [("a", "ready"), ("b", "draining"), ("c", "not ready")]


def test_a_front_that_has_ended_is_left_out_where_ray_serve_says_so() -> None:
    notes = (note("a", ready=True, draining=False), note("b", ready=False, draining=True))
    assert seen(*notes, running=["a"]) == [("a", "ready")]
    assert seen(*notes, running=None) == [("a", "ready"), ("b", "draining")], "its controller does not answer"


def test_a_front_of_a_version_that_does_not_tell_whether_it_drains_is_taken_by_its_readiness() -> None:
    assert seen(note("a", ready=True, draining=None), running=["a"]) == [("a", "ready")]
