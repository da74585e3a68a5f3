"""Which front a proxy gives a call to. `tests/system/test_draining.py` has real fronts and a real proxy."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.request_router import PendingRequest

from serve.front_router import ADMIN_METHODS, DRAINING, FrontRouter, candidates, front_router_config
from serve.grpc.generated import admin_pb2


@dataclass(frozen=True)
class Front:
    replica_id: str
    routing_stats: dict[str, Any] = field(default_factory=dict, hash=False)


A, B, C = Front("a"), Front("b"), Front("c", {DRAINING: False})
DRAINED, DRAINED_TOO = Front("d", {DRAINING: True}), Front("e", {DRAINING: True})


@pytest.mark.parametrize(
    ("fronts", "nearby", "method", "found"),
    [
        ([A, B, C], set(), "__call__", "abc"),
        ([A, B, C], {"b"}, "__call__", "b"),
        ([A, DRAINED], set(), "__call__", "a"),
        ([A, DRAINED], {"d"}, "Chat", "a"),
        ([A, B, DRAINED], {"a", "d"}, "ChatStream", "a"),
        ([DRAINED, DRAINED_TOO], set(), "Chat", "de"),
        ([DRAINED, DRAINED_TOO], {"e"}, "Chat", "e"),
        ([DRAINED], {"d"}, "__call__", "d"),
        ([A, DRAINED], set(), "Drain", "ad"),
        ([A, DRAINED], {"d"}, "Abort", "d"),
    ],
)
def test_a_front_that_drains_gets_a_call_only_if_all_do_or_if_it_is_the_operators(
    fronts: list[Front], nearby: set[str], method: str, found: str
) -> None:
    assert "".join(front.replica_id for front in candidates(fronts, nearby, method)) == found


def test_the_operators_calls_are_all_known() -> None:
    service = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    assert {method.name for method in service.methods} == ADMIN_METHODS


async def test_ray_gets_two_fronts_of_which_it_takes_the_less_busy() -> None:
    router = FrontRouter.__new__(FrontRouter)  # Ray's own state needs a Ray
    router.apply_locality_routing = lambda pending: set()  # type: ignore[method-assign]
    fronts: Any = [A, B, C, DRAINED]
    pending = PendingRequest(args=[], kwargs={}, metadata=type("Metadata", (), {"call_method": "Chat"})())
    seen: Counter[str] = Counter()
    for _ in range(200):
        (pair,) = await router.choose_replicas(fronts, pending)
        assert len({front.replica_id for front in pair}) == 2
        seen.update(front.replica_id for front in pair)
    assert set(seen) == {"a", "b", "c"}
    assert await router.choose_replicas([DRAINED], None) == [[DRAINED]]  # type: ignore[list-item]


def test_the_router_arrives_in_rays_processes() -> None:
    router = front_router_config().get_request_router_class()
    assert router.__name__ == "FrontRouter"
    assert issubclass(router, FrontRouter.__mro__[1])
