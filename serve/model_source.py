"""Resolve a model source from the settings to a checkpoint: a folder on this machine, or one in object storage.

Sources come from settings only, never from API requests: nothing that a client sends makes the server download or open anything.
"""

import difflib
import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.adapter_config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from model.adapter_config import AdapterConfig, AdapterError
from model.checkpoint_error import CheckpointError
from model.checkpoint_folder import small_files
from model.terminal_safe import terminal_safe
from serve.config import ModelSettings

DEMO = "demo"
DEMO_PLACE = "demo://"
HUB_SCHEME, MODELSCOPE_SCHEME = "hf://", "modelscope://"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
WANTED = ("*.safetensors", "*.json", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files to download: weights as safetensors, configuration, tokenizer. No pickles and no code."""
UNWANTED = ("[!1-9]*/*", "[1-9][!_]*/*")
"""Files not to download: subfolders hold the same weights in other formats, except those of sentence-transformers (`1_Pooling`)."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CLOSED = frozenset({errno.EROFS, errno.EACCES})
"""Errors of a disk that cannot be written to. A network error may also be EACCES, but without a file name."""

Report = Callable[[str, float], None]
"""Called with (current activity, fraction of it that is done, 0 to 1)."""


class ModelSourceError(RuntimeError):
    """The model was not found and could not be downloaded; the message says what would work."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A checkpoint that was found, and the model name for clients."""

    folder: Path
    """Folder on this machine. For a checkpoint in object storage it holds everything but the weights."""
    name: str
    store: str | None = None
    """URL from which each rank reads its share of the weights; None: they are in ``folder``."""
    adapter: Path | str | None = None
    """Location of the LoRA adapter to merge; None: no adapter."""

    @property
    def location(self) -> Path | str:
        """Location of the weights: a folder or a URL."""
        return self.store or self.folder


def find_model(settings: ModelSettings, report: Report = lambda _doing, _done: None) -> FoundModel:
    """Find the model and its adapter; download what is on a hub.

    Raises:
        ModelSourceError: there is no such folder or repository, or it cannot be reached.
    """
    base = _found(settings.source, settings.revision, MODEL, report)
    if settings.adapter is None:
        return replace(base, name=settings.name or base.name)
    try:
        adapter = _found(settings.adapter, settings.adapter_revision, ADAPTER, report)
    except ModelSourceError as error:
        raise ModelSourceError(f"adapter: {error}") from error
    return replace(base, name=settings.name or adapter.name, adapter=adapter.location)


def served_name(settings: ModelSettings) -> str:
    """The model name for clients, from the settings alone.

    Raises:
        ModelSourceError: the source is not valid.
    """
    if settings.name:
        return settings.name
    location = portable_adapter(settings) or portable_source(settings)
    if needs_download(location):
        return str(location).partition("://")[2].partition("@")[0] or DEMO
    return str(location).rstrip("/").rsplit("/", 1)[-1]


def source_name(source: str) -> str:
    """The source's own name, independent of the name for clients: a repository, or the last part of a path."""
    bare = source.removeprefix(HUB_SCHEME).removeprefix(MODELSCOPE_SCHEME)
    if bare != source or (REPOSITORY.fullmatch(source) and not Path(source).exists()):
        return bare
    return source.rstrip("/").rsplit("/", 1)[-1] or source


def check_unique_names(names: Sequence[str]) -> None:
    """Raise if two models have the same name.

    Raises:
        ModelSourceError: two models would be called the same.
    """
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise ModelSourceError(f"two models are called {name!r}; give each its own model.name")


def portable_source(settings: ModelSettings) -> Path | str:
    """The source in a form that is valid on every host of a cluster, for `download_if_needed` there: an absolute folder, the URL of a
    folder in object storage, or ``hf://owner/name@revision`` and the like.

    Raises:
        ModelSourceError: a relative path, or not a repository.
    """
    source, revision = settings.source, f"@{settings.revision}" if settings.revision else ""
    if source == DEMO:
        return DEMO_PLACE
    for scheme in (HUB_SCHEME, MODELSCOPE_SCHEME):
        if source.startswith(scheme):
            return f"{scheme}{_repository(source, scheme)}{revision}"
    if "://" in source:
        return source
    if Path(source).expanduser().is_absolute():
        return Path(source).expanduser()
    if REPOSITORY.fullmatch(source):
        return f"{HUB_SCHEME}{source}{revision}"
    raise ModelSourceError(f"{source!r} is neither a repository nor an absolute path, and a relative path differs between hosts")


def portable_adapter(settings: ModelSettings) -> Path | str | None:
    """Like `portable_source`, for the model's adapter; None: no adapter.

    Raises:
        ModelSourceError: see `portable_source`.
    """
    if settings.adapter is None:
        return None
    return portable_source(ModelSettings(source=settings.adapter, revision=settings.adapter_revision))


def absolute_if_local(source: str) -> str:
    """The absolute path of a folder on this host; anything else unchanged."""
    return str(Path(source).resolve()) if "://" not in source and source != DEMO and Path(source).is_dir() else source


def needs_download(location: Path | str) -> bool:
    """Whether a host must download the checkpoint before it can read it."""
    return str(location).startswith((DEMO_PLACE, HUB_SCHEME, MODELSCOPE_SCHEME))


def download_if_needed(location: Path | str, *, weights: bool = True, report: Report = lambda _doing, _done: None) -> Path | str:
    """A location that `model.checkpoint_folder` can open on this host. If it `needs_download` it is downloaded into this host's cache
    (without ``weights``, only the small files); other locations are returned unchanged.

    Raises:
        ModelSourceError: the download failed.
    """
    if not needs_download(location):
        return location
    scheme, _, name = str(location).partition("://")
    repository, _, revision = name.partition("@")
    wanted = WANTED if weights else tuple(pattern for pattern in WANTED if not pattern.endswith(".safetensors"))
    if f"{scheme}://" == DEMO_PLACE:
        return _demo(report)
    fetch = _from_hub if f"{scheme}://" == HUB_SCHEME else _from_modelscope
    return fetch(repository, revision or None, wanted)


def _found(source: str, revision: str | None, kind: "Kind", report: Report) -> FoundModel:
    """Find one source, whose name for clients is its own name."""
    folder = Path(source).expanduser()
    if source == DEMO and kind is MODEL:
        return FoundModel(folder=_demo(report), name=DEMO)
    if source.startswith(MODELSCOPE_SCHEME):
        repository = _repository(source, MODELSCOPE_SCHEME)
        return FoundModel(folder=_checked(_from_modelscope(repository, revision), kind, source), name=repository)
    if source.startswith(HUB_SCHEME) or (REPOSITORY.fullmatch(source) and not folder.exists()):
        repository = _repository(source, HUB_SCHEME)
        return FoundModel(folder=_checked(_from_hub(repository, revision), kind, source), name=repository)
    if "://" in source:
        return _in_store(source, kind)
    return FoundModel(folder=_local(folder, kind), name=folder.resolve().name)


def _in_store(url: str, kind: "Kind") -> FoundModel:
    """Copy only the small files; each rank reads its share of the weights from the store."""
    try:
        folder = small_files(url)
    except CheckpointError as error:
        raise ModelSourceError(str(error)) from error
    _checked(folder, kind, url)
    return FoundModel(folder=folder, name=url.rstrip("/").rsplit("/", 1)[-1], store=url)


def _repository(source: str, scheme: str) -> str:
    repository = source.removeprefix(scheme)
    if not REPOSITORY.fullmatch(repository):
        raise ModelSourceError(f"{source!r} does not name a repository: write {scheme}owner/name")
    return repository


def _local(folder: Path, kind: "Kind") -> Path:
    if folder.is_file():
        raise ModelSourceError(f"{str(folder)!r} is a file; give the folder that has {kind.file} and the *.safetensors (GGUF is not read)")
    if not folder.is_dir():
        raise ModelSourceError(f"there is no folder {str(folder)!r}{kind.instead(str(folder))}")
    return _checked(folder, kind, str(folder)).resolve()


def _checked(folder: Path, kind: "Kind", source: str) -> Path:
    if not (folder / kind.file).is_file():
        raise ModelSourceError(f"{source!r} is no {kind.called} folder: it has no {kind.file}{kind.other(folder, source)}")
    return folder


def _model_instead(source: str) -> str:
    return (
        f"{_meant(source)}; give a checkpoint folder, `{DEMO}`, a repository such as "
        f"Qwen/Qwen2-0.5B-Instruct, {MODELSCOPE_SCHEME}owner/name, or the URL of a folder in a store such as s3://bucket/folder"
    )


def _adapter_instead(source: str) -> str:
    name, is_named, path = source.partition("=")
    if is_named and path:  # as vLLM's --lora-modules has it
        return f"; the name is a setting of its own: --name {name} --adapter {path}"
    return f"; give the folder that PEFT saved, a repository, {MODELSCOPE_SCHEME}owner/name, or the URL of a folder in a store"


def _is_adapter(folder: Path, source: str) -> str:
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return ""
    try:
        base = AdapterConfig.from_folder(folder).base
    except AdapterError:
        base = None
    named = base is not None and REPOSITORY.fullmatch(base) is not None  # anything else must not go into a command to copy
    base_note = "" if named or base is None else f" (called {terminal_safe(base)} where it was trained)"
    return f", but it is a LoRA adapter; serve it with its base{base_note}: manta serve {base if named else 'BASE'} --adapter {source}"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The kind of folder that is looked for: a checkpoint or an adapter."""

    called: str
    file: str
    """The file that identifies a folder of this kind."""
    instead: Callable[[str], str]
    """Advice if there is no such folder."""
    other: Callable[[Path, str], str]
    """Explains what a folder without ``file`` is instead; called with the folder and the source."""


MODEL = Kind(called="checkpoint", file="config.json", instead=_model_instead, other=_is_adapter)
ADAPTER = Kind(called="adapter", file=ADAPTER_CONFIG_FILE, instead=_adapter_instead, other=lambda _folder, _source: "")


def _meant(name: str) -> str:
    """A suggestion for a name that looks mistyped: the demo, or a Qwen repository without its owner."""
    from serve.planning.released_models import released_names

    known = {DEMO: DEMO, **{each.lower(): f"Qwen/{each}" for each in released_names()}}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    return f" (did you mean {known[near[0]]}?)" if near else ""


def _mistyped(repository: str) -> str:
    """`_meant` for a repository that the hub does not have; only of Qwen's, whose names are known."""
    owner, _, name = repository.partition("/")
    return _meant(name) if owner.lower() == "qwen" else ""


def _demo(report: Report) -> Path:
    from serve.demo_model import DemoModelError, ensure_demo_model  # torch, which only this path needs

    try:
        return ensure_demo_model(report=report)
    except DemoModelError as error:
        raise ModelSourceError(str(error)) from error


def _from_hub(repository: str, revision: str | None, wanted: Sequence[str] = WANTED) -> Path:
    """Download from the Hugging Face hub, with its own progress bars. Files in its cache are not downloaded again."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)))
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f"{repository} has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise ModelSourceError(f"{repository} is gated: accept its terms on the hub, then set HF_TOKEN to a token of yours") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"the hub has no repository {repository}{_mistyped(repository)}, or it is private: set HF_TOKEN to a token that may read it"
        ) from error
    except Exception as error:  # LocalEntryNotFoundError, OSError, and errors of its HTTP library, which share no base class
        raise ModelSourceError(
            _not_kept(repository, "HF_HOME", error) or _unreachable("the Hugging Face hub", repository, error)
        ) from error


def _from_modelscope(repository: str, revision: str | None, wanted: Sequence[str] = WANTED) -> Path:
    try:
        from modelscope import snapshot_download
        from requests import HTTPError
    except ImportError as error:
        raise ModelSourceError('models from ModelScope need its library: pip install "modelscope>=1.30"') from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)))
    except HTTPError as error:  # what the library raises if the repository does not exist or is private
        what = f"{repository} at revision {revision!r}" if revision else repository
        raise ModelSourceError(
            f"ModelScope has no {what}, or it is private: set MODELSCOPE_API_TOKEN to a token that may read it"
        ) from error
    except Exception as error:  # its errors share no base class either
        raise ModelSourceError(_not_kept(repository, "MODELSCOPE_CACHE", error) or _unreachable("ModelScope", repository, error)) from error


def _not_kept(repository: str, variable: str, error: BaseException | None) -> str | None:
    """Message if the cause was this machine's disk, else None. ``variable``: environment variable that sets the cache folder."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or (error.errno in CLOSED and error.filename)):
            reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
            return f"{repository} cannot be kept in this machine's cache: {reason}. Make room, or name another location by {variable}"
        error = error.__cause__ or error.__context__
    return None


def _unreachable(hub: str, repository: str, error: Exception) -> str:
    """Error message with the library's own error at the end: some firewalls answer in place of the hub."""
    reason = error.__cause__ or error
    message = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0][:200]}"
    mirror = "" if hub == "ModelScope" else "HF_ENDPOINT names a mirror, "
    return (
        f"{repository} is not in this machine's cache, and {hub} could not be reached ({mirror}HTTPS_PROXY a proxy). "
        f"Without a network: download it elsewhere, copy the folder here, and give the folder instead; or serve `{DEMO}` ({message})"
    )
