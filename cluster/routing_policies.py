"""Which policy a router is given by its settings."""

from cluster.config import RouterConfig
from cluster.expected_wait import ExpectedWait
from cluster.router import LeastLoaded, RoundRobin, RoutingPolicy
from engine.config import EngineConfig
from parallel.topology import Topology


def make_routing_policy(config: RouterConfig, engine_config: EngineConfig, topology: Topology) -> RoutingPolicy:
    """``topology``: of every replica, whose shards each take part in a step."""
    match config.policy:
        case "least_loaded":
            return LeastLoaded()
        case "round_robin":
            return RoundRobin()
        case "expected_wait":
            return ExpectedWait(
                block_tokens=engine_config.block_tokens,
                step_tokens=engine_config.max_step_tokens * topology.dp,
                session_worth_s=config.session_worth_s,
            )
