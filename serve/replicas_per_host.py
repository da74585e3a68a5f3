"""How many replicas may have to share the memory of one host.

On CPUs, memory for the KV cache is allocated as it is used, so what one replica has reserved looks free to the next.
"""

from collections.abc import Mapping, Sequence

from cluster.placement import most_on_a_host
from serve.config import ServeConfig


def max_replicas_per_host(own: ServeConfig, every: Sequence[ServeConfig], hosts: Sequence[Mapping[str, float]]) -> int:
    """The most replicas on one host, at least one of them of ``own``.

    ``every``: all models of the application, including ``own``. ``hosts``: Ray's resources of each host.
    """
    sharing = [other for other in every if _may_share_host(own, other)]
    num = sum(most_on_a_host(other.replicas.most_at_once, hosts, other.parallel.topology, other.resources) for other in sharing)
    return max(num, 1)


def _may_share_host(own: ServeConfig, other: ServeConfig) -> bool:
    """Whether both keep their KV cache in host memory and may run on the same host."""
    kinds = {config.resources.host_resource for config in (own, other)} - {None}
    return len(kinds) < 2 and not any(config.resources.gpus or config.runner.device.startswith("cuda") for config in (own, other))
