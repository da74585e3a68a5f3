"""transformers as the reference for the model: writes checkpoints, and computes their logits and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM


def _shape(heads: int, kv_heads: int, hidden: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        **more,
    }


def _experts(count: int, per_token: int, inner: int, shared_inner: int, **more: Any) -> dict[str, Any]:
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared_inner,
        **more,
    }


def _yarn(factor: float, original: int) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": factor, "original_max_position_embeddings": original}


LONG_ROPE = {"rope_type": "default", "rope_theta": 1e6}

SHAPES: dict[str, dict[str, Any]] = {
    # Sizes that the numbers of ranks do not divide: heads, inner widths, vocabulary, experts.
    "9_heads": _shape(9, 3, 72, 50, 101),
    "14_heads_tied": _shape(14, 2, 56, 45, 97, tie_word_embeddings=True),
    "28_heads": _shape(28, 4, 112, 67, 130),
    "moe": _shape(9, 3, 72, 50, 101, mlp_only_layers=[1], **_experts(6, 2, 13, 21, norm_topk_prob=False)),
    "moe_renormalised": _shape(4, 4, 32, 30, 64, decoder_sparse_step=2, **_experts(7, 3, 9, 18, norm_topk_prob=True)),
    "yarn": _shape(4, 2, 64, 50, 80, max_position_embeddings=128, rope_parameters=_yarn(4.0, 32)),
    # Groups of 32 divide evenly over two and three ranks.
    "grouped": _shape(12, 4, 192, 192, 101),
    "grouped_moe": _shape(4, 2, 128, 128, 101, **_experts(4, 2, 64, 64, norm_topk_prob=False)),
    # The widths of the released sizes, with fewer layers and a smaller vocabulary.
    "0.5B": _shape(14, 2, 896, 4864, 1000, num_hidden_layers=2, tie_word_embeddings=True, rope_parameters=LONG_ROPE),
    "1.5B": _shape(12, 2, 1536, 8960, 1000, num_hidden_layers=1, tie_word_embeddings=True, rope_parameters=LONG_ROPE),
    "3B": _shape(16, 2, 2048, 11008, 1000, num_hidden_layers=1, tie_word_embeddings=True, rope_parameters=LONG_ROPE),
    "7B": _shape(28, 4, 3584, 18944, 1000, num_hidden_layers=1, rope_parameters=LONG_ROPE),
    "14B": _shape(40, 8, 5120, 13824, 1000, num_hidden_layers=1, rope_parameters=LONG_ROPE),
    "32B": _shape(40, 8, 5120, 27648, 1000, num_hidden_layers=1, rope_parameters=LONG_ROPE),
    "57B-A14B": _shape(
        28, 4, 3584, 18944, 1000, num_hidden_layers=1, rope_parameters=LONG_ROPE, **_experts(64, 8, 2560, 20480, norm_topk_prob=False)
    ),
    "72B": _shape(64, 8, 8192, 29568, 1000, num_hidden_layers=1, rope_parameters=LONG_ROPE),
}


@dataclass(frozen=True, eq=False)
class Oracle:
    """A checkpoint folder and the transformers model that wrote it (float32, eager attention)."""

    folder: Path
    model: PreTrainedModel

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @classmethod
    def read(cls, folder: Path, kind: type[PreTrainedModel], dtype: torch.dtype) -> "Oracle":
        """Read from the files: `PreTrainedModel.to` would round the rotary frequencies too."""
        model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
        return cls(folder, model.eval())

    def truth(self) -> "Oracle":
        """The same weights computed in float32."""
        return self.read(self.folder, type(self.model), torch.float32)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(len(tokens), vocab_size)"""
        logits: Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return logits.float()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Recomputed for every token: no KV cache that could be wrong."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[-num_tokens:]


def make_oracle(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **save: Any) -> Oracle:
    """Random weights of a shape in `SHAPES`, saved by transformers; ``save`` goes to `save_pretrained`."""
    settings = SHAPES[name]
    torch.manual_seed(0)
    if "num_experts" in settings:
        model: PreTrainedModel = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))
        model.set_experts_implementation("eager")  # the grouped one needs widths that are multiples of 16 bytes
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**settings))
    model.set_attn_implementation("eager")
    _randomise(model)
    model.eval().to(dtype).save_pretrained(folder, **save)
    return Oracle(folder, model) if dtype == torch.float32 else Oracle.read(folder, type(model), dtype)


def write_half(settings: dict[str, Any], folder: Path) -> type[PreTrainedModel]:
    """Random weights in bfloat16, like the releases, and never in memory at more than that. Read them with `Oracle.read`."""
    kind = Qwen2MoeForCausalLM if "num_experts" in settings else Qwen2ForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = kind(kind.config_class(**settings)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    _randomise(model)
    model.save_pretrained(folder)
    return kind


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Outputs of magnitude one in every layer, and biases and norms that matter (transformers initialises them to zeros and ones)."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
