"""Loads a model from any location in a rank's process. Does not import transformers, which takes seconds."""

from pathlib import Path

import psutil
import torch

from model.checkpoint import Checkpoint
from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.load import LoadReport, load_model
from model.qwen2 import Qwen2
from parallel.groups import ParallelGroups

CPU = torch.device("cpu")


def load_from(groups: ParallelGroups, place: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Qwen2, LoadReport]:
    with Checkpoint(place) as checkpoint:
        config = ModelConfig.from_checkpoint(small_files(place))
        return load_model(checkpoint, config, groups, device=CPU, dtype=dtype, block_tokens=4)


def fingerprint(groups: ParallelGroups, place: Path | str) -> tuple[LoadReport, float]:
    """The report of loading, and a number that depends on every weight of this rank."""
    model, report = load_from(groups, place)
    return report, sum(float(tensor.double().abs().sum()) for tensor in _weights(model))


def peak_beyond_weights(groups: ParallelGroups, place: Path | str) -> tuple[int, int]:
    """Bytes of this rank's weights, and how far loading raised the process's peak resident memory (VmHWM) beyond them."""
    before = psutil.Process().memory_info().rss
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the peak, see proc(5)
    model, _ = load_from(groups, place, torch.bfloat16)
    weights = sum(tensor.nbytes for tensor in _weights(model))
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return weights, peak - before - weights


def _weights(model: Qwen2) -> list[torch.Tensor]:
    """Each weight once; tied weights are found twice."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for value in [*vars(module).values(), *getattr(module, "tensors", {}).values()]:
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value
    return list(found.values())
