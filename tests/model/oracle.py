"""transformers as the oracle of the model: writes checkpoints, and says what logits and tokens they give."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

# Nothing divides by the numbers of ranks: heads, inner widths, vocabulary, experts.
SHAPES: dict[str, dict[str, Any]] = {
    "9_heads": dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=50, vocab_size=101),
    "14_heads_tied": dict(
        num_attention_heads=14, num_key_value_heads=2, hidden_size=56, intermediate_size=45, vocab_size=97, tie_word_embeddings=True
    ),
    "28_heads": dict(num_attention_heads=28, num_key_value_heads=4, hidden_size=112, intermediate_size=67, vocab_size=130),
    "moe": dict(
        num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=50, vocab_size=101, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=13, shared_expert_intermediate_size=21, norm_topk_prob=False, mlp_only_layers=[1],
    ),
    "moe_renormalised": dict(
        num_attention_heads=4, num_key_value_heads=4, hidden_size=32, intermediate_size=30, vocab_size=64, num_experts=7,
        num_experts_per_tok=3, moe_intermediate_size=9, shared_expert_intermediate_size=18, norm_topk_prob=True, decoder_sparse_step=2,
    ),
    "yarn": dict(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=50, vocab_size=80, max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32
        },
    ),
    # The widths of the released sizes; layers and vocabulary cut short.
    "0.5B": dict(
        num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2, hidden_size=896, intermediate_size=4864, vocab_size=1000,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "1.5B": dict(
        num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=2, hidden_size=1536, intermediate_size=8960, vocab_size=1000,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "7B": dict(
        num_hidden_layers=1, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584, intermediate_size=18944, vocab_size=1000,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """A checkpoint folder and the transformers model that wrote it (float32, eager attention)."""

    folder: Path
    model: PreTrainedModel

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(len(tokens), vocab_size)"""
        logits: Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return logits.float()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Computed anew for every token: no cache that could be wrong."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[-num_tokens:]


def make_oracle(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **save: Any) -> Oracle:
    """Random weights of a shape in `SHAPES`, saved by transformers; ``save`` goes to `save_pretrained`."""
    settings = {"num_hidden_layers": 3, "tie_word_embeddings": False, **SHAPES[name]}
    torch.manual_seed(0)
    if "num_experts" in settings:
        model: PreTrainedModel = Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**settings))
    model.set_attn_implementation("eager")
    _randomise(model)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **save)
    return Oracle(folder, model)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Outputs of size one in every layer, and biases and norms that matter (transformers begins with zeros and ones)."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
