"""What ranks require of their hosts (device, memory for weights), computed from config.json and the settings. Used by the doctor."""

from dataclasses import replace
from pathlib import Path

from cluster.doctor.facts import Need
from engine.run.settings import RunnerConfig
from model.adapter_config import AdapterConfig
from model.adapter_names import stored_names, unties_head
from model.checkpoint_folder import small_files
from parallel.topology import Topology, TopologyAxis
from serve.config import ServeConfig
from serve.planning.errors import PlanError
from serve.planning.formats import BF16, FORMATS
from serve.planning.shape import shape_of_checkpoint
from serve.planning.weights import weights_of_rank


def host_requirements(folder: Path | None, config: ServeConfig, adapter: Path | str | None = None) -> Need:
    """``folder`` contains config.json; None: no model was given. An invalid model yields no memory requirement; it is rejected elsewhere.

    ``adapter``: location of the adapter if it can be read from here; None: there is none, or it is downloaded by the ranks' hosts.
    """
    device = "cuda" if config.resources.gpus or config.runner.device.startswith("cuda") else "cpu"
    weights = _weights(folder, config, adapter) if folder else 0
    return Need(
        device=device,
        gpus_per_rank=config.resources.gpus or 0.0,
        weights_bytes=weights,
        groups=groups_that_all_reduce(config.parallel.topology),
    )


def groups_that_all_reduce(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """The sets of several ranks that all-reduce in every layer: tensor-parallel ranks, and those that share an expert. (Without expert
    parallelism there usually are no experts.)"""
    axes: tuple[TopologyAxis, ...] = ("tp", "expert_tp") if topology.ep > 1 else ("tp",)
    groups = dict.fromkeys(topology.peers(rank, axis) for axis in axes for rank in range(topology.size))
    return tuple(group for group in groups if len(group) > 1)


def _weights(folder: Path, config: ServeConfig, adapter: Path | str | None) -> int:
    """Weight bytes of the fullest rank. A lower bound: with dtype auto a rank on a CPU may take twice as much."""
    topology = config.parallel.topology
    try:
        return _fullest_rank(folder, topology, config.runner, adapter) + _draft_weights(config.runner)
    except (PlanError, ValueError):
        return 0


def _draft_weights(runner: RunnerConfig) -> int:
    """Weight bytes of a draft model whose folder is on this host; one rank holds all of it."""
    place = runner.draft_model
    return _fullest_rank(Path(place), Topology(), runner) if place is not None and Path(place).is_dir() else 0


def _fullest_rank(folder: Path, topology: Topology, runner: RunnerConfig, adapter: Path | str | None = None) -> int:
    shape = shape_of_checkpoint(folder, name=str(folder))
    if adapter is not None and shape.tied_embeddings and _unties_head(adapter):
        shape = replace(shape, tied_embeddings=False)
    format = FORMATS[runner.quantize] if runner.quantize else shape.format
    most = max(weights_of_rank(shape, topology, topology.coordinates(rank), format).num_bytes for rank in range(topology.size))
    return most * (2 if format is BF16 and runner.dtype == "float32" else 1)


def _unties_head(adapter: Path | str) -> bool:
    """Whether the adapter makes embedding and head two matrices. False if it cannot be read: loading reports that error."""
    try:
        return unties_head(stored_names(adapter), AdapterConfig.from_folder(small_files(adapter)))
    except Exception:  # each storage library raises its own errors
        return False
