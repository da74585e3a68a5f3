"""The bytes that each id of a checkpoint's vocabulary stands for, read from tokenizer.json without a tokenizer."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import InvalidModelConfig, read_json_object

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Tokens that tokenizer_config.json names. They are control tokens, whatever tokenizer.json says."""


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's table, which has a printable character for each byte of a byte-level vocabulary.

    Bytes that are printable in Latin-1 stand for themselves; the other 68 are moved to U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(moved)}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids 0 to ``len(tokens) - 1``."""

    tokens: tuple[bytes, ...]
    """Empty for an id that means nothing."""
    special_ids: frozenset[int]
    """Control tokens, which are never part of a text."""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "Vocabulary | None":
        """None without a tokenizer.json, or if its vocabulary is not byte-level.

        Raises:
            InvalidModelConfig: the file is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return _from_definition(read_json_object(path), _named(folder))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidModelConfig(f"{path}: the vocabulary cannot be read ({type(error).__name__}: {error})") from error


def _from_definition(definition: dict[str, Any], named: frozenset[str]) -> Vocabulary | None:
    added = {int(token["id"]): token for token in definition.get("added_tokens") or ()}
    stored = definition["model"]["vocab"]
    if not isinstance(stored, dict) or (definition.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    table = byte_of_character()
    tokens = [b""] * (max([*stored.values(), *added]) + 1)
    for text, token in stored.items():
        try:
            tokens[token] = bytes(map(table.__getitem__, text))
        except KeyError:  # a text that is not byte-encoded
            tokens[token] = text.encode()
    for token, entry in added.items():
        tokens[token] = entry["content"].encode()
    special = {token for token, entry in added.items() if entry.get("special") or entry["content"] in named}
    special |= {stored[text] for text in named if text in stored}
    return Vocabulary(tokens=tuple(tokens), special_ids=frozenset(special))


def _named(folder: Path) -> frozenset[str]:
    path = folder / "tokenizer_config.json"
    settings = read_json_object(path) if path.exists() else {}
    texts = (value.get("content") if isinstance(value, dict) else value for value in map(settings.get, NAMED))
    return frozenset(text for text in texts if isinstance(text, str))
