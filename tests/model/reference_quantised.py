"""Writes reference_quantised.safetensors: small matrices as AutoGPTQ and AutoAWQ store them, and what their own code decodes them to.

    pip download --no-deps auto_gptq==0.7.1; pip download --no-deps --no-binary :all: autoawq==0.2.9; unpack both
    python -m tests.model.reference_quantised AUTO_GPTQ_FOLDER AUTOAWQ_FOLDER

Single files of them are loaded, as the packages themselves want libraries and devices that are not here.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WRITTEN = Path(__file__).with_suffix(".safetensors")
INPUTS, OUTPUTS, GROUP = 32, 32, 16
GROUPS = INPUTS // GROUP


def main(auto_gptq: Path, auto_awq: Path) -> None:
    gptq = _module("gptq_linear", auto_gptq / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = ModuleType(name)
        package.__path__ = [str(auto_awq / name.replace(".", "/"))]
        sys.modules[name] = package
    of_device: Any = ModuleType("awq.utils.utils")  # would import accelerate
    of_device.get_best_device = lambda: "cpu"
    sys.modules[of_device.__name__] = of_device
    awq = _module("awq_linear", auto_awq / "awq/modules/linear/gemm.py")
    random = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for name, bits, symmetric, in_order in (("gptq4", 4, True, True), ("gptq4_act_order", 4, False, False), ("gptq8", 8, True, True)):
        groups_K = torch.arange(INPUTS) // GROUP
        groups_K = groups_K if in_order else groups_K[torch.randperm(INPUTS, generator=random)]
        tensors |= {f"{name}.{part}": tensor for part, tensor in _by_gptq(gptq, bits, symmetric, groups_K.int(), random).items()}
    tensors |= {f"awq4.{part}": tensor for part, tensor in _by_awq(awq, random).items()}
    save_file(tensors, WRITTEN)
    print(f"{WRITTEN}: {WRITTEN.stat().st_size} bytes")


def _by_gptq(module: Any, bits: int, symmetric: bool, groups_K: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    linear, scales_NG, zeros_NG = _linear(bits, random)
    if symmetric:
        zeros_NG = torch.full_like(zeros_NG, 2 ** (bits - 1))
    quantised = module.QuantLinear(bits, GROUP, INPUTS, OUTPUTS, bias=False, weight_dtype=torch.float32)
    linear.weight.data = (_numbers(bits, random) - zeros_NG[:, groups_K.long()]) * scales_NG[:, groups_K.long()]
    quantised.pack(linear, scales_NG.clone(), zeros_NG.clone(), groups_K)
    return {
        "qweight": quantised.qweight,
        "qzeros": quantised.qzeros,
        "scales": quantised.scales.half(),
        "g_idx": quantised.g_idx,
        "decoded": quantised(torch.eye(INPUTS)).T.contiguous(),
    }


def _by_awq(module: Any, random: torch.Generator) -> dict[str, Tensor]:
    linear, scales_NG, zeros_NG = _linear(4, random)
    groups_K = torch.arange(INPUTS) // GROUP
    linear.weight.data = (_numbers(4, random) - zeros_NG[:, groups_K]) * scales_NG[:, groups_K]
    quantised = module.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales_NG.T.contiguous(), zeros=zeros_NG.T.contiguous())
    decoded_KN = module.dequantize_gemm(quantised.qweight, quantised.qzeros, quantised.scales.float(), 4, GROUP)
    return {
        "qweight": quantised.qweight,
        "qzeros": quantised.qzeros,
        "scales": quantised.scales,
        "decoded": decoded_KN.T.contiguous(),
    }


def _linear(bits: int, random: torch.Generator) -> tuple[nn.Linear, Tensor, Tensor]:
    """An empty layer, scales that float16 represents, and zeros other than 0, which AutoGPTQ cannot store."""
    scales_NG = (torch.rand(OUTPUTS, GROUPS, generator=random) * 0.02 + 0.001).half().float()
    return nn.Linear(INPUTS, OUTPUTS, bias=False), scales_NG, torch.randint(1, 2**bits, (OUTPUTS, GROUPS), generator=random).float()


def _numbers(bits: int, random: torch.Generator) -> Tensor:
    return torch.randint(0, 2**bits, (OUTPUTS, INPUTS), generator=random).float()


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
