"""Models with a LoRA adapter equal peft's, on one rank and split over several. What is not supported is refused with a message."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeForCausalLM

from model.adapter import Adapter
from model.adapter_config import CONFIG_FILE, IGNORED_FIELDS, READ_FIELDS, UNSUPPORTED_FIELDS, AdapterConfig, AdapterError
from model.adapter_names import ADAPTER_FILE, EMBEDDING_A, EMBEDDING_B, ROWS, A, B
from model.checkpoint import SINGLE_FILE, Checkpoint
from model.checkpoint_error import CheckpointError
from model.config import ModelConfig
from model.load import check_checkpoint
from model.quantisation import Quantisation
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.packed_format import PackedFormat
from parallel.topology import Topology
from parallel.weight_format import ReadableInto
from tests.model.adapters import low_rank, make_adapter, write_adapter
from tests.model.driver import Driver, seeded_prompts
from tests.model.oracle import Oracle, make_oracle
from tests.model.quantise_checkpoint import GPTQ
from tests.ranks import run_ranks

TOLERANCE = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
NUM_GREEDY = 8
UP = "model.layers.0.mlp.up_proj"


def answered(groups: ParallelGroups, folder: Path, adapter: Path, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    driver = Driver(folder, groups, adapter=adapter)
    return driver.whole(prompt), driver.greedy([prompt], NUM_GREEDY)[0] if groups.pp.size == 1 else []


def check(shape: str, folder: Path, topologies: tuple[Topology, ...], **settings: Any) -> None:
    oracle = make_adapter(shape, folder, **settings)
    (prompt,) = seeded_prompts(oracle.vocab_size, [11])
    wanted, tokens = oracle.logits(prompt), oracle.greedy(prompt, NUM_GREEDY)
    with oracle.model.disable_adapter():
        assert (oracle.logits(prompt) - wanted).abs().max() > 0.1, "the adapter changes nothing"
    for topology in topologies:
        logits, greedy = run_ranks(topology, answered, oracle.folder, folder / "adapter", prompt)[-1]
        torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)
        assert greedy in ([], tokens)


ALONE, SHARED, SPREAD = Topology(), Topology(tp=2), Topology(tp=2, ep=2)
STABILISED = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 2}}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = list(range(20, 96, 3))
ROUTER = "mlp.gate.weight"
NONE: dict[str, Any] = {"target_modules": []}


@pytest.mark.parametrize(
    ("shape", "topologies", "settings"),
    [
        ("9_heads", (ALONE, SHARED), {"target_modules": EVERY}),
        ("9_heads", (ALONE,), {"target_modules": EVERY} | STABILISED),
        ("9_heads", (SHARED,), {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("9_heads", (ALONE,), {"target_modules": ["q_proj"], "bias": "all"}),
        ("9_heads", (ALONE,), {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("9_heads", (SHARED,), {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("9_heads", (SHARED,), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("14_heads_tied", (SHARED,), {"target_modules": ["q_proj", "embed_tokens"]}),
        ("14_heads_tied", (ALONE,), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("14_heads_tied", (ALONE,), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("14_heads_tied", (ALONE,), {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
        ("9_heads", (SHARED,), {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
        ("14_heads_tied", (ALONE,), {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
        ("moe", (ALONE, SPREAD), {"target_modules": [*ATTENTION, "shared_expert_gate"], "target_parameters": [*EXPERTS, ROUTER]}),
        pytest.param("28_heads", (Topology(tp=3), Topology(tp=2, pp=2)), {"target_modules": EVERY}, marks=pytest.mark.slow),
        pytest.param("moe_renormalised", (Topology(tp=4, ep=2),), {"target_parameters": EXPERTS} | NONE, marks=pytest.mark.slow),
    ],
    ids=lambda given: str(given) if isinstance(given, str | dict) else " ".join(map(str, given)),
)  # fmt: skip
def test_an_adapted_model_answers_as_with_peft(
    shape: str, topologies: tuple[Topology, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    check(shape, tmp_path, topologies, r=4, lora_alpha=6, **settings)


def test_experts_that_were_adapted_one_by_one_are_those_of_the_merged_checkpoint(tmp_path: Path) -> None:
    """As transformers 4 stores them. (With transformers 5, peft 0.21 silently ignores these tensors and cannot serve as the reference.)"""
    base = make_oracle("moe", tmp_path / "base").folder
    torch.manual_seed(1)
    shapes = {"gate_proj": (13, 72), "up_proj": (13, 72), "down_proj": (72, 13)}
    modules = [f"model.layers.{layer}.mlp.experts.{expert}.{name}" for layer in (0, 2) for expert in range(6) for name in shapes]
    parts = {module: low_rank(module, *shapes[module.rsplit(".", 1)[-1]]) for module in modules}
    adapter = write_adapter(tmp_path / "adapter", {name: tensor for pair in parts.values() for name, tensor in pair.items()})
    merged = shutil.copytree(base, tmp_path / "merged")
    tensors = load_file(merged / SINGLE_FILE)
    before = Oracle.read(base, Qwen2MoeForCausalLM, torch.float32)
    for module, pair in parts.items():
        tensors[f"{module}.weight"] += 1.5 * pair[f"{module}.{B}"] @ pair[f"{module}.{A}"]
    save_file(tensors, merged / SINGLE_FILE, metadata={"format": "pt"})
    oracle = Oracle.read(merged, Qwen2MoeForCausalLM, torch.float32)
    (prompt,) = seeded_prompts(oracle.vocab_size, [11])
    wanted = oracle.logits(prompt)
    assert (before.logits(prompt) - wanted).abs().max() > 0.1
    for topology in (ALONE, SPREAD):
        logits, _ = run_ranks(topology, answered, base, adapter, prompt)[-1]
        torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Except for sums that nearly cancel, of which float32 has fewer bits."""
    assert ((found != exact.bfloat16()) & (exact.abs() > 1e-4)).sum() <= 1
    torch.testing.assert_close(found, exact.bfloat16(), atol=1e-6, rtol=2**-7)


