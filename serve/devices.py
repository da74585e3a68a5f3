"""What ranks compute on where nobody says it: a GPU each where the Ray that serves has any, else CPUs."""

from collections.abc import Sequence
from dataclasses import replace

from serve.config import ServeConfig
from serve.model_source import DEMO


class DeviceMisfit(ValueError):
    """The ranks cannot have the devices that they are to have, or these do not compute what is asked for."""


def with_devices(configs: Sequence[ServeConfig], num_gpus: float) -> list[ServeConfig]:
    """The settings of the models of one server, with ``resources.gpus`` decided where it was open, and ``runner.device`` with it.

    ``num_gpus``: of the Ray that serves, in use or not. The demo model computes on CPUs unless ``runner.device`` says otherwise.

    Raises:
        DeviceMisfit: the ranks want more GPUs than there are (they are not put on CPUs instead, where a large model would take minutes
            for what its GPUs do in a second), or a CPU is to compute in fp8.
    """
    undecided = [config for config in configs if config.resources.gpus is None and _wants_gpus(config)]
    wanted = sum(_ranks(config) * (1 if config in undecided else config.resources.gpus or 0) for config in configs)
    if undecided and 0 < num_gpus < wanted:
        raise DeviceMisfit(
            f"with a GPU for each rank the server wants {wanted:g} GPUs, and there {'are' if num_gpus > 1 else 'is'} {num_gpus:g}: "
            "use fewer ranks (--tensor-parallel, --replicas), or compute on the CPU (--set runner.device=cpu)"
        )
    decided = [_decided(config, on_gpu=num_gpus > 0 and config in undecided) for config in configs]
    for config in decided:
        _check_fp8(config)
    return decided


def _wants_gpus(config: ServeConfig) -> bool:
    """``cuda:<index>`` names a GPU by itself, and Ray must not choose another."""
    return config.runner.device == "cuda" or (config.runner.device == "auto" and config.model.source != DEMO)


def _ranks(config: ServeConfig) -> int:
    return config.parallel.topology.size * config.replicas.most


def _decided(config: ServeConfig, *, on_gpu: bool) -> ServeConfig:
    """A rank to which Ray gives no GPU sees all of them, and every one would take the first."""
    if config.resources.gpus is not None:
        return config
    device = "cpu" if config.runner.device == "auto" and not on_gpu else config.runner.device
    resources, runner = replace(config.resources, gpus=1.0 if on_gpu else 0.0), replace(config.runner, device=device)
    return config.model_copy(update={"resources": resources, "runner": runner})


def _check_fp8(config: ServeConfig) -> None:
    """The ranks would say so too, with a traceback, when they have been started."""
    if config.runner.device != "cpu":
        return
    if config.runner.quantize == "fp8":
        raise DeviceMisfit("CPUs do not multiply fp8: use --quantize int8 or int4, or GPUs")
    if config.runner.kv_dtype == "fp8":
        raise DeviceMisfit("CPUs do not hold keys and values in fp8: leave out --kv-dtype, or use GPUs")
