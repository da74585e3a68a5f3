"""What ranks compute on where nobody says it: a GPU each where the hosts that may take them have any, else CPUs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve.config import ServeConfig
from serve.model_source import DEMO

logger = logging.getLogger(__name__)

GPU_ON_DEMAND_HINT = "--set resources.gpus=1"
"""For hosts that come only when they are asked for."""


class DeviceError(ValueError):
    """The ranks cannot have the devices that they are to have, or these do not compute what is asked for."""


def assign_devices(configs: Sequence[ServeConfig], hosts: Sequence[Mapping[str, float]]) -> list[ServeConfig]:
    """The settings of the models of one server, with ``resources.gpus`` decided where it was open, and ``runner.device`` with it.

    ``hosts``: Ray's resources of each host that serves, in use or not. The demo model computes on CPUs unless ``runner.device`` says
    otherwise.

    Raises:
        DeviceError: the ranks want more GPUs than there are (they are not put on CPUs instead, where a large model would take minutes
            for what its GPUs do in a second), or a CPU is to compute in fp8.
    """
    decided = []
    for config in configs:
        kind = config.resources.host_resource
        num_gpus = sum(host.get("GPU", 0) for host in hosts if kind is None or kind in host)
        is_open = config.resources.gpus is None and _wants_gpus(config)
        if is_open and num_gpus:
            _check_room([each for each in configs if each.resources.host_resource == kind], num_gpus)
        elif is_open:
            _say_that_there_are_none(config)
        decided.append(_decided(config, on_gpu=is_open and num_gpus > 0))
    for config in decided:
        _check_fp8(config)
    return decided


def _wants_gpus(config: ServeConfig) -> bool:
    """``cuda:<index>`` names a GPU by itself, and Ray must not choose another."""
    return config.runner.device == "cuda" or (config.runner.device == "auto" and config.model.source != DEMO)


def _check_room(configs: Sequence[ServeConfig], num_gpus: float) -> None:
    """For as many replicas as there always are: for more, hosts may come."""
    wanted = sum(_gpus_of_a_rank(config) * config.parallel.topology.size * max(config.replicas.least, 1) for config in configs)
    if wanted > num_gpus:
        raise DeviceError(
            f"with a GPU for each rank the server wants {wanted:g} GPUs, and there {'are' if num_gpus > 1 else 'is'} {num_gpus:g}: "
            "use fewer ranks (--tensor-parallel, --replicas), compute on the CPU (--set runner.device=cpu), or, where hosts come when they "
            f"are asked for, {GPU_ON_DEMAND_HINT}"
        )


def _gpus_of_a_rank(config: ServeConfig) -> float:
    return float(_wants_gpus(config)) if config.resources.gpus is None else config.resources.gpus


def _say_that_there_are_none(config: ServeConfig) -> None:
    if config.runner.device == "cuda":
        raise DeviceError(f"runner.device is cuda, and no host has a GPU; where they come when they are asked for, {GPU_ON_DEMAND_HINT}")
    logger.warning(
        "no host has a GPU: %s is computed on CPUs (where hosts come when they are asked for: %s)", config.model.source, GPU_ON_DEMAND_HINT
    )


def _decided(config: ServeConfig, *, on_gpu: bool) -> ServeConfig:
    """A rank to which Ray gives no GPU sees all of them, and every one would take the first."""
    gpus = config.resources.gpus if config.resources.gpus is not None else float(on_gpu)
    device = "cpu" if config.runner.device == "auto" and not gpus else config.runner.device
    resources, runner = replace(config.resources, gpus=gpus), replace(config.runner, device=device)
    return config.model_copy(update={"resources": resources, "runner": runner})


def _check_fp8(config: ServeConfig) -> None:
    """The ranks would say so too, with a traceback, when they have been started."""
    if config.runner.device != "cpu":
        return
    if config.runner.quantize == "fp8":
        raise DeviceError("CPUs do not multiply fp8: use --quantize int8 or int4, or GPUs")
    if config.runner.kv_dtype == "fp8":
        raise DeviceError("CPUs do not hold keys and values in fp8: leave out --kv-dtype, or use GPUs")
