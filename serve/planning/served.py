"""What `manta serve` takes today. The one place in planning that knows: where a limit falls, its line here falls with it."""

from dataclasses import dataclass

from parallel.topology import Topology
from serve.planning.formats import BF16, Format


@dataclass(frozen=True)
class Limit:
    """Something that can be planned and not yet be served."""

    code: str
    sentence: str


DATA = Limit("data", "data parallelism inside a replica is planned only: its ranks do not yet run sequences of their own")
PIPELINE = Limit("pipeline", "pipeline stages run one step at a time today: they hold what is said here, and are slower than their floor")
HOSTS = Limit("hosts", "several hosts are planned only: `manta serve` starts a Ray of its own on one host")
QUANTISED = Limit("quantised", "quantised weights are planned only: `manta serve` loads bfloat16, float16 and float32")


def limits_today(topology: Topology, format: Format, *, hosts: int) -> tuple[Limit, ...]:
    """Why `manta serve` does not take this layout today; none if it does. ``hosts``: over which replicas are spread."""
    limits = (
        (DATA, topology.dp > 1),
        (HOSTS, hosts > 1),
        (QUANTISED, format is not BF16),
    )
    return tuple(limit for limit, applies in limits if applies)


def cautions(topology: Topology) -> tuple[Limit, ...]:
    """What is served today, but not as fast as a floor assumes."""
    return (PIPELINE,) if topology.pp > 1 else ()
