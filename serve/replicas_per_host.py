"""How many replicas a host's memory may have to do for: on CPUs memory for KV is taken as it is used, and what one was promised looks free
to the next."""

from collections.abc import Mapping, Sequence

from cluster.placement import most_on_a_host
from serve.config import ServeConfig


def replicas_on_a_host(own: ServeConfig, every: Sequence[ServeConfig], hosts: Sequence[Mapping[str, float]]) -> int:
    """At most, one of ``own`` among them. ``every``: all models of the application, ``own`` too; ``hosts``: Ray's resources of each."""
    meeting = [other for other in every if _may_meet(own, other)]
    num = sum(most_on_a_host(other.replicas.most_at_once, hosts, other.parallel.topology, other.resources) for other in meeting)
    return max(num, 1)


def _may_meet(own: ServeConfig, other: ServeConfig) -> bool:
    """Whether both have KV in the memory of hosts, and may be on the same."""
    kinds = {config.resources.host_resource for config in (own, other)} - {None}
    return len(kinds) < 2 and not any(config.resources.gpus or config.runner.device.startswith("cuda") for config in (own, other))
