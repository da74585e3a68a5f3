"""What the ranks are going to want of their hosts, from config.json and the settings: for the doctor."""

from pathlib import Path

from cluster.doctor.facts import Need
from engine.run.settings import RunnerConfig
from parallel.topology import Topology
from serve.config import ServeConfig
from serve.planning.errors import PlanError
from serve.planning.formats import BF16, FORMATS
from serve.planning.shape import shape_of_checkpoint
from serve.planning.weights import weights_of_rank


def need_of(folder: Path | None, config: ServeConfig) -> Need:
    """``folder`` holds config.json; None: no model was named. A model that cannot be planned is refused elsewhere."""
    device = "cuda" if config.resources.gpus or config.runner.device.startswith("cuda") else "cpu"
    return Need(device=device, gpus_per_rank=config.resources.gpus or 0.0, weights_bytes=_weights(folder, config) if folder else 0)


def _weights(folder: Path, config: ServeConfig) -> int:
    """Of the fullest rank, at least: a dtype that a rank chooses by itself may take twice as much on a CPU."""
    topology = config.parallel.topology
    try:
        return _fullest_rank(folder, topology, config.runner) + _draft_weights(config.runner)
    except (PlanError, ValueError):
        return 0


def _draft_weights(runner: RunnerConfig) -> int:
    """Of a draft model whose folder is here; one rank holds it whole."""
    place = runner.draft_model
    return _fullest_rank(Path(place), Topology(), runner) if place is not None and Path(place).is_dir() else 0


def _fullest_rank(folder: Path, topology: Topology, runner: RunnerConfig) -> int:
    shape = shape_of_checkpoint(folder, name=str(folder))
    format = FORMATS[runner.quantize] if runner.quantize else shape.format
    most = max(weights_of_rank(shape, topology, topology.coordinates(rank), format).num_bytes for rank in range(topology.size))
    return most * (2 if format is BF16 and runner.dtype == "float32" else 1)
