"""The small files of a model with an adapter: the base's, with the adapter's tokenizer, chat template and end of sequence where it has
them."""

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.adapter_config import AdapterError
from model.checkpoint_folder import MODULE_FOLDERS, SMALL_FILES, create_atomically
from model.config import read_json_object
from parallel.user_cache import cache_folder

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
ADDED, VOCABULARY = "added_tokens.json", "vocab.json"
"""Files of a slow tokenizer that map token texts to ids."""
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "special_tokens_map.json", ADDED, VOCABULARY, "merges.txt")


def files_with_adapter(base: Path, adapter: Path | None) -> Path:
    """A folder with the base's configuration, and the adapter's tokenizer and chat template, which trainers store beside it.

    Returns the base's own folder if the adapter has neither.

    An adapter without a chat template uses the base's. If its tokenizer ends texts with another token than the base does, as when a base
    model was trained to chat, that token also ends answers. A slow tokenizer (without tokenizer.json) must be equal to the base's; then
    only its template and its end of sequence are used.

    Raises:
        InvalidModelConfig: a file of either is damaged.
        AdapterError: the adapter has another tokenizer than the base, and no tokenizer.json for it.
    """
    if adapter is None or not any((adapter / name).is_file() for name in TEXT_FILES):
        return base
    replaced: tuple[str, ...] = ()
    if (adapter / TOKENIZER).is_file():
        replaced, texts = TEXT_FILES, _with_own_tokenizer(base, adapter)
    else:
        texts = _with_tokenizer_of_base(base, adapter)
    if not texts:
        return base
    kept = {name: content for name, content in _files(base).items() if name not in replaced}
    return _kept({name: content for name, content in (kept | texts).items() if content is not None})


def _with_own_tokenizer(base: Path, adapter: Path) -> dict[str, bytes | None]:
    own: dict[str, bytes | None] = {name: (adapter / name).read_bytes() for name in TEXT_FILES if (adapter / name).is_file()}
    settings, of_base = _object(adapter / TOKENIZER_CONFIG), _object(base / TOKENIZER_CONFIG)
    if TEMPLATE not in own and not settings.get("chat_template"):
        settings = (settings or of_base) | {"chat_template": of_base.get("chat_template")}
        own[TOKENIZER_CONFIG] = _json(settings)
        if (base / TEMPLATE).is_file():
            own[TEMPLATE] = (base / TEMPLATE).read_bytes()
    return own | _ends(base, _end_of(settings, _object(adapter / TOKENIZER)))


def _with_tokenizer_of_base(base: Path, adapter: Path) -> dict[str, bytes | None]:
    """The adapter's template and end of sequence, for the base's tokenizer. None: a file of the base that must be left out."""
    settings, of_base = _object(adapter / TOKENIZER_CONFIG), _object(base / TOKENIZER_CONFIG)
    _refuse_other_tokens(base, adapter, settings)
    own: dict[str, bytes | None] = {}
    if (adapter / TEMPLATE).is_file():
        own[TEMPLATE] = (adapter / TEMPLATE).read_bytes()
    elif settings.get("chat_template") and (base / TEMPLATE).is_file():  # otherwise it would take precedence over the adapter's template
        own[TEMPLATE] = None
    taken = {name: settings[name] for name in ("chat_template", "eos_token") if settings.get(name)}
    if any(of_base.get(name) != value for name, value in taken.items()):
        own[TOKENIZER_CONFIG] = _json(of_base | taken)
    return own | _ends(base, _end_of(settings, _object(base / TOKENIZER)))


def _refuse_other_tokens(base: Path, adapter: Path, settings: Mapping[str, Any]) -> None:
    """Raise if a slow tokenizer, or the tokens that its configuration adds, has tokens that the base lacks or numbers differently."""
    decoder = settings.get("added_tokens_decoder")
    listed = [(number, token) for number, token in (decoder if isinstance(decoder, dict) else {}).items() if isinstance(token, dict)]
    of_decoder = [(token.get("content"), int(number) if number.isdecimal() else number) for number, token in listed]
    wanted = [*of_decoder, *_object(adapter / ADDED).items(), *_object(adapter / VOCABULARY).items()]
    end = _end_text(settings)
    if not wanted and end is None:
        return
    known = _ids(read_json_object(base / TOKENIZER))
    others = (text for text, number in wanted if not isinstance(text, str) or known.get(text) != number)
    other = next(others, end if end is not None and end not in known else None)
    if other is not None:
        raise AdapterError(
            f"the adapter {adapter} has its own tokenizer, whose token {other!r:.80} is missing or has another id in the base's, but no "
            f"{TOKENIZER}; save it as a fast one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text, from the content of tokenizer.json."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return (dict(vocabulary) if isinstance(vocabulary, dict) else {}) | {token["content"]: token["id"] for token in _added(tokenizer)}


def _ends(base: Path, end: int | None) -> dict[str, bytes]:
    """generation_config.json with ``end`` added to the ids that end an answer; nothing if it is there already."""
    generation = _object(base / GENERATION)
    said = generation.get("eos_token_id")
    said = _object(base / "config.json").get("eos_token_id") if said is None else said
    ends = said if isinstance(said, list) else [] if said is None else [said]
    return {} if end is None or end in ends else {GENERATION: _json(generation | {"eos_token_id": [*ends, end]})}


def _end_of(settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    text = _end_text(settings)
    return next((token["id"] for token in _added(tokenizer) if token["content"] == text), None)


def _end_text(settings: Mapping[str, Any]) -> str | None:
    named = settings.get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else None


def _added(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json that have a text and an id."""
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [token for token in tokens if isinstance(token.get("content"), str) and type(token.get("id")) is int]


def _files(base: Path) -> dict[str, bytes]:
    """The small files, including those in sentence-transformers' subfolders, by names such as ``1_Pooling/config.json``."""
    folders = [base, *(path for path in base.iterdir() if path.is_dir() and fnmatch.fnmatch(path.name, MODULE_FOLDERS))]
    paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    small = [path for path in paths if any(fnmatch.fnmatch(path.name, each) for each in SMALL_FILES)]
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in small}


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def _kept(files: Mapping[str, bytes]) -> Path:
    """A cache folder with exactly these files, the same for the same content."""
    state = hashlib.sha256()
    for name in sorted(files):
        state.update(f"{name} {len(files[name])}\n".encode() + files[name])
    folder = cache_folder() / "adapted" / state.hexdigest()[:24]
    return folder if folder.is_dir() else create_atomically(folder, files.items())
