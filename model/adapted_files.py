"""The small files of a model with an adapter: the base's, with the tokenizer that the adapter was trained with where it brings one."""

import fnmatch
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint_folder import SMALL_FILES, cache_folder
from model.config import read_json_object

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def adapted_files(base: Path, adapter: Path | None) -> Path:
    """A folder with the base's configuration, and with tokenizer and chat template of the adapter where it has them: trainers store them
    beside it. The base's own folder where it has neither.

    An adapter without a chat template has the base's. Where its tokenizer ends texts by another token than the base does, as when a base
    model learned to chat, that token ends answers too.

    Raises:
        InvalidModelConfig: a file of either is damaged.
    """
    if adapter is None or not any((adapter / name).is_file() for name in (TOKENIZER, TEMPLATE)):
        return base
    texts = _texts(base, adapter)
    replaced = TEXT_FILES if TOKENIZER in texts else ()
    return _kept({name: content for name, content in _files(base).items() if name not in replaced} | texts)


def _texts(base: Path, adapter: Path) -> dict[str, bytes]:
    if not (adapter / TOKENIZER).is_file():
        return {TEMPLATE: (adapter / TEMPLATE).read_bytes()}
    own = {name: (adapter / name).read_bytes() for name in TEXT_FILES if (adapter / name).is_file()}
    settings, of_base = _object(adapter / TOKENIZER_CONFIG), _object(base / TOKENIZER_CONFIG)
    if TEMPLATE not in own and not settings.get("chat_template"):
        settings = (settings or of_base) | {"chat_template": of_base.get("chat_template")}
        own[TOKENIZER_CONFIG] = _json(settings)
        if (base / TEMPLATE).is_file():
            own[TEMPLATE] = (base / TEMPLATE).read_bytes()
    return own | _ends(base, _end_of(settings, _object(adapter / TOKENIZER)))


def _ends(base: Path, end: int | None) -> dict[str, bytes]:
    """generation_config.json with ``end`` among the ids that end an answer; nothing where it is."""
    generation = _object(base / GENERATION)
    said = generation.get("eos_token_id")
    said = _object(base / "config.json").get("eos_token_id") if said is None else said
    ends = said if isinstance(said, list) else [] if said is None else [said]
    return {} if end is None or end in ends else {GENERATION: _json(generation | {"eos_token_id": [*ends, end]})}


def _end_of(settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    named = settings.get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return next((token["id"] for token in tokens if token.get("content") == text and type(token.get("id")) is int), None)


def _files(base: Path) -> dict[str, bytes]:
    names = [path.name for path in base.iterdir() if path.is_file() and any(fnmatch.fnmatch(path.name, each) for each in SMALL_FILES)]
    return {name: (base / name).read_bytes() for name in names}


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def _kept(files: Mapping[str, bytes]) -> Path:
    """A folder of the cache that holds just these; the same for the same."""
    state = hashlib.sha256()
    for name in sorted(files):
        state.update(f"{name} {len(files[name])}\n".encode() + files[name])
    folder = cache_folder() / "adapted" / state.hexdigest()[:24]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, content in files.items():
            (made / name).write_bytes(content)
        made.chmod(0o755)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # another rank may have been faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