def test_half_precision_weights_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    oracle = make_oracle("9_heads", tmp_path / "base", dtype=torch.bfloat16)
    torch.manual_seed(1)
    module = "model.layers.0.mlp.up_proj"
    parts = low_rank(module, 50, 72)
    with Checkpoint(oracle.folder) as checkpoint, Adapter(write_adapter(tmp_path / "adapter", parts)) as adapter:
        base, adapted = checkpoint.tensors[f"{module}.weight"], adapter.apply(checkpoint.tensors)[f"{module}.weight"]
        assert (adapted.name, adapted.shape, adapted.dtype, adapted.num_bytes) == (base.name, base.shape, torch.bfloat16, base.num_bytes)
        exact = base.read().double() + 1.5 * parts[f"{module}.{B}"].double() @ parts[f"{module}.{A}"].double()
        assert_rounded(adapted.read(slice(0, 50), slice(0, 72)), exact)
        assert_rounded(adapted.read(slice(7, 31), slice(5, 64)), exact[7:31, 5:64])
        into = torch.empty(10, 72, dtype=torch.bfloat16)
        assert isinstance(adapted, ReadableInto)
        adapted.read_into(into, slice(40, 50), slice(0, 72))
        assert_rounded(into, exact[40:])
        untouched = "model.layers.1.mlp.up_proj.weight"
        assert adapter.apply(checkpoint.tensors)[untouched] is checkpoint.tensors[untouched]


