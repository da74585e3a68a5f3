"""Reads a checkpoint lazily, and writes one. The only module that uses safetensors."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.byte_source import ByteSource
from model.checkpoint_error import CheckpointError
from model.checkpoint_folder import CheckpointFolder, open_folder
from model.checkpoint_header import TensorHeader, first_few, read_header, reject_duplicate_keys

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4 * 10**9
CONCURRENT_HEADERS = 8
READ_THROUGH_BYTES = 32 * 2**20
"""Most bytes of whole rows in memory, where only a part of each row is needed."""


@dataclass(frozen=True)
class FileTensor:
    """A `parallel.weight_format.StoredTensor`: one tensor of a safetensors file, read lazily."""

    header: TensorHeader
    source: ByteSource
    begin: int
    """Offset of the weights in the file, in bytes."""

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.header.dtype

    @property
    def num_bytes(self) -> int:
        return self.header.num_bytes

    @property
    def piece_dim(self) -> int:
        return 0

    @property
    def piece_bytes(self) -> int:
        return self.source.piece_bytes

    def read(self, *slices: slice) -> Tensor:
        """The given part as a CPU tensor: one slice of step 1 per dim, or everything.

        Adjacent rows are read directly. For a part of each row, the bytes in between are read along if that is faster than skipping them
        (`ByteSource.worthwhile_gap_bytes`), at most `READ_THROUGH_BYTES` at a time.

        Raises:
            CheckpointError: the file cannot be read; it names file and tensor.
        """
        part = torch.empty([len(span) for span in self._wanted(slices)], dtype=self.dtype)
        self.read_into(part, *slices)
        return part

    def read_into(self, target: Tensor, *slices: slice) -> None:
        """Like `read`, into a contiguous CPU tensor of that shape and dtype."""
        wanted = self._wanted(slices)
        if target.numel() == 0:
            return
        try:
            if all(len(span) == size for span, size in zip(wanted[1:], self.shape[1:], strict=True)):
                first = wanted[0].start * prod(self.shape[1:]) if wanted else 0
                self.source.read([(self._byte(first), _bytes_of(target))])
            else:
                self._read_columns(wanted, target)
        except Exception as error:  # each store's library has its own errors
            raise CheckpointError(
                f"{self.source.name}: {self.name} cannot be read ({error})", file=self.source.name, tensor=self.name
            ) from error

    def _wanted(self, slices: Sequence[slice]) -> list[range]:
        return [range(*part.indices(size)) for part, size in zip(slices or (slice(None),) * len(self.shape), self.shape, strict=True)]

    def _read_columns(self, wanted: Sequence[range], part: Tensor) -> None:
        """Read a part of each row. A tensor with more dims is a matrix whose rows are all dims but the first."""
        rows, columns = wanted[0], wanted[1]
        row_size = prod(self.shape[1:])
        left_out = self.shape[1] - len(columns)
        if len(wanted) == 2 and left_out * self.dtype.itemsize > self.source.worthwhile_gap_bytes:
            self.source.read([(self._byte(row * row_size + columns.start), _bytes_of(part[at])) for at, row in enumerate(rows)])
            return
        at_a_time = max(1, READ_THROUGH_BYTES // (row_size * self.dtype.itemsize))
        inner = tuple(slice(span.start, span.stop) for span in wanted[1:])
        for start in range(rows.start, rows.stop, at_a_time):
            stop = min(start + at_a_time, rows.stop)
            whole = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
            self.source.read([(self._byte(start * row_size), _bytes_of(whole))])
            part[start - rows.start : stop - rows.start] = whole[:, *inner]

    def _byte(self, element: int) -> int:
        return self.begin + self.header.start + element * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder, by name. Opening it reads and checks every header, but no weights.

    ``location`` is a path, or the URL of a remote folder (`model.checkpoint_folder`). ``single_file`` is the file with all tensors if there
    is no index; a name other than the default means that there is none.

    Raises:
        CheckpointError: there is no checkpoint; the index names files that are missing, outside the folder or without the tensor; a
            header is damaged; or a file is shorter or longer than its header says.
    """

    def __init__(self, location: Path | str, *, single_file: str = SINGLE_FILE) -> None:
        self.location = location
        self._folder = open_folder(location)
        self._files: list[ByteSource] = []
        self._tensors: dict[str, FileTensor] = {}
        shards = _shards(self._folder, single_file)
        try:
            with ThreadPoolExecutor(CONCURRENT_HEADERS) as threads:
                for opened in threads.map(self._open, shards, shards.values()):
                    self._tensors |= opened
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Checkpoint {self.location} [{len(self._tensors)} tensors | {len(self._files)} files | {self.num_bytes} bytes]>"

    @property
    def tensors(self) -> Mapping[str, FileTensor]:
        return self._tensors

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(tensor.header.num_bytes for tensor in self._tensors.values())

    @property
    def bytes_fetched(self) -> int:
        """Read from all files so far: headers, weights, and gaps that were read along."""
        return sum(file.bytes_fetched for file in self._files)

    @property
    def concurrent_reads(self) -> int:
        """How many tensors should be read concurrently."""
        return self._folder.concurrent_reads

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, name: str, expected: set[str] | None) -> dict[str, FileTensor]:
        """Open one file and check its header against the tensors that the index has ``expected`` in it."""
        try:
            source = self._folder.open(name)
        except Exception as error:
            raise CheckpointError(f"{self._folder.file(name)} cannot be read ({error})", file=self._folder.file(name)) from error
        self._files.append(source)
        headers, begin = read_header(source)
        if expected is not None and (wrong := sorted(expected.symmetric_difference(headers))):
            raise CheckpointError(f"{INDEX_FILE} and {source.name} disagree on {first_few(wrong)}", file=source.name, tensor=wrong[0])
        return {tensor: FileTensor(header, source, begin) for tensor, header in headers.items()}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write ``tensors`` and config.json as Hugging Face does: one file, or an index and shards of at most ``max_shard_bytes``.

    A tensor larger than a shard gets its own.
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


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor. Viewed as bytes, because numpy does not know bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _shards(folder: CheckpointFolder, single_file: str) -> dict[str, set[str] | None]:
    """The files of a checkpoint, with the tensors that the index expects in each (None: there is no index)."""
    there = folder.names()
    if INDEX_FILE not in there or single_file != SINGLE_FILE:
        if single_file not in there:
            raise CheckpointError(_why_none(folder, there, single_file), file=folder.file(""))
        return {single_file: None}
    index = folder.file(INDEX_FILE)
    shards: dict[str, set[str] | None] = {}
    for name, file_name in _weight_map(folder).items():
        # With a path an index could read any file of this machine. A symbolic link is the owner's choice: hub caches consist of them.
        if not isinstance(file_name, str) or file_name in ("", "..", ".") or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file_name!r}, which is not a file in this folder", file=index, tensor=name
            )
        if file_name not in there:
            missing = folder.file(file_name)
            raise CheckpointError(f"{index} names {file_name}, which is missing", file=missing, tensor=name)
        names = shards.setdefault(file_name, set())
        assert names is not None
        names.add(name)
    return shards


