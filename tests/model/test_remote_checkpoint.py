"""A remote checkpoint is read like a local one: the same tensors, and each rank its own bytes."""

import os
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from model.byte_source import ATTEMPTS, CONCURRENT_RANGES, LocalFile, RemoteFile
from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, write_checkpoint
from model.checkpoint_error import CheckpointError
from model.checkpoint_folder import RemoteFolder, small_files
from parallel.topology import Topology
from tests.model.load_in_rank import fingerprint, peak_beyond_weights
from tests.model.oracle import make_oracle
from tests.ranks import run_ranks
from tests.stores import Store, gs, s3

SHAPES = {"a": (40, 3000), "b": (7,), "c": (5, 4, 60), "d": (0, 3), "e": (1, 1)}


@pytest.fixture(scope="module")
def object_stores() -> Iterator[dict[str, Store]]:
    with s3() as one, gs() as other:
        yield {store.scheme: store for store in (one, other)}


@pytest.fixture(params=["local", "file", "memory", "s3", "gs"])
def place(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path | str:
    """The same checkpoint as a folder, and by URLs."""
    if request.param in ("s3", "gs"):
        store: Store = request.getfixturevalue("object_stores")[request.param]
        url = store.put(folder)
        store.use(monkeypatch)
        return url
    if request.param == "local":
        return folder
    if request.param == "file":
        return f"file://{folder}"
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/model", recursive=True)
    return "memory://bucket/model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        f"{name}.{dtype}": torch.randn(shape).to(dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)
    }
    (made := tmp_path / "model").mkdir()
    write_checkpoint(made, tensors, {"hidden_size": 4}, max_shard_bytes=300_000)
    assert (made / INDEX_FILE).exists()
    return made


def test_every_part_is_the_same_from_everywhere(place: Path | str, folder: Path) -> None:
    draw = random.Random(7)
    with Checkpoint(place) as checkpoint, Checkpoint(folder) as oracle:
        assert checkpoint.num_bytes == oracle.num_bytes
        for name, stored in checkpoint.tensors.items():
            whole = oracle.tensors[name].read()
            assert torch.equal(stored.read(), whole)
            for _ in range(10):
                slices = tuple(slice(*sorted((draw.randint(0, size), draw.randint(0, size)))) for size in stored.shape)
                assert torch.equal(stored.read(*slices), whole[slices])


def test_rows_cost_their_own_bytes_and_columns_what_lies_between(place: Path | str) -> None:
    with Checkpoint(place) as checkpoint:
        stored = checkpoint.tensors["a.torch.float32"]
        before = checkpoint.bytes_fetched
        rows = stored.read(slice(10, 20), slice(None))
        assert checkpoint.bytes_fetched - before == rows.nbytes
        before = checkpoint.bytes_fetched
        stored.read(slice(10, 20), slice(0, 30))
        assert checkpoint.bytes_fetched - before == rows.nbytes


def test_columns_far_apart_are_read_one_by_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"wide": torch.arange(60_000, dtype=torch.float32).view(3, 20_000)}, {})
    with Checkpoint(tmp_path) as checkpoint:
        before = checkpoint.bytes_fetched
        part = checkpoint.tensors["wide"].read(slice(1, 3), slice(5, 10))
        assert part.tolist() == [[20_000.0 + place for place in range(5, 10)], [40_000.0 + place for place in range(5, 10)]]
        assert checkpoint.bytes_fetched - before == part.nbytes


def test_ranks_read_their_shares_from_a_store(tmp_path: Path) -> None:
    make_oracle("28_heads", tmp_path / "moved")
    from_store = run_ranks(Topology(tp=2), fingerprint, f"file://{tmp_path / 'moved'}")
    from_folder = run_ranks(Topology(tp=2), fingerprint, tmp_path / "moved")
    for (report, total), (local_report, local_total) in zip(from_store, from_folder, strict=True):
        assert total == local_total
        assert report.bytes_read == local_report.bytes_read < 0.52 * report.bytes_of_checkpoint
        assert report.bytes_fetched > report.bytes_read


