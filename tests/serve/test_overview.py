"""What an onlooker is told of replicas that should be there."""

from serve.overview import HostView, _unheard

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
