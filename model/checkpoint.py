"""The only door to safetensors: read a checkpoint folder lazily, write one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_header import CheckpointError, TensorHeader, read_header, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class FileTensor:
    """A `parallel.weight_format.StoredTensor`: one tensor of a safetensors file, nothing of it read yet."""

    header: TensorHeader
    source: "_File"

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.header.dtype

    def read(self, *slices: slice) -> Tensor:
        """The given part as a CPU tensor, one slice of step 1 per dim, or everything; only its bytes leave the file.

        Raises:
            CheckpointError: the file cannot be read; it names file and tensor.
        """
        return self.source.read(self.header, slices or (slice(None),) * len(self.shape))


class Checkpoint:
    """The tensors of a folder, by name. Opening it reads and checks every header, and no weight.

    Raises:
        CheckpointError: no checkpoint is here, an index that names files that are not here, outside the folder or without the
            tensor, a header that is damaged, or a file that is shorter or longer than its header says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[_File] = []
        self._tensors: dict[str, FileTensor] = {}
        shards = _shards(folder)
        for path, wanted in shards.items():
            file = _File(path)
            self._files.append(file)
            headers = read_header(path)
            if wanted is not None and (wrong := sorted(wanted.symmetric_difference(headers))):
                raise CheckpointError(f"{INDEX_FILE} and {path.name} disagree on {some(wrong)}", file=path, tensor=wrong[0])
            self._tensors |= {name: FileTensor(header, file) for name, header in headers.items()}

    def __repr__(self) -> str:
        return f"<Checkpoint {self.folder} [{len(self._tensors)} tensors | {len(self._files)} files | {self.num_bytes} bytes]>"

    @property
    def tensors(self) -> Mapping[str, FileTensor]:
        return self._tensors

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(tensor.header.num_bytes for tensor in self._tensors.values())

    def close(self) -> None:
        """Let go of the files. Tensors that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write ``tensors`` and config.json as Hugging Face does: one file, or shards of at most ``max_shard_bytes`` with an index.

    A tensor that is larger than a shard gets one of its own.
    """
    shards = _packed(tensors, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


class _File:
    """One safetensors file, mapped into memory at its first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: safe_open | None = None

    def read(self, header: TensorHeader, slices: tuple[slice, ...]) -> Tensor:
        shape = [len(range(*part.indices(size))) for part, size in zip(slices, header.shape, strict=True)]
        if 0 in shape:
            return torch.empty(shape, dtype=header.dtype)
        try:
            if self._mapped is None:
                self._mapped = safe_open(self.path, framework="pt", device="cpu")
            stored = self._mapped.get_slice(header.name)
            tensor: Tensor = stored[slices] if slices else self._mapped.get_tensor(header.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {header.name} cannot be read ({error})", file=self.path, tensor=header.name) from error
        return tensor

    def close(self) -> None:
        self._mapped = None


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, with the tensors that the index expects in each (None: there is no index)."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}", file=folder)
        return {folder / SINGLE_FILE: None}
    shards: dict[Path, set[str] | None] = {}
    for name, file_name in _weight_map(index).items():
        # A path would let an index read any file of this machine. A link to elsewhere is the owner's doing: hub caches are made of them.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file_name!r}, which is no file of this folder", file=index, tensor=name
            )
        path = folder / file_name
        if path not in shards and not path.is_file():
            raise CheckpointError(f"{index} names {file_name}, which is missing", file=path, tensor=name)
        names = shards.setdefault(path, set())
        assert names is not None
        names.add(name)
    return shards


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint ({error!r})", file=index) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map names no tensors", file=index)
    return weight_map


def _packed(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, a new shard whenever the next one would not fit."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.contiguous()
        filled += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((path.parent / "config.json").stat().st_mode)  # the library lets only the owner read; the umask shall decide