def test_only_small_files_are_copied_and_again_when_they_change(folder: Path, own_cache: Path) -> None:
    url = f"file://{folder}"
    copied = small_files(url)
    assert {path.name for path in copied.iterdir()} == {"config.json", INDEX_FILE}
    assert copied.is_relative_to(own_cache)
    assert small_files(url) == copied
    (folder / "config.json").write_text('{"hidden_size": 5, "changed": true}')
    again = small_files(url)
    assert again != copied
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()
    assert small_files(folder) == folder


def test_a_cache_that_cannot_be_written_to_is_said_with_what_to_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*/file/remote: Not a directory; set MANTA_CACHE"):
        small_files(f"file://{folder}")


def test_the_small_files_of_sentence_transformers_subfolders_come_along(place: Path | str, folder: Path, request: Any) -> None:
    """Only from their own subfolder; a store may list folders that contain only a marker."""
    wanted = {"1_Pooling/config.json": '{"pooling_mode_lasttoken": true}', "modules.json": "[]"}
    for name, text in {
        **wanted,
        "2_Dense/model.safetensors": "weights",
        "onnx/config.json": "{}",
        "openvino/1_x/config.json": "{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    url = _put_again(place, folder, request)
    copied = small_files(url)
    found = {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}
    if isinstance(url, str):
        assert found == {"config.json", INDEX_FILE, *wanted}
    assert {name: (copied / name).read_text() for name in wanted} == wanted
    with Checkpoint(url) as checkpoint, Checkpoint(folder) as oracle:
        assert checkpoint.tensors.keys() == oracle.tensors.keys()


def _put_again(place: Path | str, folder: Path, request: Any) -> Path | str:
    """The folder's location, with everything that has been written to it since."""
    if str(place).startswith("memory://"):
        fsspec.filesystem("memory").put(f"{folder}/", "/bucket/model/", recursive=True)
    elif str(place).startswith(("s3://", "gs://")):
        return request.getfixturevalue("object_stores")[str(place)[:2]].put(folder, "qwen2-with-modules")
    return place


def test_ranges_are_asked_for_by_keyword_as_s3fs_has_a_version_before_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/model", recursive=True)
    plain = type(store).cat_file

    def cat_file(self: object, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None) -> bytes:
        assert version_id is None
        content: bytes = plain(self, path, start=start, end=end)
        return content

    monkeypatch.setattr(type(store), "cat_file", cat_file)
    with Checkpoint("memory://bucket/model") as checkpoint, Checkpoint(folder) as oracle:
        assert torch.equal(checkpoint.tensors["b.torch.float32"].read(), oracle.tensors["b.torch.float32"].read())


class Unsteady:
    """A store that fails, as stores do, the first times that a range is requested."""

    def __init__(self, content: bytes, *failures: Exception | bytes) -> None:
        self.content, self.failures, self.asked = content, list(failures), 0

    def fetch(self, start: int, stop: int) -> bytes:
        self.asked += 1
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, bytes):
                return failure
            raise failure
        return self.content[start:stop]


CONTENT = bytes(range(256)) * 40


def test_a_temporary_failure_is_retried_with_backoff() -> None:
    store, waits = Unsteady(CONTENT, TimeoutError(), ConnectionResetError(), b"short", RuntimeError("503 Slow Down")), []
    source = RemoteFile("s3://x/y", len(CONTENT), store.fetch, sleep=waits.append)
    place = bytearray(1000)
    source.read([(3000, memoryview(place))])
    assert place == CONTENT[3000:4000]
    assert store.asked == 5
    assert len(waits) == 4
    assert waits[-1] > waits[0]


def test_a_persistent_failure_is_raised_in_the_end() -> None:
    store = Unsteady(CONTENT, *(TimeoutError(str(attempt)) for attempt in range(99)))
    with pytest.raises(TimeoutError):
        RemoteFile("s3://x/y", len(CONTENT), store.fetch, sleep=lambda _: None).read([(0, memoryview(bytearray(10)))])
    assert store.asked == ATTEMPTS


@pytest.mark.parametrize("final", [FileNotFoundError(), PermissionError()])
def test_a_permanent_failure_is_not_retried(final: Exception) -> None:
    store = Unsteady(CONTENT, final)
    with pytest.raises(type(final)):
        RemoteFile("s3://x/y", len(CONTENT), store.fetch).read([(0, memoryview(bytearray(10)))])
    assert store.asked == 1


