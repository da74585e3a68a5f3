"""Checkpoints with random weights in the shape of released models, written once: speed does not depend on the weights' values."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DENSE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
"""Qwen2-0.5B."""
MOE = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 2048,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
}
SHAPES = {"dense": DENSE, "moe": MOE}


def checkpoint(shape: str, folder: Path) -> Path:
    """The checkpoint of ``shape`` in ``folder``, written if it does not exist."""
    place = folder / f"{shape}-random-bf16"
    if not (place / "config.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        config = SHAPES[shape]
        save_file(_weights(config), place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config, indent=2))
    return place


def _weights(config: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator).mul_(0.02).bfloat16()

    def mlp(prefix: str, inner: int) -> dict[str, torch.Tensor]:
        sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        return {f"{prefix}.{name}.weight": matrix(*size) for name, size in sizes.items()}

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], width), "model.norm.weight": torch.ones(width).bfloat16()}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, outputs in (("q", width), ("k", kv), ("v", kv)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = matrix(outputs, width)
            weights[f"{at}.self_attn.{name}_proj.bias"] = matrix(outputs, 1).flatten()
        weights[f"{at}.self_attn.o_proj.weight"] = matrix(width, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = torch.ones(width).bfloat16()
        if "num_experts" not in config:
            weights |= mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        weights[f"{at}.mlp.gate.weight"] = matrix(config["num_experts"], width)
        weights[f"{at}.mlp.shared_expert_gate.weight"] = matrix(1, width)
        weights |= mlp(f"{at}.mlp.shared_expert", config["shared_expert_intermediate_size"])
        for expert in range(config["num_experts"]):
            weights |= mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
    return weights
