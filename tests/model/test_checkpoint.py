"""Checkpoint folders are read lazily, and refused by name if they are damaged."""

import json
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, write_checkpoint
from model.checkpoint_error import CheckpointError
from tests.model.oracle import make_oracle

MATRIX = torch.arange(12, dtype=torch.float32).view(3, 4)
TENSORS = {"a.weight": MATRIX, "b.bias": torch.ones(5, dtype=torch.bfloat16), "c.weight": torch.zeros(2, 3, dtype=torch.float16)}


def written(folder: Path, **options: Any) -> Path:
    write_checkpoint(folder, TENSORS, {"hidden_size": 4}, **options)
    return folder


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def replace_header(file: Path, header: dict[str, Any]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 50}, {"max_shard_bytes": 1}], ids=["one file", "two shards", "a shard each"])
def test_what_is_written_is_read_again(options: dict[str, int], tmp_path: Path) -> None:
    with Checkpoint(written(tmp_path, **options)) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            stored = checkpoint.tensors[name]
            assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
            assert torch.equal(stored.read(), tensor)
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert json.loads((tmp_path / "config.json").read_text()) == {"hidden_size": 4}
    assert (tmp_path / SINGLE_FILE).exists() == (not options)


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "plain").touch()
    assert (tmp_path / SINGLE_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shards_are_as_large_as_allowed(tmp_path: Path) -> None:
    written(tmp_path, max_shard_bytes=60)
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert weight_map["a.weight"] == weight_map["b.bias"] == "model-00001-of-00002.safetensors"
    assert weight_map["c.weight"] == "model-00002-of-00002.safetensors"


def test_a_part_of_a_tensor_is_read_by_slices(tmp_path: Path) -> None:
    with Checkpoint(written(tmp_path)) as checkpoint:
        stored = checkpoint.tensors["a.weight"]
        assert torch.equal(stored.read(slice(1, 3), slice(2, 4)), MATRIX[1:3, 2:4])
        assert torch.equal(stored.read(slice(None), slice(0, 1)), MATRIX[:, :1])
        assert stored.read(slice(2, 2), slice(None)).shape == (0, 4)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_writes_is_read(sharded: bool, tmp_path: Path) -> None:
    oracle = make_oracle("9_heads", tmp_path, max_shard_size="40KB" if sharded else "5GB")
    assert (tmp_path / INDEX_FILE).exists() == sharded
    with Checkpoint(tmp_path) as checkpoint:
        theirs = oracle.model.state_dict()
        assert set(checkpoint.tensors) == set(theirs)
        assert all(torch.equal(checkpoint.tensors[name].read(), tensor) for name, tensor in theirs.items())


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    with Checkpoint(written(tmp_path)) as checkpoint:
        tensor = checkpoint.tensors["a.weight"].read(slice(0, 2), slice(None))
    (tmp_path / SINGLE_FILE).unlink()
    assert torch.equal(tensor, MATRIX[:2])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def cut_by_one(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def one_byte(file: Path) -> None:
    file.write_bytes(b"{")


def grow_by_one(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def no_safetensors(file: Path) -> None:
    file.write_bytes(b"<html><body>404: not found</body></html>")


def scribble(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xfe!!"
    file.write_bytes(content)


def wrong_shape(file: Path) -> None:
    header = header_of(file)
    header["a.weight"]["shape"] = [3, 5]
    replace_header(file, header)


def unknown_dtype(file: Path) -> None:
    header = header_of(file)
    header["a.weight"]["dtype"] = "F4"
    replace_header(file, header)


def overlap(file: Path) -> None:
    header = header_of(file)
    start, stop = header["c.weight"]["data_offsets"]
    header["c.weight"]["data_offsets"] = [start - 4, stop - 4]
    replace_header(file, header)


def no_offsets(file: Path) -> None:
    header = header_of(file)
    del header["b.bias"]["data_offsets"]
    replace_header(file, header)


@pytest.mark.parametrize(
    ("damage", "what", "tensor"),
    [
        (cut_short, "truncated", "c.weight"),
        (cut_by_one, "it ends 1 byte before", "c.weight"),
        (one_byte, "it has 1 byte$", None),
        (grow_by_one, "has 1 byte more", None),
        (cut_in_the_header, "truncated", None),
        (empty, "truncated", None),
        (grow, "4 bytes more", None),
        (no_safetensors, "not a safetensors file", None),
        (scribble, "damaged header", None),
        (wrong_shape, r"a.weight of shape \[3, 5\]", "a.weight"),
        (unknown_dtype, "F4", "a.weight"),
        (overlap, "begins at byte", "c.weight"),
        (no_offsets, "damaged header at b.bias", "b.bias"),
    ],
)
def test_a_damaged_file_is_named_with_its_tensor(damage: Callable[[Path], None], what: str, tensor: str | None, tmp_path: Path) -> None:
    file = written(tmp_path) / SINGLE_FILE
    damage(file)
    with pytest.raises(CheckpointError, match=what) as caught:
        Checkpoint(tmp_path)
    assert str(file) in str(caught.value)
    assert (caught.value.file, caught.value.tensor) == (str(file), tensor)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 210), value=st.integers(0, 255))
def test_one_wrong_byte_in_the_header_is_noticed_or_harmless(place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = written(tmp_path_factory.mktemp("scribbled"))
    file = folder / SINGLE_FILE
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content)
    with suppress(CheckpointError), Checkpoint(folder) as checkpoint:
        for tensor in checkpoint.tensors.values():
            assert tensor.read().shape == tensor.shape


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index = edit(index) or index
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7])
def test_an_index_may_name_files_of_its_own_folder_only(place: object, tmp_path: Path) -> None:
    written(tmp_path, max_shard_bytes=1)
    edit_index(tmp_path, lambda index: index["weight_map"].update({"a.weight": place}))
    with pytest.raises(CheckpointError, match=r"a\.weight|missing"):
        Checkpoint(tmp_path)


def test_symbolic_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """The caches of model hubs consist of them."""
    (blobs := tmp_path / "blobs").mkdir()
    (snapshot := tmp_path / "snapshot").mkdir()
    written(blobs)
    (snapshot / SINGLE_FILE).symlink_to(blobs / SINGLE_FILE)
    with Checkpoint(snapshot) as checkpoint:
        assert torch.equal(checkpoint.tensors["a.weight"].read(), MATRIX)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    written(tmp_path, max_shard_bytes=1)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00003.safetensors, which is missing"):
        Checkpoint(tmp_path)


def test_an_index_that_disagrees_with_a_shard_is_refused(tmp_path: Path) -> None:
    written(tmp_path, max_shard_bytes=1)
    edit_index(tmp_path, lambda index: index["weight_map"].update({"a.weight": index["weight_map"]["b.bias"]}))
    with pytest.raises(CheckpointError, match=r"disagree on a.weight"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        Checkpoint(tmp_path)


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)


def test_the_error_survives_pickling(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("what", file=tmp_path, tensor="a")))
    assert (str(error), error.file, error.tensor) == ("what", str(tmp_path), "a")
