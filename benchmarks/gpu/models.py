"""Models with random weights in the shape of released ones, created in memory: nothing is read from or written to disk."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.run.local_executor import LocalExecutor
from engine.run.runner import Runner
from engine.run.sampling.sampler import Sampler
from engine.run.settings import QuantizeName, RunnerConfig
from engine.run.start import make_runner
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.formats import choose_formats
from model.load import load_model
from model.qwen2 import Qwen2
from model.qwen2_moe import Qwen2Moe
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.weight_format import Dense

COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return COMMON | dict(zip(names, (hidden, layers, heads, kv_heads, inner), strict=True))


def _experts(count: int, chosen: int, inner: int, shared: int) -> dict[str, Any]:
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    return EXPERTS | dict(zip(names, (count, chosen, inner, shared), strict=True))


SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": _sizes(896, 24, 14, 2, 4864) | {"tie_word_embeddings": True, "vocab_size": 151936},
    "7B": _sizes(3584, 28, 28, 4, 18944),
    "57B-A14B": _sizes(3584, 28, 28, 4, 18944) | {"vocab_size": 151936} | _experts(64, 8, 2560, 20480),
    "72B": _sizes(8192, 80, 64, 8, 29568),
    "small": _sizes(2048, 2, 16, 2, 2816) | {"vocab_size": 8192},
    "small-moe": _sizes(2048, 2, 16, 2, 2816) | {"vocab_size": 8192} | _experts(16, 4, 512, 1024),
    "tiny": _sizes(64, 2, 4, 2, 96) | {"vocab_size": 512},
    "tiny-moe": _sizes(64, 2, 4, 2, 96) | {"vocab_size": 512} | _experts(4, 2, 32, 48),
}


@dataclass(frozen=True)
class RandomTensor:
    """A random tensor with the interface of `parallel.weight_format.StoredTensor`."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    piece_dim: int = 0
    piece_bytes: int = 2**25

    @property
    def num_bytes(self) -> int:
        return 2 * torch.Size(self.shape).numel()

    def read(self, *slices: slice) -> Tensor:
        sizes = [len(range(*some.indices(size))) for some, size in zip(slices, self.shape, strict=False)]
        part = torch.empty([*sizes, *self.shape[len(sizes) :]], dtype=self.dtype, device=self.device)
        return part.fill_(1.0) if self.name.endswith("norm.weight") else part.normal_(0, 0.02)


class RandomCheckpoint:
    """The part of `model.checkpoint.Checkpoint`'s interface that loading uses."""

    concurrent_reads, bytes_fetched, num_bytes, location = 1, 0, 0, "random weights"

    def __init__(self, config: ModelConfig, device: torch.device, tensor: type[RandomTensor] = RandomTensor) -> None:
        kind = Qwen2 if config.moe is None else Qwen2Moe
        whole = kind(
            config, single_rank_groups(), device=torch.device("cpu"), dtype=torch.bfloat16, format=Dense(torch.bfloat16),
            backend="reference", dispatch="local", block_tokens=1,
        )  # fmt: skip
        self.tensors = {binding.name: tensor(binding.name, binding.slot.shape, device) for binding in whole.bindings()}


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    found = SHAPES[shape]
    return found if layers is None else found | {"num_hidden_layers": layers}


def random_model(
    shape: str,
    device: torch.device,
    *,
    quantize: QuantizeName | None = None,
    layers: int | None = None,
    checkpoint: RandomCheckpoint | None = None,
    groups: ParallelGroups | None = None,
) -> Qwen2:
    """A model with random weights. ``checkpoint``: shared weights; None: its own weights. ``groups``: for one rank's part of the model."""
    config = ModelConfig.from_dict(config_of(shape, layers))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    formats = choose_formats(device, dtype, [torch.bfloat16], quantize)
    weights = cast(Checkpoint, checkpoint or RandomCheckpoint(config, device))
    model, _ = load_model(
        weights, config, groups or single_rank_groups(), device=device, dtype=dtype, block_tokens=16,
        format=formats.matrices, table_format=formats.table,
    )  # fmt: skip
    return model


class ServedModel:
    """A model with an engine in this process."""

    def __init__(
        self,
        model: Qwen2,
        *,
        max_running: int = 256,
        cuda_graphs: bool = True,
        kv_cache_bytes: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """``settings``: more of `RunnerConfig`."""
        self.model = model
        most = 8192 if model.device.type == "cuda" else 256
        self.config = EngineConfig(max_running=max_running, max_step_tokens=most, prefix_cache=False)
        runner_config = RunnerConfig(device=str(model.device), cuda_graphs=cuda_graphs, kv_cache_bytes=kv_cache_bytes, **settings or {})
        self.sampler = Sampler(vocab_size=model.config.vocab_size, device=model.device)
        self.runner: Runner = make_runner(model, self.sampler, runner_config=runner_config, engine_config=self.config)
        self.engine = Engine(LocalExecutor(self.runner), self.config)
