"""The folder of a checkpoint: on this host, or remote by an fsspec URL (`s3://`, `gs://` and others).

The only module that uses fsspec. The small files of a remote folder (configuration, tokenizer, index) are copied to a cache. The weights
never are: each rank fetches its own ranges.
"""

import fnmatch
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from model.byte_source import ByteSource, LocalFile, RemoteFile, with_retries
from model.checkpoint_error import CheckpointError
from parallel.user_cache import cache_folder

SMALL_FILES = ("*.json", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Configuration, tokenizer, index. No code."""
MODULE_FOLDERS = "[1-9]_*"
"""Subfolders with small files: those of sentence-transformers (`1_Pooling`). Other subfolders hold the weights in other formats."""
MAX_SMALL_BYTES = 64 * 2**20
"""No small file is larger: the longest, Qwen2's tokenizer, has 7 MB."""
LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""URL scheme -> package to install for it (our extras `s3` and `gcs`)."""


class CheckpointFolder(Protocol):
    """The files of one folder, by name."""

    def file(self, name: str) -> str:
        """Path or URL of a file, for messages; it need not exist."""
        ...

    def names(self) -> frozenset[str]: ...

    def open(self, name: str) -> ByteSource:
        """
        Raises:
            OSError: it cannot be opened.
        """
        ...

    @property
    def concurrent_reads(self) -> int:
        """How many tensors should be read concurrently."""
        ...


def open_folder(location: Path | str) -> CheckpointFolder:
    """The folder at a path or URL.

    Raises:
        CheckpointError: the URL's library is missing, or the folder cannot be listed.
    """
    return RemoteFolder(str(location)) if is_remote(location) else LocalFolder(Path(location))


def is_remote(location: Path | str) -> bool:
    """Whether this is the URL of a remote folder."""
    return isinstance(location, str) and "://" in location


def small_files(location: Path | str) -> Path:
    """A folder on this host with all of a checkpoint except its weights: the folder itself, or the cached copies of a remote one.

    Raises:
        CheckpointError: see `open_folder`.
    """
    return RemoteFolder(str(location)).cached() if is_remote(location) else Path(location)


class LocalFolder:
    """A folder on this host."""

    concurrent_reads = 2
    """One waits for the disk while the other converts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def file(self, name: str) -> str:
        return str(self._path / name)

    def names(self) -> frozenset[str]:
        try:
            return frozenset(path.name for path in self._path.iterdir() if path.is_file())
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be listed ({error})", file=self._path) from error

    def open(self, name: str) -> ByteSource:
        return LocalFile(self._path / name)


class RemoteFolder:
    """A folder by an fsspec URL. Listed once; later changes are not noticed."""

    concurrent_reads = 4

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._system, path = _file_system(self._url)
        try:
            entries = with_retries(lambda: self._system.ls(path, detail=True))
        except Exception as error:  # each store's library has its own errors
            raise CheckpointError(f"{self._url} cannot be listed ({_describe(error)})", file=self._url) from error
        self._entries = _files(entries)
        self._module_folders = [entry["name"] for entry in entries if entry["type"] == "directory" and _is_module(entry["name"])]

    def file(self, name: str) -> str:
        return f"{self._url}/{name}"

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def open(self, name: str) -> ByteSource:
        entry = self._entries.get(name)
        if entry is None:
            raise FileNotFoundError(f"{self._url} has no {name}")
        return self._opened(name, entry)

    def _opened(self, name: str, entry: Mapping[str, Any]) -> ByteSource:
        size = entry["size"]
        if size is None:  # some servers list only names
            size = with_retries(lambda: self._system.info(entry["name"])["size"])
        return RemoteFile(self.file(name), int(size), partial(self._range, entry["name"]))

    def cached(self) -> Path:
        """A cache folder with the small files. It is copied once for every state of the folder that a listing can distinguish.

        Raises:
            CheckpointError: a file cannot be fetched, is larger than a file of its name can be, or cannot be written to the cache.
        """
        entries = self._entries | self._of_modules()
        wanted = sorted(name for name in entries if any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in SMALL_FILES))
        state = [self._url, *(str(sorted((key, str(value)) for key, value in entries[name].items())) for name in wanted)]
        folder = cache_folder() / "remote" / hashlib.sha256("\n".join(state).encode()).hexdigest()[:24]
        try:
            return folder if folder.is_dir() else create_atomically(folder, ((name, self._content(name, entries[name])) for name in wanted))
        except OSError as error:
            why = f"{error.strerror or error}; set MANTA_CACHE to a folder that can be written to"
            raise CheckpointError(f"the small files of {self._url} cannot be kept in {folder.parent}: {why}", file=self._url) from error

    def _range(self, path: str, start: int, stop: int) -> bytes:
        content: bytes = self._system.cat_file(path, start=start, end=stop)  # by keyword: in s3fs a version comes before them
        return content

    def _of_modules(self) -> dict[str, dict[str, Any]]:
        """The files in sentence-transformers' subfolders, by names such as ``1_Pooling/config.json``."""
        try:
            each = {folder: with_retries(partial(self._system.ls, folder, detail=True)) for folder in self._module_folders}
        except Exception as error:
            raise CheckpointError(f"a subfolder of {self._url} cannot be listed ({_describe(error)})", file=self._url) from error
        return {f"{_last(folder)}/{name}": entry for folder, entries in each.items() for name, entry in _files(entries).items()}

    def _content(self, name: str, entry: Mapping[str, Any]) -> bytes:
        try:
            source = self._opened(name, entry)
            if source.size > MAX_SMALL_BYTES:
                raise CheckpointError(f"{self.file(name)} has {source.size} bytes, too many for a file of its kind", file=self.file(name))
            content = bytearray(source.size)
            source.read([(0, memoryview(content))])
            source.close()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.file(name)} cannot be fetched ({_describe(error)})", file=self.file(name)) from error
        return bytes(content)


def _files(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The files in a store's listing, by their names in the folder."""
    return {_last(entry["name"]): dict(entry) for entry in entries if entry["type"] == "file"}


def _is_module(folder: str) -> bool:
    return fnmatch.fnmatch(_last(folder), MODULE_FOLDERS)


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def create_atomically(folder: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Create the folder with these files (name below it, content): readers see all of them or no folder.

    Several processes may do so at the same time.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, content in files:
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes(content)
        made.chmod(0o755)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # another rank may have created it first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # a slow import that only remote folders need

    scheme = url.split("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        library = f"pip install {LIBRARIES[scheme]}" if scheme in LIBRARIES else f"{error}"
        raise CheckpointError(f"{url}: checkpoints at {scheme}:// need a library that is not installed: {library}", file=url) from error
    except ValueError as error:
        raise CheckpointError(f"{url}: {scheme}:// is not supported ({error})", file=url) from error
    return system, path


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