def _why_none(folder: CheckpointFolder, there: frozenset[str], single_file: str) -> str:
    """The error message for a folder without a checkpoint, depending on what it holds instead."""
    wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE}" if single_file == SINGLE_FILE else f"no {single_file}"
    said = f"{folder.file('').rstrip('/')} holds {wanted}"
    if (link := Path(folder.file(single_file))).is_symlink():  # as in a hub's cache whose blobs were removed
        return f"{link} is a link to {link.readlink()}, which does not exist"
    if pickles := sorted(name for name in there if name.endswith((".bin", ".pt", ".pth"))):
        return f"{said}; {pickles[0]} is a pickle, which can run any code when it is read, and is refused: convert it to safetensors"
    shards = sorted(name for name in there if name.endswith(".safetensors"))
    if shards and single_file == SINGLE_FILE:
        return f"{said}, though there is {shards[0]}: its index is missing"
    return said


def _weight_map(folder: CheckpointFolder) -> dict[str, Any]:
    index = folder.file(INDEX_FILE)
    try:
        source = folder.open(INDEX_FILE)
        content = bytearray(source.size)
        source.read([(0, memoryview(content))])
        source.close()
        weight_map = json.loads(bytes(content), object_pairs_hook=reject_duplicate_keys)["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read ({error})", file=index) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a checkpoint index ({error!r})", file=index) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map names no tensors", file=index)
    return weight_map


def _packed(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in order, with a new shard whenever the next one would not fit."""
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
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod((path.parent / "config.json").stat().st_mode)  # the library lets only the owner read; follow the umask instead