def test_an_adapter_of_the_bare_decoder_has_its_place_in_a_model_with_a_head(oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    write_adapter(tmp_path, low_rank(UP.removeprefix("model."), 50, 72))
    with Checkpoint(oracle("9_heads").folder) as checkpoint, Adapter(tmp_path) as adapter:
        changed = [name for name, tensor in adapter.apply(checkpoint.tensors).items() if tensor is not checkpoint.tensors[name]]
    assert changed == [f"{UP}.weight"]


def test_a_remote_adapter_is_read_by_ranges_like_a_local_one(
    oracle: Callable[[str], Oracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    write_adapter(tmp_path / "adapter", low_rank(UP, 50, 72))
    with (
        Checkpoint(oracle("9_heads").folder) as checkpoint,
        Adapter(tmp_path / "adapter") as here,
        Adapter(f"file://{tmp_path}/adapter") as there,
    ):
        ours, theirs = (adapter.apply(checkpoint.tensors)[f"{UP}.weight"] for adapter in (here, there))
        assert torch.equal(ours.read(slice(0, 50), slice(9, 72)), theirs.read(slice(0, 50), slice(9, 72)))
        assert there.bytes_fetched > 0


def rounded(groups: ParallelGroups, folder: Path, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    return Driver(folder, groups, adapter=adapter, format=PackedFormat("int8", torch.float32)).whole(prompt)


def test_the_merged_weight_is_quantised(tmp_path: Path) -> None:
    oracle = make_adapter("grouped", tmp_path, r=4, lora_alpha=6, target_modules=EVERY)
    (prompt,) = seeded_prompts(oracle.vocab_size, [11])
    wanted = oracle.logits(prompt)
    oracle.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapted = run_ranks(SHARED, rounded, oracle.folder, tmp_path / "adapter", prompt)[-1]
    merged = run_ranks(SHARED, rounded, tmp_path / "merged", None, prompt)[-1]
    assert (adapted - merged).abs().max() < 0.1 * (merged - wanted).abs().max()


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({}, {}, "holds no tensors"),
        (low_rank(UP, 50, 73), {}, rf"{UP}\.lora_A\.weight has the shape \[4, 73\], expected \[4, 72\] for {UP}\.weight"),
        (low_rank(UP, 50, 72), {"r": 8}, r"has the shape \[50, 4\], expected \[50, 8\]"),
        (low_rank(UP, 50, 72), {"base_model_name_or_path": "me/other", "r": 8}, "says that it was trained on me/other"),
        (low_rank("model.layers.7.mlp.up_proj", 50, 72), {}, "2 of its tensors do not exist there: base_model.model.model.layers.7"),
        (low_rank("model.layers.0.mlp.experts.3.up_proj", 50, 72), {}, "2 of its tensors do not exist there"),
        (low_rank("model.layers.0.mlp.experts", 50, 72), {}, "2 of its tensors do not exist there"),
        (
            {"../../etc/passwd\n.lora_A.weight": torch.ones(4, 72)},
            {},
            r"1 of its tensors does not exist there: base_model\.model\.\.\./\.\./etc/passwd\\n",
        ),
        ({f"{UP}.{A}": torch.ones(4, 72)}, {}, f"{UP} has lora_A.weight, expected lora_A.weight, lora_B.weight"),
        ({f"\x1b[2J.{A}": torch.ones(4, 72)}, {}, r"\\x1b\[2J has lora_A"),
        ({"\x1b[2J.bias": torch.ones(72)}, {}, r"though bias is none in its configuration: \\x1b\[2J\.bias"),
        ({"\x1b[2J": torch.ones(72, dtype=torch.int8)}, {}, r": base_model\.model\.\\x1b\[2J has the dtype torch\.int8"),
        (low_rank(UP, 50, 72), {"use_dora": True}, "lora_magnitude_vector"),
        ({"model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(72)}, {}, "has biases, though bias is none"),
        ({f"model.embed_tokens{ROWS}": torch.ones(1, 72)}, {"trainable_token_indices": [101]}, "a row for token 101, .* has 101 rows"),
        (low_rank(UP, 50, 72) | low_rank(UP.removeprefix("model."), 50, 72), {}, f"it changes {UP}.weight twice"),
        (low_rank("model.norm", 72, 72), {}, r"model\.norm\.weight is not a matrix"),
        (
            {f"model.norm{ROWS}": torch.ones(1, 72)},
            {"trainable_token_indices": {"norm": [3]}},
            r"model\.norm\.weight is not a matrix",
        ),
        ({f"model.layers.0.mlp.experts.{part}": torch.ones(4, 4) for part in (EMBEDDING_A, EMBEDDING_B)}, {}, "tensors do not exist"),
        ({"lm_head.weight": torch.ones(103, 72)}, {}, "the vocabulary was resized in training: merge it with PEFT"),
        ({f"{UP}.{A}": torch.ones(4, 72), f"{UP}.{B}": torch.ones(50, 4, dtype=torch.int8)}, {}, "has the dtype torch.int8"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused_by_its_header(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], reason: str, oracle: Callable[[str], Oracle], tmp_path: Path
) -> None:
    folder = oracle("9_heads").folder
    write_adapter(tmp_path, tensors, **config)
    with pytest.raises(ValueError, match=reason), Checkpoint(folder) as checkpoint, Adapter(tmp_path) as adapter:
        check_checkpoint(checkpoint, ModelConfig.from_checkpoint(folder), adapter=adapter)


def test_a_damaged_adapter_is_refused_by_its_file_and_its_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = low_rank(UP, 50, 72)
    parts[f"{UP}.{B}"][3, 1] = torch.nan
    with (
        Adapter(write_adapter(tmp_path, parts)) as adapter,
        pytest.raises(CheckpointError, match=rf"{UP}\.lora_B\.weight holds NaN"),
    ):
        adapter.check_numbers()
    whole = (tmp_path / ADAPTER_FILE).read_bytes()
    (tmp_path / ADAPTER_FILE).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated: it ends 8 bytes before"):
        Adapter(tmp_path)
    (tmp_path / ADAPTER_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors; adapter_model\.bin is a pickle"):
        Adapter(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(AdapterError, match=r"there is no adapter_config\.json"):
        Adapter(tmp_path)


def test_a_sum_that_is_not_finite_in_the_bases_dtype_is_refused_while_loading(oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    huge = {name: torch.full_like(tensor, 3e19) for name, tensor in low_rank(UP, 50, 72).items()}
    with pytest.raises(CheckpointError, match=f"{UP}.weight with its adapter is not finite"):
        Driver(oracle("9_heads").folder, single_rank_groups(), adapter=write_adapter(tmp_path, huge))


def test_a_quantised_base_is_refused_with_a_remedy(oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    folder = oracle("9_heads").folder
    config = dataclasses.replace(ModelConfig.from_checkpoint(folder), quantisation=Quantisation.from_dict(GPTQ))
    write_adapter(tmp_path, low_rank(UP, 50, 72))
    refused = pytest.raises(AdapterError, match=r"is stored by GPTQ, .* serve the adapter with the plain base, and add --quantize int8")
    with refused, Checkpoint(folder) as checkpoint, Adapter(tmp_path) as adapter:
        check_checkpoint(checkpoint, config, adapter=adapter)


PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is served; merge it with PEFT"),
        ({"r": 0}, "r is 0, expected a whole number"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"use_rslora": 1}, "use_rslora is 1, expected true or false"),
        ({"init_lora_weights": "pissa_niter_16"}, "the base's weights were changed before training"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices holds [1, 1], expected distinct token ids"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is a list"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern is '8'"),
        ({"rank_pattern": {"(a+)+b": 8}}, "too complex"),
        ({"alpha_pattern": {".*.*.*b": 8}}, "too complex"),
        ({"alpha_pattern": {"(": 8}}, "not a regular expression"),
        ({"shiny_new_thing": 3}, "'shiny_new_thing' is unknown and might change weights"),
    ],
)  # fmt: skip
def test_an_unsupported_configuration_is_refused_naming_its_field(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(reason)):
        AdapterConfig.from_dict(PLAIN | said)


def test_fields_that_do_not_affect_weights_and_empty_unknown_ones_are_accepted() -> None:
    config = AdapterConfig.from_dict(PLAIN | {"lora_dropout": 0.1, "peft_version": "9.9", "fan_in_fan_out": True, "shiny_new_thing": None})
    assert (config.rank, config.scale_of("model.layers.0.mlp.up_proj"), config.base) == (8, 2.0, None)


def test_every_field_that_peft_writes_is_known() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= IGNORED_FIELDS | READ_FIELDS | UNSUPPORTED_FIELDS.keys()


@pytest.mark.parametrize(
    ("trained_on", "served", "same"),
    [
        (None, "Qwen/Qwen2-7B", None),
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B", True),
        ("qwen/qwen2-7b", "/models/Qwen2-7B/", True),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen2-7B/snapshots/9f3e", "hf://Qwen/Qwen2-7B", True),
        ("unsloth/Qwen2-7B-bnb-4bit", "Qwen/Qwen2-7B", True),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B", False),
    ],
)
def test_another_base_is_recognised_by_the_last_part_of_its_name(trained_on: str | None, served: str, same: bool | None) -> None:
    assert AdapterConfig.from_dict(PLAIN | {"base_model_name_or_path": trained_on}).is_of(served) is same
