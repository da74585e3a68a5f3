import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.engine.run.tiny_models import write_dense
from tests.serve.engine_source import engine_service
from tests.serve.in_process import Fronts, fronts, write_tiny
from tests.serve.vocabularies import write_qwen2, write_smol


@pytest.fixture(scope="session")
def smol_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smol(tmp_path_factory.mktemp("smol"))


@pytest.fixture(scope="session")
def qwen2_folder(request: pytest.FixtureRequest) -> Path:
    """Made once and kept in pytest's cache: rebuilding 151,387 merges takes some seconds."""
    folder = request.config.cache.mkdir("qwen2-tokenizer-1")
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            written = write_qwen2(Path(scratch))  # moved from there: two processes may do this at the same time
            for file in sorted(written.iterdir(), key=lambda file: file.name == "config.json"):  # last, it says that all are there
                file.replace(folder / file.name)
    return folder


@pytest.fixture(scope="session")
def smol(smol_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(smol_folder)


@pytest.fixture(scope="session")
def qwen2(qwen2_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(qwen2_folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def both(tiny_folder: Path) -> AsyncIterator[Fronts]:
    """HTTP and gRPC over one real engine."""
    async with fronts(tiny_folder) as running:
        yield running


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which know nothing and obey nobody, under a real tokenizer of 600 tokens."""
    folder = write_smol(tmp_path_factory.mktemp("random"))
    return write_dense(folder, vocab_size=640, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def random_service(random_folder: Path) -> Iterator[Service]:
    with engine_service(random_folder) as (service, _):
        yield service
