"""DeepSpeed's AutoTP on one rank: independent code that splits a transformers model by the names of its layers."""

import os
from pathlib import Path

import torch
from torch import Tensor

from parallel.groups import ParallelGroups


def logits_by_autotp(groups: ParallelGroups, folder: Path, tokens: list[int]) -> tuple[Tensor, int]:
    """Logits (T, V), and the number of parameters that this rank kept."""
    place = {"RANK": groups.rank, "WORLD_SIZE": groups.world.size, "LOCAL_RANK": groups.rank, "LOCAL_SIZE": groups.world.size}
    os.environ.update({name: str(value) for name, value in place.items()})
    import deepspeed
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    engine = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": groups.tp.size}, dtype=torch.float32, replace_with_kernel_inject=False
    )
    with torch.no_grad():
        logits: Tensor = engine.module(torch.tensor([tokens])).logits[0]
    layers = engine.module.model.layers
    return logits.float(), sum(parameter.numel() for parameter in layers.parameters())
