"""The header of a safetensors file: which tensors lie where. Read apart from the weights, so that a damaged file is named
tensor by tensor before anything is allocated.

The format (safetensors README, "Format"): 8 bytes little-endian length of the header, the header as JSON, then the weights
without gaps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit; a larger number is a damaged file."""


class CheckpointError(ValueError):
    """A checkpoint folder is not what it should be. ``file`` and, where it is about one, ``tensor`` say where."""

    def __init__(self, message: str, *, file: Path, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file, self.tensor = file, tensor

    def __reduce__(self) -> tuple[partial["CheckpointError"], tuple[str]]:
        """Pickled by its fields, so that a rank's error can reach another process."""
        return partial(CheckpointError, file=self.file, tensor=self.tensor), (str(self),)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: ``start`` and ``stop`` are bytes from the beginning of the weights."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than the header says.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file: it has {file_bytes} bytes", file=path)
            raw = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})", file=path) from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error})", file=path) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} has a damaged header (it is no JSON object)", file=path)
    raw.pop("__metadata__", None)
    headers = {name: _tensor_header(path, name, entry) for name, entry in raw.items()}
    _check_layout(path, headers, file_bytes - 8 - header_bytes)
    return headers


def _tensor_header(path: Path, name: str, entry: Any) -> TensorHeader:
    try:
        start, stop = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        dtype_name = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header at {name} ({error!r})", file=path, tensor=name) from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype_name}, which is not supported", file=path, tensor=name)
    header = TensorHeader(name, DTYPES[dtype_name], shape, start, stop)
    if any(size < 0 for size in shape) or prod(shape) * header.dtype.itemsize != header.num_bytes:
        raise CheckpointError(
            f"{path}: {name} of shape {list(shape)} and dtype {dtype_name} cannot fill {header.num_bytes} bytes", file=path, tensor=name
        )
    return header


def _check_layout(path: Path, headers: dict[str, TensorHeader], weight_bytes: int) -> None:
    """The tensors must follow each other without gap or overlap and end where the file ends."""
    end = 0
    for header in sorted(headers.values(), key=lambda header: (header.start, header.stop)):
        if header.start != end:
            raise CheckpointError(f"{path}: {header.name} begins at byte {header.start}, expected {end}", file=path, tensor=header.name)
        end = header.stop
        if end > weight_bytes:
            raise CheckpointError(
                f"{path} is truncated: it ends {end - weight_bytes} bytes before {header.name} does", file=path, tensor=header.name
            )
    if end < weight_bytes:
        raise CheckpointError(f"{path} has {weight_bytes - end} bytes more than its header says", file=path)


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
