"""Reads and checks the header of a safetensors file, which says where each tensor is.

Separate from the weights, so that damage is reported by tensor before anything is allocated.

The format (safetensors README, "Format"): 8 bytes little-endian length of the header, the header as JSON, then the weights without gaps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from model.byte_source import ByteSource
from model.checkpoint_error import CheckpointError, byte_count

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit; a larger number means a damaged file."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file. ``start`` and ``stop`` are byte offsets from the beginning of the weights."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(source: ByteSource) -> tuple[dict[str, TensorHeader], int]:
    """The tensors of a file by name, and the byte offset of the weights.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than the header says.
    """
    file = source.name
    if source.size < LENGTH_BYTES:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: it has {byte_count(source.size)}", file=file)
    header_bytes = int.from_bytes(_content(source, 0, LENGTH_BYTES), "little")
    if header_bytes > min(MAX_HEADER_BYTES, source.size - LENGTH_BYTES):
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file: it has {byte_count(source.size)}, and its header would have {header_bytes}",
            file=file,
        )
    try:
        raw = json.loads(_content(source, LENGTH_BYTES, header_bytes), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error})", file=file) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} has a damaged header (it is not a JSON object)", file=file)
    raw.pop("__metadata__", None)
    headers = {name: _tensor_header(file, name, entry) for name, entry in raw.items()}
    _check_layout(file, headers, source.size - LENGTH_BYTES - header_bytes)
    return headers, LENGTH_BYTES + header_bytes


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a name occurs twice, as its meaning would be ambiguous."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"{twice} occurs twice")
    return dict(pairs)


def _content(source: ByteSource, start: int, length: int) -> bytes:
    content = bytearray(length)
    try:
        source.read([(start, memoryview(content))])
    except Exception as error:  # each store's library has its own errors
        raise CheckpointError(f"{source.name} cannot be read ({error})", file=source.name) from error
    return bytes(content)


def _tensor_header(file: str, name: str, entry: Any) -> TensorHeader:
    try:
        start, stop = (_whole(offset) for offset in entry["data_offsets"])
        shape = tuple(_whole(size) for size in entry["shape"])
        dtype_name = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a damaged header at {name} ({error!r})", file=file, tensor=name) from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{file}: {name} has the dtype {dtype_name}, which is not supported", file=file, tensor=name)
    header = TensorHeader(name, DTYPES[dtype_name], shape, start, stop)
    if prod(shape) * header.dtype.itemsize != header.num_bytes:
        raise CheckpointError(
            f"{file}: {name} of shape {list(shape)} and dtype {dtype_name} cannot fill {byte_count(header.num_bytes)}",
            file=file,
            tensor=name,
        )
    return header


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a size")
    return number


def _check_layout(file: str, headers: dict[str, TensorHeader], weight_bytes: int) -> None:
    """Check that the tensors follow each other without gap or overlap and end where the file ends."""
    end = 0
    for header in sorted(headers.values(), key=lambda header: (header.start, header.stop)):
        if header.start != end:
            raise CheckpointError(f"{file}: {header.name} begins at byte {header.start}, expected {end}", file=file, tensor=header.name)
        end = header.stop
        if end > weight_bytes:
            raise CheckpointError(
                f"{file} is truncated: it ends {byte_count(end - weight_bytes)} before {header.name} does", file=file, tensor=header.name
            )
    if end < weight_bytes:
        raise CheckpointError(f"{file} has {byte_count(weight_bytes - end)} more than its header says", file=file)


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
