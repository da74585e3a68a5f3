"""peft as the reference for adapters: writes them as its users do, and computes the logits of the adapted model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from model.adapter_config import CONFIG_FILE
from model.adapter_names import ADAPTER_FILE, PREFIX, A, B
from tests.model.oracle import Oracle, make_oracle


def make_adapter(shape: str, folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Oracle:
    """A random model of ``shape`` (`tests.model.oracle.SHAPES`) in ``folder / "base"``, and a randomly trained adapter for it in ``folder /
    "adapter"``.

    ``settings`` are those of `peft.LoraConfig`. The oracle's folder is the base's, and its model the adapted one.
    """
    base = make_oracle(shape, folder / "base", dtype=dtype)
    adapted = get_peft_model(base.model, LoraConfig(**settings))
    _train(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    return Oracle(base.folder, adapted.eval())


@torch.no_grad()
def _train(model: PeftModel) -> None:
    """Change everything that training would change, enough to be noticed."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        elif "lora_" in name:
            parameter.normal_(0.0, 0.7 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter written by hand: ``tensors`` by the names of their modules, such as ``model.layers.0.mlp.up_proj.lora_A.weight``."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"} | config
    (folder / CONFIG_FILE).write_text(json.dumps(said))
    save_file({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_FILE)
    return folder


def low_rank(module: str, outputs: int, inputs: int, rank: int = 4) -> dict[str, Tensor]:
    return {f"{module}.{A}": torch.randn(rank, inputs) * inputs**-0.5, f"{module}.{B}": torch.randn(outputs, rank) * rank**-0.5}
