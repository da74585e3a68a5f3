"""Stores a checkpoint quantised, rounding to nearest, and its decoded weights as another checkpoint. Does not import transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import write_checkpoint

GPTQ: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
GPTQ_INT8 = GPTQ | {"bits": 8, "group_size": -1}
AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": -1, "modules_to_not_convert": None, "version": "gemm", "zero_point": True,
}  # fmt: skip
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def store_quantised(source: Path, stored: Path, plain: Path, config: Mapping[str, Any]) -> None:
    """``config``: its `quantization_config`.

    Quantises the matrices whose names end in _proj. For these AutoGPTQ stores biases that the model does not have.
    """
    raw = json.loads((source / "config.json").read_text())
    quantised: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not name.endswith("_proj.weight"):
                quantised[name] = decoded[name] = tensor
                continue
            module = name.removesuffix(".weight")
            parts, decoded[name] = quantise(tensor.float(), config)
            quantised |= {f"{module}.{part}": value for part, value in parts.items()}
            if config["quant_method"] == "gptq" and f"{module}.bias" not in quantised:
                quantised[f"{module}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "safetensors" not in file.name:
            for folder in (stored, plain):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file.name).write_bytes(file.read_bytes())
    own = {name for name in decoded if name.endswith(".bias")}
    write_checkpoint(
        stored,
        {n: t for n, t in quantised.items() if n not in own} | {n: decoded[n] for n in own},
        raw | {"quantization_config": dict(config)},
    )
    write_checkpoint(plain, decoded, raw)


def quantise(weight_NK: Tensor, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """The stored parts of one matrix, and the weights that they represent in float32."""
    is_gptq, bits = config["quant_method"] == "gptq", config["bits"]
    size, num_inputs = config["group_size"], weight_NK.shape[1]
    groups_K = torch.arange(num_inputs) // (num_inputs if size == -1 else size)
    if config.get("desc_act"):
        groups_K = groups_K[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(3))]
    numbers_KN, scales_GN, zeros_GN = _rounded(weight_NK.T, groups_K, bits, symmetric=config.get("sym", False))
    decoded_KN = (numbers_KN - zeros_GN[groups_K]).float() * scales_GN[groups_K].float()
    order = list(range(32 // bits)) if is_gptq else AWQ_ORDER
    parts = {
        "qweight": _packed(numbers_KN.T, bits, order).T.contiguous() if is_gptq else _packed(numbers_KN, bits, order),
        "qzeros": _packed(zeros_GN, bits, order),
        "scales": scales_GN,
    }
    if is_gptq:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        parts["qzeros"] -= 0 if config.get("checkpoint_format") == "gptq_v2" else ones
        parts["g_idx"] = groups_K.int()
    return parts, decoded_KN.T.contiguous()


def _rounded(weight_KN: Tensor, groups_K: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers and zeros in int64, scales in float16."""
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    numbers_KN = torch.empty(weight_KN.shape, dtype=torch.int64)
    scales, zeros = [], []
    for group in range(int(groups_K.max()) + 1):
        weights = weight_KN[groups_K == group]
        low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
        low, high = (-torch.maximum(-low, high), torch.maximum(-low, high)) if symmetric else (low, high)
        scale = ((high - low) / most).clamp(min=1e-4).half()
        zero = torch.full(low.shape, middle) if symmetric else (-low / scale.float()).round().long().clamp(0, most)
        numbers_KN[groups_K == group] = ((weights / scale.float()).round().long() + zero).clamp(0, most)
        scales.append(scale)
        zeros.append(zero)
    return numbers_KN, torch.stack(scales), torch.stack(zeros)


def _packed(numbers: Tensor, bits: int, order: list[int]) -> Tensor:
    """int32 (..., C / p) of int64 (..., C): of every p numbers the one at ``order[i]`` goes to the i-th lowest bits."""
    of_word = numbers.unflatten(-1, (-1, len(order)))
    words = sum(of_word[..., place] << (bits * i) for i, place in enumerate(order))
    assert isinstance(words, Tensor)
    return words.to(torch.int32)  # wraps around: the highest number includes the sign bit
