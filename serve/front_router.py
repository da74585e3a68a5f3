"""How Ray Serve's proxies choose a front: near ones first, and none that drains while another takes requests.

Ray Serve knows nothing of `DrainGate`, so by default its proxies give a draining front its share, which it refuses although another front
would take it. Here each front reports that it drains in its routing statistics, which Ray Serve's controller reads every
`ROUTING_STATS_PERIOD_S` and gives to all proxies.

Ray Serve copies this module into its processes by value, so it imports nothing of ours.
"""

import random
from collections.abc import Sequence, Set
from typing import Any, Protocol, TypeVar

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import LocalityMixin, PendingRequest, RequestRouter, RunningReplica

DRAINING = "draining"
"""Key in a front's routing statistics."""
ROUTING_STATS_PERIOD_S = 0.5
"""How often the controller asks each front whether it drains. Ray Serve's default, 10 s, is longer than many drains."""
PROXIES_LEARN_S = 2.0
"""The time until all proxies know that a front drains: the period above, a turn of the controller's loop (0.1 s) and two calls of Ray, with
room for a busy machine. If it takes longer, as while the controller restarts, the front refuses what it still gets."""
ADMIN_METHODS = frozenset({"Abort", "Drain", "GetLoad", "GetServerInfo"})
"""Methods of `manta.v1.AdminService`. They reach draining fronts too, which otherwise could not be told to accept requests again."""


class Front(Protocol):
    """What is asked of a front here. `RunningReplica` is one."""

    @property
    def replica_id(self) -> Any: ...
    @property
    def routing_stats(self) -> dict[str, Any]: ...


F = TypeVar("F", bound=Front)


def candidates(fronts: Sequence[F], nearby: Set[Any], method: str) -> Sequence[F]:
    """The fronts to choose from.

    ``fronts``: all. ``nearby``: ids of the preferred ones, such as those on the proxy's host. ``method``: what is called: a gRPC method, or
    ``__call__`` for HTTP.

    Those that do not drain, the nearby ones among them if there are any. If all drain (the server is being stopped), any: then the client
    should get our refusal at once instead of waiting for a front.
    """
    taking = fronts if method in ADMIN_METHODS else [front for front in fronts if not front.routing_stats.get(DRAINING)] or fronts
    return [front for front in taking if front.replica_id in nearby] or taking


class FrontRouter(LocalityMixin, RequestRouter):
    """Ray Serve's default, the less busy one of two random fronts, among `candidates`.

    Not first in, first out (Ray's ``FIFOMixin``): that gives the front chosen for one call to the call that waits longest.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        method = "" if pending_request is None else pending_request.metadata.call_method
        found = candidates(candidate_replicas, self.apply_locality_routing(pending_request), method)
        return [random.sample(found, min(2, len(found)))]


def front_router_config() -> RequestRouterConfig:
    """How the fronts' deployment is routed."""
    options: dict[str, Any] = {"request_router_class": FrontRouter, "request_routing_stats_period_s": ROUTING_STATS_PERIOD_S}
    return RequestRouterConfig(**options)