def test_a_long_range_is_fetched_in_concurrent_pieces() -> None:
    store = Unsteady(CONTENT)
    source = RemoteFile("s3://x/y", len(CONTENT), store.fetch, piece_bytes=100)
    places = [bytearray(950), bytearray(10)]
    source.read([(50, memoryview(places[0])), (7, memoryview(places[1]))])
    source.close()
    assert places == [CONTENT[50:1000], CONTENT[7:17]]
    assert store.asked == 11
    assert source.bytes_fetched == 960


def test_threads_that_read_a_file_at_once_share_what_fetches_it_and_it_goes_with_the_file() -> None:
    source, before = RemoteFile("s3://x/y", len(CONTENT), Unsteady(CONTENT).fetch, piece_bytes=100), fetching()
    places = [bytearray(900) for _ in range(16)]
    together = threading.Barrier(len(places))

    def read(place: bytearray) -> None:
        together.wait(60)
        source.read([(0, memoryview(place))])

    with ThreadPoolExecutor(len(places)) as threads:
        list(threads.map(read, places))
    assert all(place == CONTENT[:900] for place in places)
    assert len(fetching() - before) <= CONCURRENT_RANGES
    source.close()
    assert fetching() <= before


def fetching() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("fetch")}


def test_a_file_that_shrinks_while_it_is_read_raises(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    source = LocalFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 100)
    with pytest.raises(OSError, match="ends at byte 100"):
        source.read([(50, memoryview(bytearray(100)))])
    source.close()


def test_an_object_that_vanishes_names_file_and_tensor(folder: Path) -> None:
    with Checkpoint(f"file://{folder}") as checkpoint:
        stored = checkpoint.tensors["a.torch.float32"]
        for path in folder.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(CheckpointError, match=re.escape(f"file://{folder}/model-")) as caught:
            stored.read()
    assert caught.value.tensor == "a.torch.float32"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nothing/here", "memory://nothing/here cannot be listed"),
        ("nosuch://bucket/x", "nosuch:// is not supported"),
    ],
)
def test_an_unreachable_store_is_named(url: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(url)


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(CheckpointError, match="pip install s3fs"):
        RemoteFolder("s3://bucket/model")


def test_an_index_in_a_store_may_name_its_own_folder_only(folder: Path) -> None:
    index = folder / INDEX_FILE
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(CheckpointError, match="is not a file in this folder"):
        Checkpoint(f"file://{folder}")
    assert not (folder / SINGLE_FILE).exists()


MODEL = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "vocab_size": 60_000, "hidden_size": 1024, "intermediate_size": 8192,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """350 MB of weights."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"model.embed_tokens.weight": (60_000, 1024), "lm_head.weight": (60_000, 1024), "model.norm.weight": (1024,)}
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj.weight": (1024, 1024), "self_attn.q_proj.bias": (1024,),
            "self_attn.k_proj.weight": (256, 1024), "self_attn.k_proj.bias": (256,),
            "self_attn.v_proj.weight": (256, 1024), "self_attn.v_proj.bias": (256,),
            "self_attn.o_proj.weight": (1024, 1024),
            "mlp.gate_proj.weight": (8192, 1024), "mlp.up_proj.weight": (8192, 1024), "mlp.down_proj.weight": (1024, 8192),
            "input_layernorm.weight": (1024,), "post_attention_layernorm.weight": (1024,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    write_checkpoint(folder, {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}, MODEL)
    return folder


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "store"])
def test_a_rank_holds_little_more_than_its_share_while_it_loads(tp: int, scheme: str, large_folder: Path) -> None:
    """A mapped file, or a matrix held twice, would add as much as the share, or 120 MB."""
    place = f"{scheme}{large_folder}" if scheme else large_folder
    for weights, beyond in run_ranks(Topology(tp=tp), peak_beyond_weights, place):
        assert weights > 0.49 * 340 * 2**20 / tp
        assert beyond < min(0.9 * weights, 200 * 2**20)
