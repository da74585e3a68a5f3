"""Small random checkpoints written by transformers, which is also their reference."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model.oracle import Oracle, make_oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """The oracle for a name in `tests.model.oracle.SHAPES`, created when first used."""
    made: dict[str, Oracle] = {}

    def of(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.fixture
def copied(oracle: Callable[[str], Oracle], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an oracle's folder, to damage."""

    def copy(name: str) -> Path:
        for file in oracle(name).folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy
