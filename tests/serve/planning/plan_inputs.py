"""Questions to plan, and small config.json files: real widths cut short, and some where nothing divides by anything."""

import dataclasses

from serve.planning.formats import BF16, Format
from serve.planning.hardware import Fleet, network, parse_gpus
from serve.planning.memory import Workload
from serve.planning.plan import PlanInputs
from serve.planning.released_models import find_shape
from serve.planning.shape import ModelShape

WORKLOAD = Workload(context_tokens=4096, concurrency=16, step_tokens=2048)


def ask(model: str | ModelShape, gpus: str, *, hosts: int = 1, format: Format = BF16, **work: int) -> PlanInputs:
    count, gpu = parse_gpus(gpus)
    return PlanInputs(
        shape=find_shape(model) if isinstance(model, str) else model,
        fleet=Fleet(gpu=gpu, gpus_per_host=count, hosts=hosts, network=network(100)),
        format=format,
        workload=dataclasses.replace(WORKLOAD, **work),
    )


def config(heads: int, kv_heads: int, hidden: int, inner: int, vocab: int, layers: int, **more: object) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


def moe(experts: int, per_token: int, inner: int, shared: int, **more: object) -> dict[str, object]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        **more,
    }


CONFIGS = {
    "0.5B": config(14, 2, 896, 4864, 1000, 2, tie_word_embeddings=True),
    "1.5B": config(12, 2, 1536, 8960, 1000, 1, tie_word_embeddings=True),
    "7B": config(28, 4, 3584, 18944, 500, 1),
    "tiny": config(9, 3, 72, 50, 101, 3),
    "tiny_moe": config(9, 3, 72, 50, 101, 3, **moe(6, 2, 13, 21, mlp_only_layers=[1])),
    "every_other_layer": config(4, 4, 32, 30, 64, 3, **moe(7, 3, 9, 18) | {"decoder_sparse_step": 2}),
    "yarn": config(
        4, 2, 64, 50, 80, 2, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, qkv_bias=False
    ),
}
