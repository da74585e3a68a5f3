"""Simulations with random faults: every client gets what it was promised. `python -m pytest tests/simulation --seeds 10000`.

The message names a failing seed; `--first-seed N --seeds 1` reproduces it exactly.
"""

import functools
import logging
from pathlib import Path

import pytest

from serve.model_facts import ModelFacts
from serve.text.tokenizer import Tokenizer
from tests.serve.vocabularies import write_smol
from tests.simulation.clock import NothingWillHappen, run
from tests.simulation.world import World

SHARDS = 10
"""Number of tests that share the seeds, so that one failing seed does not hide the others."""


@functools.cache
def model(folder: Path) -> tuple[ModelFacts, Tokenizer]:
    tokenizer = Tokenizer.from_folder(folder)
    return ModelFacts.from_checkpoint(folder, name="tiny", tokenizer=tokenizer), tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smol(tmp_path_factory.mktemp("simulated"))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_seed_breaks_a_promise(shard: int, folder: Path, request: pytest.FixtureRequest) -> None:
    logging.disable(logging.ERROR)  # losses are expected here
    first, count = request.config.getoption("--first-seed"), request.config.getoption("--seeds")
    failures = []
    try:
        for seed in range(first + shard, first + count, SHARDS):
            world = World(seed, *model(folder))
            try:
                wrong = run(world.run())
            except NothingWillHappen:
                wrong = ["everything waits for something else"]
            if wrong:
                failures.append(f"seed {seed}: " + "; ".join(wrong) + "\n    " + "\n    ".join(world.log))
    finally:
        logging.disable(logging.NOTSET)
    assert not failures, f"{len(failures)} seeds of {count}; the first:\n" + "\n".join(failures[:5])


def test_the_same_seed_happens_the_same_way_twice(folder: Path) -> None:
    logging.disable(logging.ERROR)
    worlds = [World(7, *model(folder)) for _ in range(2)]
    try:
        for world in worlds:
            run(world.run())
    finally:
        logging.disable(logging.NOTSET)
    assert worlds[0].log == worlds[1].log
    assert worlds[0].chance.random() == worlds[1].chance.random(), "every choice was made in the same order"
