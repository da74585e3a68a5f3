"""Small random Qwen2 checkpoints, written by transformers, and transformers' answers."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from engine.config import EngineConfig
from engine.plan import TokenLogprobs
from engine.run.settings import RunnerConfig

VOCAB_SIZE = 300
NUM_REAL_TOKENS = 290
NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 2, 16, 2
FLOAT32_BLOCK_BYTES = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 4

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # large enough that a random model's logits distinguish tokens
}


def write_dense(folder: Path, **changes: int) -> Path:
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE | changes)).save_pretrained(folder)
    return folder


def write_moe(folder: Path, **changes: int) -> Path:
    torch.manual_seed(2)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE | moe | changes)).save_pretrained(folder)
    return folder


def float32_config(*, num_blocks: int, block_tokens: int, **more: object) -> RunnerConfig:
    """A rank on the CPU with so many blocks."""
    kv_cache_bytes = num_blocks * block_tokens * FLOAT32_BLOCK_BYTES
    return RunnerConfig(
        device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=kv_cache_bytes, num_real_tokens=NUM_REAL_TOKENS, **more
    )


def engine_config(**changes: object) -> EngineConfig:
    return EngineConfig(**{"block_tokens": 4, "max_step_tokens": 64, "max_running": 16} | changes)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The tokens that transformers generates, without padding rows of the vocabulary."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        suppress_tokens=list(range(NUM_REAL_TOKENS, VOCAB_SIZE)),
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def oracle_logprobs(model: torch.nn.Module, prompt: tuple[int, ...]) -> torch.Tensor:
    """(T - 1, V): transformers' log-probabilities at every position after the first, without padding rows of the vocabulary."""
    logits_TV = model(torch.tensor([prompt])).logits[0, :-1, :NUM_REAL_TOKENS]
    return logits_TV.double().log_softmax(-1)


def assert_scored_as(oracle_TV: torch.Tensor, prompt: tuple[int, ...], told: tuple[TokenLogprobs, ...], *, num_top: int = 2) -> None:
    """Check the tokens' log-probabilities and the most probable alternatives to within 1e-4."""
    assert len(told) == len(prompt) - 1
    for expected_V, token, one in zip(oracle_TV, prompt[1:], told, strict=True):
        assert abs(one.logprob - expected_V[token].item()) < 1e-4
        values, ids = expected_V.topk(num_top)
        assert [token for token, _ in one.top] == ids.tolist()
        assert torch.allclose(torch.tensor([value for _, value in one.top], dtype=torch.float64), values, atol=1e-4)
