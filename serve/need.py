"""What the ranks are going to want of their hosts, from config.json and the settings: for the doctor."""

from pathlib import Path

from cluster.doctor.facts import Need
from parallel.topology import Topology
from serve.config import ServeConfig
from serve.planning.errors import PlanError
from serve.planning.formats import BF16
from serve.planning.shape import shape_of_checkpoint
from serve.planning.weights import weights_of_rank


def need_of(folder: Path | None, config: ServeConfig) -> Need:
    """``folder`` holds config.json; None: no model was named. A model that cannot be planned is refused elsewhere."""
    device = "cuda" if config.resources.gpus or config.runner.device.startswith("cuda") else "cpu"
    return Need(device=device, gpus_per_rank=config.resources.gpus, weights_bytes=_weights(folder, config) if folder else 0)


def _weights(folder: Path, config: ServeConfig) -> int:
    """Of the fullest rank, at least: a dtype that a rank chooses by itself may take twice as much on a CPU."""
    topology = config.parallel.topology
    try:
        shape = shape_of_checkpoint(folder, name=str(folder))
        ranks = (weights_of_rank(shape, topology, topology.coordinates(rank), BF16) for rank in range(topology.size))
        most = max(rank.num_bytes for rank in ranks) + _draft_weights(config.runner.draft_model)
        return most * (2 if config.runner.dtype == "float32" else 1)
    except (PlanError, ValueError):
        return 0


def _draft_weights(place: str | None) -> int:
    """Of a draft model whose folder is here; one rank holds it whole."""
    if place is None or not Path(place).is_dir():
        return 0
    return weights_of_rank(shape_of_checkpoint(Path(place), name=place), Topology(), Topology().coordinates(0), BF16).num_bytes
