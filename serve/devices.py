"""Choose the device of ranks where the settings leave it open: a GPU each if the eligible hosts have any, else CPUs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve.config import ServeConfig
from serve.model_source import DEMO

logger = logging.getLogger(__name__)

GPU_ON_DEMAND_HINT = "--set resources.gpus=1"
"""For clusters whose GPU hosts are only added on demand."""


class DeviceError(ValueError):
    """The ranks cannot get the requested devices, or the devices do not support what is requested."""


def assign_devices(configs: Sequence[ServeConfig], hosts: Sequence[Mapping[str, float]]) -> list[ServeConfig]:
    """The settings of a server's models with ``resources.gpus`` and ``runner.device`` decided where they were open.

    ``hosts``: Ray's total resources of each host. The demo model runs on CPUs unless ``runner.device`` says otherwise.

    Raises:
        DeviceError: the ranks need more GPUs than there are (they are not moved to CPUs instead: a large model would take minutes
            for what GPUs do in a second), or fp8 is requested on CPUs.
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
    """Whether Ray is to assign GPUs. ``cuda:<index>`` names a GPU itself, so Ray must not choose another."""
    return config.runner.device == "cuda" or (config.runner.device == "auto" and config.model.source != DEMO)


def _check_room(configs: Sequence[ServeConfig], num_gpus: float) -> None:
    """Check that there are GPUs for the minimum number of replicas; for more replicas, hosts may be added later."""
    wanted = sum(_gpus_of_a_rank(config) * config.parallel.topology.size * max(config.replicas.least, 1) for config in configs)
    if wanted > num_gpus:
        needed, verb = f"{wanted:g} GPU{'' if wanted == 1 else 's'}", "is" if num_gpus == 1 else "are"
        raise DeviceError(
            f"with a GPU for each rank the server needs {needed}, and there {verb} {num_gpus:g}: "
            "use fewer ranks (--tensor-parallel, --replicas), compute on the CPU (--set runner.device=cpu), or, if GPU hosts are added on "
            f"demand, {GPU_ON_DEMAND_HINT}"
        )


def _gpus_of_a_rank(config: ServeConfig) -> float:
    return float(_wants_gpus(config)) if config.resources.gpus is None else config.resources.gpus


def _say_that_there_are_none(config: ServeConfig) -> None:
    if config.runner.device == "cuda":
        raise DeviceError(f"runner.device is cuda, but no host has a GPU; if GPU hosts are added on demand, {GPU_ON_DEMAND_HINT}")
    logger.warning("no host has a GPU: %s runs on CPUs (if GPU hosts are added on demand: %s)", config.model.source, GPU_ON_DEMAND_HINT)


def _decided(config: ServeConfig, *, on_gpu: bool) -> ServeConfig:
    """With no GPU from Ray, "auto" becomes "cpu": such a rank sees all GPUs, and every rank would take the first."""
    gpus = config.resources.gpus if config.resources.gpus is not None else float(on_gpu)
    device = "cpu" if config.runner.device == "auto" and not gpus else config.runner.device
    resources, runner = replace(config.resources, gpus=gpus), replace(config.runner, device=device)
    return config.model_copy(update={"resources": resources, "runner": runner})


def _check_fp8(config: ServeConfig) -> None:
    """Reject fp8 on CPUs now; the ranks would fail with a traceback after they have started."""
    if config.runner.device != "cpu":
        return
    if config.runner.quantize == "fp8":
        raise DeviceError("CPUs do not support fp8: use --quantize int8 or int4, or GPUs")
    if config.runner.kv_dtype == "fp8":
        raise DeviceError("CPUs do not support an fp8 KV cache: leave out --kv-dtype, or use GPUs")
