"""config.json and generation_config.json: every field is read by name, and none is guessed."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model.config import ContextTooLong, InvalidModelConfig, ModelConfig, UnsupportedModel
from model.generation_config import GenerationDefaults
from tests.model.quantise_checkpoint import AWQ, GPTQ

QWEN2_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_57B = QWEN2_7B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 2560,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "shared_expert_intermediate_size": 20480,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def test_the_released_7b_is_read_field_by_field() -> None:
    config = ModelConfig.from_dict(QWEN2_7B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (28, 4, 128)
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size) == (3584, 18944, 28, 152064)
    assert config.dtype == "bfloat16"
    assert config.max_context_tokens == 32768
    assert config.qkv_bias
    assert not config.tied_embeddings
    assert config.moe is None
    assert config.eos_token_ids == (151645,)


def test_the_released_57b_has_experts_in_every_layer() -> None:
    moe = ModelConfig.from_dict(QWEN2_57B).moe
    assert moe is not None
    assert (moe.num_experts, moe.experts_per_token, moe.expert_intermediate_size, moe.shared_intermediate_size) == (64, 8, 2560, 20480)
    assert not moe.renormalise
    assert all(moe.is_sparse(layer) for layer in range(28))


def test_sparse_layers_follow_the_step_and_the_exceptions() -> None:
    moe = ModelConfig.from_dict(QWEN2_57B | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None
    assert [layer for layer in range(8) if moe.is_sparse(layer)] == [1, 5, 7]


@pytest.mark.parametrize("scaling", [None, YARN])
def test_both_spellings_of_rope_mean_the_same(scaling: dict[str, Any] | None) -> None:
    old = QWEN2_7B | {"rope_scaling": scaling}
    new = {key: value for key, value in QWEN2_7B.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 1000000.0, "rope_type": "default"} | (scaling or {})
    if scaling:
        new["rope_parameters"] |= {"rope_type": new["rope_parameters"].pop("type")}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)


def test_yarn_reaches_as_far_as_its_factor() -> None:
    assert ModelConfig.from_dict(QWEN2_7B | {"rope_scaling": YARN}).max_context_tokens == 131072


def test_a_context_limit_can_be_lowered_and_not_raised() -> None:
    config = ModelConfig.from_dict(QWEN2_7B)
    assert (config.context_limit(None), config.context_limit(100), config.context_limit(32768)) == (32768, 100, 32768)
    with pytest.raises(ContextTooLong, match="32769 is more than the 32768 tokens that this model supports"):
        config.context_limit(32769)
    assert ModelConfig.from_dict(QWEN2_7B | {"rope_scaling": YARN}).context_limit(32769) == 32769


DUAL_CHUNKS = {
    "max_position_embeddings": 1_010_000,
    "dual_chunk_attention_config": {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144},
}
"""As in Qwen2.5-7B-Instruct-1M."""


def test_the_context_is_limited_where_dual_chunk_attention_begins() -> None:
    config = ModelConfig.from_dict(QWEN2_7B | DUAL_CHUNKS)
    assert (config.max_context_tokens, config.dual_chunk_tokens) == (262_144, 1_010_000)
    with pytest.raises(
        ContextTooLong, match=r"262144 tokens that this model supports \(of 1010000: beyond them it needs dual chunk attention"
    ):
        config.context_limit(262_145)
    short = ModelConfig.from_dict(QWEN2_7B | DUAL_CHUNKS | {"max_position_embeddings": 131_072})
    assert (short.max_context_tokens, short.dual_chunk_tokens) == (131_072, None)
    stretched = ModelConfig.from_dict(QWEN2_7B | DUAL_CHUNKS | {"rope_scaling": YARN | {"original_max_position_embeddings": 262_144}})
    assert (stretched.max_context_tokens, stretched.dual_chunk_tokens) == (1_048_576, None)
    assert ModelConfig.from_dict(QWEN2_7B).dual_chunk_tokens is None


def test_both_spellings_of_the_dtype_mean_the_same() -> None:
    new = {key: value for key, value in QWEN2_7B.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(QWEN2_7B)


def test_a_head_width_of_its_own_is_taken() -> None:
    assert ModelConfig.from_dict(QWEN2_7B | {"head_dim": 64}).head_dim == 64


REQUIRED = sorted(
    set(QWEN2_7B) - {"bos_token_id", "eos_token_id", "max_window_layers", "model_type", "sliding_window", "use_sliding_window"}
)
REQUIRED_OF_MOE = sorted(set(QWEN2_57B) - set(QWEN2_7B))


@pytest.mark.parametrize(
    ("whole", "field"), [(QWEN2_7B, name) for name in REQUIRED] + [(QWEN2_57B, name) for name in REQUIRED_OF_MOE], ids=lambda v: str(v)[:30]
)
def test_a_missing_field_is_named_not_guessed(whole: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidModelConfig, match=field):
        ModelConfig.from_dict({key: value for key, value in whole.items() if key != field})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size": "3584"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_attention_heads": 27}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 7}, "even width"),
        ({"eos_token_id": ["<|im_end|>"]}, "eos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"dual_chunk_attention_config": 262_144}, "dual_chunk_attention_config"),
        ({"dual_chunk_attention_config": {"chunk_size": 262_144}}, "original_max_position_embeddings"),
        ({"quantization_config": "int4"}, "quantization_config"),
        ({"quantization_config": {}}, "quantization_config: quant_method is missing"),
        ({"quantization_config": GPTQ | {"bits": "4"}}, "bits is '4'"),
        ({"quantization_config": GPTQ | {"bits": True}}, "bits is True"),
        ({"quantization_config": GPTQ | {"group_size": 0}}, "group_size is 0"),
        ({"quantization_config": GPTQ | {"group_size": None}}, "group_size is missing"),
        ({"quantization_config": GPTQ | {"sym": 1}}, "sym is 1"),
        ({"quantization_config": GPTQ | {"desc_act": None}}, "desc_act is missing"),
        ({"quantization_config": AWQ | {"version": 4}}, "version is 4"),
    ],
)
def test_an_invalid_field_is_named(change: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidModelConfig, match=what):
        ModelConfig.from_dict(QWEN2_7B | change)


@pytest.mark.parametrize("field", [None, *GPTQ, *AWQ, "checkpoint_format", "dynamic", "pack_dtype"])
def test_whatever_a_quantization_config_holds_the_error_is_one_of_two(field: str | None) -> None:
    for whole in (GPTQ, AWQ):
        for junk in (None, "x", -1, 0, 10**30, 1.5, float("nan"), True, [], ["x"], {}, {"x": 1}):
            said = junk if field is None else whole | {field: junk}
            with suppress(InvalidModelConfig, UnsupportedModel):
                ModelConfig.from_dict(QWEN2_7B | {"quantization_config": said})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "mscale"),
        ({"quantization_config": GPTQ | {"quant_method": "bitsandbytes"}}, "quantization_config: quant_method 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "quant_method 'fp8'"),
        ({"quantization_config": GPTQ | {"bits": 3}}, "bits 3"),
        ({"quantization_config": AWQ | {"bits": 8}}, "bits 8 with quant_method 'awq'"),
        ({"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}, "checkpoint_format 'marlin'"),
        ({"quantization_config": GPTQ | {"is_marlin_format": True}}, "is_marlin_format"),
        ({"quantization_config": GPTQ | {"dynamic": {"-:.*down.*": {}}}}, "dynamic"),
        ({"quantization_config": GPTQ | {"pack_dtype": "int64"}}, "pack_dtype 'int64'"),
        ({"quantization_config": AWQ | {"version": "gemv"}}, "version 'gemv'"),
        ({"quantization_config": AWQ | {"zero_point": False}}, "zero_point"),
    ],
)
def test_an_unsupported_model_is_refused_by_name(change: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModel, match=what):
        ModelConfig.from_dict(QWEN2_7B | change)


@pytest.mark.parametrize(
    "field",
    sorted(
        QWEN2_57B
        | {"rope_scaling": 0, "rope_parameters": 0, "layer_types": 0, "mlp_only_layers": 0, "head_dim": 0, "dual_chunk_attention_config": 0}
    ),
)
def test_whatever_a_field_holds_the_error_is_one_of_two(field: str) -> None:
    for junk in (
        None,
        "x",
        -1,
        0,
        10**30,
        1.5,
        float("inf"),
        float("nan"),
        True,
        [],
        [1],
        ["x"],
        {},
        {"type": "yarn"},
        {"rope_theta": []},
        [[]],
    ):
        with suppress(InvalidModelConfig, UnsupportedModel):
            ModelConfig.from_dict(QWEN2_57B | {field: junk})


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "what"), [(None, "there is no config.json"), ("{", "not JSON"), ("[]", "a list"), ("{}", "architectures")]
)
def test_an_error_names_the_file(content: str | None, what: str, tmp_path: Path) -> None:
    folder = tmp_path if content is None else write(tmp_path, config=content)
    with pytest.raises(InvalidModelConfig, match=what) as caught:
        ModelConfig.from_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)


def defaults(folder: Path, **files: Any) -> GenerationDefaults:
    return GenerationDefaults.from_checkpoint(write(folder, **files), ModelConfig.from_dict(QWEN2_7B))


def test_the_authors_recommendations_are_read(tmp_path: Path) -> None:
    released = {
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    assert defaults(tmp_path, generation_config=released) == GenerationDefaults(
        eos_token_ids=(151645, 151643), temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )


def test_without_the_file_only_the_end_of_sequence_is_known(tmp_path: Path) -> None:
    assert defaults(tmp_path) == GenerationDefaults(eos_token_ids=(151645,))


def test_an_end_of_sequence_may_be_one_id_or_be_left_to_config_json(tmp_path: Path) -> None:
    assert defaults(tmp_path, generation_config={"eos_token_id": 2}).eos_token_ids == (2,)
    assert defaults(tmp_path, generation_config={}).eos_token_ids == (151645,)


def test_do_sample_false_means_greedy_and_its_absence_means_nothing(tmp_path: Path) -> None:
    assert defaults(tmp_path, generation_config={"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert defaults(tmp_path, generation_config={}).temperature is None


@pytest.mark.parametrize("field", [{"top_p": 1.5}, {"temperature": "hot"}, {"eos_token_id": -1}, {"top_k": -3}])
def test_an_invalid_recommendation_is_named(field: dict[str, Any], tmp_path: Path) -> None:
    (name,) = field
    with pytest.raises(InvalidModelConfig, match=name):
        defaults(tmp_path, generation_config=field)
