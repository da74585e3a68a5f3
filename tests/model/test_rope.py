"""Rotary embedding against transformers, with and without YaRN."""

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from model.config import ModelConfig, RopeConfig, YarnConfig
from model.rope import Rope

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 2, 31, 32, 4095, 32767, 131071])


def settings(**rope: object) -> Qwen2Config:
    shape = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768}
    return Qwen2Config(**shape, rope_parameters={"rope_theta": 1e6, **rope}, architectures=["Qwen2ForCausalLM"], dtype="float32")


STRETCHED = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
ROPES = {
    "plain": {"rope_type": "default"},
    "yarn 4": STRETCHED | {"factor": 4.0},
    "yarn 2 with its own betas": STRETCHED | {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with its own attention factor": STRETCHED | {"factor": 8.0, "attention_factor": 1.5},
    "yarn from a short context": {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": 4.0},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_are_rotated_as_by_transformers(rope: dict[str, object], dtype: torch.dtype) -> None:
    theirs = settings(**rope)
    ours = ModelConfig.from_dict(theirs.to_dict())
    x_TXK = torch.randn(len(POSITIONS), 4, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = Qwen2RotaryEmbedding(theirs)(x_TXK, POSITIONS.unsqueeze(0))
    heads = x_TXK.transpose(0, 1).unsqueeze(0)
    wanted, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    found = Rope(ours.rope, ours.head_dim, CPU).rotation(POSITIONS, dtype).apply(x_TXK)
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)


def test_a_product_of_two_rotated_vectors_depends_only_on_their_distance() -> None:
    rope = Rope(RopeConfig(theta=10_000.0, yarn=None), 64, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 64, generator=generator), torch.randn(1, 1, 64, generator=generator)

    def product(at_q: int, at_k: int) -> float:
        turn = [rope.rotation(torch.tensor([position]), torch.float32) for position in (at_q, at_k)]
        return float((turn[0].apply(q) * turn[1].apply(k)).sum())

    assert product(5, 3) == pytest.approx(product(105, 103), abs=1e-4)
    assert product(5, 3) != pytest.approx(product(5, 4), abs=1e-2)


def test_a_factor_of_one_changes_nothing() -> None:
    yarn = YarnConfig(factor=1.0, original_max_tokens=64, attention_factor=None, beta_fast=32.0, beta_slow=1.0)
    plain, stretched = (Rope(RopeConfig(theta=10_000.0, yarn=each), 64, CPU) for each in (None, yarn))
    torch.testing.assert_close(stretched.frequency_F, plain.frequency_F)
    assert stretched.scale == 1.0
