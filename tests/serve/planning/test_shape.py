"""Shapes are read as the model reads them, and the built-in ones are those of the releases."""

import json
from pathlib import Path

import pytest

from model.config import ModelConfig
from parallel.topology import Topology
from serve.planning.errors import PlanError
from serve.planning.formats import BF16, STORED_FP8, STORED_INT4, STORED_INT4_ZEROS, STORED_INT8
from serve.planning.memory import kv_bytes_per_token
from serve.planning.released_models import PADDED_72B, SIZES, find_shape, released_names
from serve.planning.shape import ModelShape, shape_of_config
from serve.planning.weights import weights_of_rank
from tests.model.quantise_checkpoint import AWQ, GPTQ
from tests.model.test_config import DUAL_CHUNKS
from tests.serve.planning.plan_inputs import CONFIGS, config

ALONE = Topology().coordinates(0)
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_context_tokens",
    "tied_embeddings", "qkv_bias",
)  # fmt: skip
SAME_OF_MOE = ("num_experts", "experts_per_token", "expert_intermediate_size", "shared_intermediate_size", "sparse_step", "dense_layers")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_means_the_same_to_the_planner_and_to_the_model(name: str) -> None:
    shape, config = shape_of_config(CONFIGS[name], name=name), ModelConfig.from_dict(CONFIGS[name])
    assert [getattr(shape, field) for field in SAME] == [getattr(config, field) for field in SAME]
    assert (shape.moe is None) == (config.moe is None)
    if shape.moe and config.moe:
        assert [getattr(shape.moe, field) for field in SAME_OF_MOE] == [getattr(config.moe, field) for field in SAME_OF_MOE]
        layers = range(shape.num_layers)
        assert [shape.is_sparse(layer) for layer in layers] == [config.moe.is_sparse(layer) for layer in layers]


def test_the_planner_and_the_model_cut_the_context_of_dual_chunks_alike() -> None:
    raw = CONFIGS["7B"] | DUAL_CHUNKS
    assert shape_of_config(raw, name="1M").max_context_tokens == ModelConfig.from_dict(raw).max_context_tokens == 262_144


@pytest.mark.parametrize(
    ("size", "billions", "without_embeddings", "kv_bytes"),
    [
        ("0.5B", 0.49, 0.36, 12_288),
        ("1.5B", 1.54, 1.31, 28_672),
        ("7B", 7.62, 6.53, 57_344),
        ("3B", 3.09, 2.77, 36_864),
        ("14B", 14.77, 13.21, 196_608),  # its card and 32B's are rounded down, 14.7 and 32.5
        ("32B", 32.76, 31.21, 262_144),
        ("57B-A14B", 57.41, 56.32, 57_344),
        ("72B", 72.71, 70.21, 327_680),
    ],
)
def test_the_sizes_have_the_parameters_of_their_model_cards(size: str, billions: float, without_embeddings: float, kv_bytes: int) -> None:
    shape = SIZES[size]
    held = weights_of_rank(shape, Topology(), ALONE, BF16)
    assert held.num_bytes / 2e9 == pytest.approx(billions, abs=0.006)
    vocabulary = held.head.num_bytes + held.embedding.num_bytes
    assert (held.num_bytes - vocabulary) / 2e9 == pytest.approx(without_embeddings, abs=0.006)
    assert kv_bytes_per_token(shape, Topology(), ALONE) == kv_bytes


@pytest.mark.parametrize(
    ("written", "name", "context"),
    [
        ("Qwen2-57B-A14B", "Qwen/Qwen2-57B-A14B", 131_072),
        ("Qwen2-0.5B-Instruct", "Qwen/Qwen2-0.5B-Instruct", 32_768),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct", 32_768),
        ("modelscope://Qwen/Qwen2-72B", "modelscope://Qwen/Qwen2-72B", 131_072),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", 32_768),
        ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14B", 131_072),
        ("Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B-Instruct", 32_768),
        ("Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-7B", 32_768),
        ("Qwen2.5-Math-72B-Instruct", "Qwen/Qwen2.5-Math-72B-Instruct", 4_096),
    ],
)
def test_a_release_is_found_by_its_name(written: str, name: str, context: int) -> None:
    shape = find_shape(written)
    assert (shape.name, shape.max_context_tokens) == (name, context)


@pytest.mark.parametrize(
    "name", ["Qwen2-3B", "Qwen2-Coder-7B", "Qwen2.5-57B-A14B", "Qwen2.5-Math-3B", "Qwen2.5-7B-Instruct-1M", "Qwen3-8B"]
)
def test_what_was_not_released_so_is_answered_with_what_was(name: str) -> None:
    with pytest.raises(PlanError, match=r"Qwen2\.5-Coder in 0\.5B, 1\.5B, 3B, 7B, 14B, 32B"):
        find_shape(name)


def test_every_released_name_has_a_shape() -> None:
    assert {find_shape(name).name for name in released_names()} == {f"Qwen/{name}" for name in released_names()}


def test_a_quantised_release_says_its_format() -> None:
    assert find_shape("Qwen2-7B-Instruct-GPTQ-Int8").format is STORED_INT8
    assert find_shape("Qwen2-7B-Instruct-AWQ").format is STORED_INT4_ZEROS
    for name in ("Qwen2-72B-Instruct-GPTQ-Int4", "Qwen2.5-72B-Instruct-GPTQ-Int4"):
        padded = find_shape(name)
        assert (padded.format, padded.intermediate_size) == (STORED_INT4, PADDED_72B)


@pytest.mark.parametrize(
    ("quantisation", "format"),
    [
        (GPTQ, STORED_INT4),
        (GPTQ | {"bits": 8}, STORED_INT8),
        (GPTQ | {"desc_act": True}, STORED_INT8),
        (AWQ, STORED_INT4_ZEROS),
        (AWQ | {"group_size": 64}, STORED_INT8),
        ({"quant_method": "fp8"}, STORED_FP8),
    ],
)
def test_a_checkpoint_says_its_format(quantisation: dict[str, object], format: object) -> None:
    assert shape_of_config(CONFIGS["tiny"] | {"quantization_config": quantisation}, name="x").format is format


def test_a_folder_or_its_config_json_will_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["tiny"]))
    by_folder, by_file = find_shape(str(tmp_path)), find_shape(str(tmp_path / "config.json"))
    assert by_folder == by_file
    assert by_folder.name == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": GPTQ | {"bits": 3}}, "bits 3"),
        ({"quantization_config": GPTQ | {"sym": None}}, "sym"),
        ({"quantization_config": "int4"}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": "long"}}, "factor"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "num_experts"),
        ({"dual_chunk_attention_config": 262_144}, "dual_chunk_attention_config"),
        ({"dual_chunk_attention_config": {"chunk_size": 262_144}}, "original_max_position_embeddings"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(change: dict[str, object], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        shape_of_config(CONFIGS["tiny"] | change, name="x")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": []}'])
def test_a_file_that_is_no_config_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError, match=r"config\.json"):
        find_shape(str(tmp_path))


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    for unknown in ("Qwen2-13B", "meta/Llama-3-8B", "./nowhere"):
        with pytest.raises(PlanError, match="Qwen2-57B-A14B"):
            find_shape(unknown)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no"):
        find_shape(str(tmp_path))


def test_head_width_may_differ_from_the_even_share() -> None:
    wide: ModelShape = shape_of_config(config(4, 2, 64, 50, 80, 2, head_dim=32), name="wide")
    assert wide.head_dim == 32
