"""A draft model on real ranks: answers do not change, and its cost and benefit are counted."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.request import Request
from engine.run.draft_compatibility import IncompatibleDraftModel, check_draft_model
from engine.run.local_executor import LocalExecutor
from engine.run.process_executor import ProcessExecutor
from engine.run.settings import RunnerConfig
from engine.run.start import start_rank
from engine.run.warm_up import full_step
from parallel.topology import Topology
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.test_speculation import PARAMS, requests
from tests.engine.run.tiny_models import FLOAT32_BLOCK_BYTES, engine_config, float32_config, write_dense


@pytest.fixture(scope="module")
def smaller_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model with half the layers, and with fewer ids than can be sampled."""
    return write_dense(tmp_path_factory.mktemp("draft"), num_hidden_layers=1, vocab_size=280)


@contextmanager
def speculating(folder: Path, draft: Path | None, *, num_blocks: int = 400, **changes: object) -> Iterator[Engine]:
    """An engine in which only the number of steps counts, so that drafting always seems to pay."""
    config = engine_config(**changes) if draft is None else engine_config(speculate="draft", max_draft_tokens=4, **changes)
    runner_config = float32_config(num_blocks=num_blocks, block_tokens=config.block_tokens, draft_model=draft and str(draft))
    engine = Engine(LocalExecutor.open(folder, runner_config=runner_config, engine_config=config), config)
    draft_always(engine)
    yield engine
    engine.executor.close()


def draft_always(engine: Engine) -> None:
    if engine.scheduler._speculator is not None:
        engine.scheduler._speculator._step_line = lambda: (1.0, 0.0)
        engine.scheduler._speculator.note_draft_passes = lambda _passes, _seconds: None


@pytest.mark.parametrize("sampling", PARAMS.values(), ids=PARAMS.keys())
def test_the_model_as_its_own_draft_is_right_and_answers_are_the_same(dense_folder: Path, sampling) -> None:
    with speculating(dense_folder, None) as plain, speculating(dense_folder, dense_folder) as drafting:
        wanted, found = serve(plain, requests(sampling)), serve(drafting, requests(sampling))
        assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
        assert drafting.stats.num_steps < plain.stats.num_steps
        assert drafting.stats.accepted_tokens > 0.95 * drafting.stats.drafted_tokens > 0


@pytest.mark.parametrize("sampling", PARAMS.values(), ids=PARAMS.keys())
def test_another_model_of_fewer_ids_changes_no_answer(dense_folder: Path, smaller_folder: Path, sampling) -> None:
    with speculating(dense_folder, None) as plain, speculating(dense_folder, smaller_folder) as drafting:
        wanted, found = serve(plain, requests(sampling)), serve(drafting, requests(sampling))
        assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
        assert drafting.stats.drafted_tokens > drafting.stats.accepted_tokens


def test_in_the_heaviest_step_the_draft_model_guesses_for_every_sequence(dense_folder: Path) -> None:
    """So that memory is reserved for its logits too."""
    config = engine_config(speculate="draft", max_running=4)
    runner_config = float32_config(num_blocks=20, block_tokens=4, draft_model=str(dense_folder))
    with start_rank(
        checkpoint_folder=dense_folder, topology=Topology(), rank=0, rendezvous=None, runner_config=runner_config, engine_config=config
    ) as runner:
        num_blocks = runner.capacity.num_blocks
        result = runner.run(full_step(max_step_tokens=64, max_running=4, num_blocks=num_blocks, block_tokens=4, num_next_draft=1))
    assert result is not None
    assert [len(sampled.next_draft) for sampled in result.sampled] == [1, 1, 1, 1]


@pytest.mark.parametrize("max_step_tokens", [64, 5])
def test_where_blocks_are_few_and_prompts_are_cut_guesses_are_still_right(dense_folder: Path, max_step_tokens: int) -> None:
    """With preemption and cached prefixes, the draft model has read everything that the model has."""
    asked = requests(PARAMS["greedy"])
    with speculating(dense_folder, None) as plain:
        wanted = serve(plain, asked)
    with speculating(dense_folder, dense_folder, num_blocks=2 * 26, max_step_tokens=max_step_tokens) as drafting:
        for _ in range(2):
            found = serve(drafting, asked)
            assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
        assert drafting.stats.num_preemptions
        assert drafting.stats.prefix_hit_tokens
        assert drafting.stats.accepted_tokens > 0.95 * drafting.stats.drafted_tokens > 0


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(dp=2)], ids=str)
def test_ranks_that_share_the_model_guess_as_one_does(dense_folder: Path, topology: Topology) -> None:
    asked = requests(PARAMS["greedy"])
    with speculating(dense_folder, None) as plain:
        wanted = serve(plain, asked)
    config = engine_config(speculate="draft", max_draft_tokens=4)
    executor = ProcessExecutor(
        checkpoint_folder=dense_folder,
        topology=topology,
        runner_config=float32_config(num_blocks=400, block_tokens=config.block_tokens, draft_model=str(dense_folder)),
        engine_config=config,
    )
    try:
        engine = Engine(executor, config)
        draft_always(engine)
        found = serve(engine, asked)
    finally:
        executor.close()
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert engine.stats.accepted_tokens > 0.95 * engine.stats.drafted_tokens > 0


def test_the_draft_models_kv_cache_is_counted_in_the_budget(dense_folder: Path, smaller_folder: Path) -> None:
    """One layer beside two: a block is 1.5 times as large."""
    bytes_for_30 = 30 * 4 * FLOAT32_BLOCK_BYTES
    config = RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=bytes_for_30, draft_model=str(smaller_folder))
    with start_rank(
        checkpoint_folder=dense_folder,
        topology=Topology(),
        rank=0,
        rendezvous=None,
        runner_config=config,
        engine_config=engine_config(speculate="draft"),
    ) as runner:
        assert runner.capacity.num_blocks == 20


def test_drafting_stops_where_it_does_not_pay(dense_folder: Path, smaller_folder: Path) -> None:
    """The drafts of a random model are accepted only by chance."""
    with speculating(dense_folder, smaller_folder) as engine:
        engine.scheduler._speculator._step_line = lambda: (0.01, 0.004)
        asked = [Request(id="r", prompt=PROMPTS[4], sampling=replace(PARAMS["greedy"], max_tokens=150))]
        assert len(answer(serve(engine, asked)["r", 0])) == 150
        assert 0 < engine.stats.drafted_tokens < 50


def test_a_draft_model_and_its_setting_need_each_other(dense_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no runner\.draft_model"):
        LocalExecutor.open(dense_folder, engine_config=engine_config(speculate="draft"))
    with pytest.raises(ValueError, match="set that to draft"):
        LocalExecutor.open(dense_folder, runner_config=RunnerConfig(draft_model=str(dense_folder)), engine_config=engine_config())


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> Path:
    definition = {"model": {"vocab": vocabulary}, "decoder": {"type": "ByteLevel"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def test_a_draft_model_whose_ids_mean_something_else_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    ours, theirs = (shutil.copytree(dense_folder, tmp_path / name) for name in ("ours", "theirs"))
    write_tokenizer(ours, {"a": 0, "b": 1, "c": 2})
    check_draft_model(ours, write_tokenizer(theirs, {"a": 0, "b": 1}))  # ids that only one of them has are allowed
    with pytest.raises(IncompatibleDraftModel, match=r"1 of 2 ids differ, such as 1, which is b'b' here and b'x' there"):
        check_draft_model(ours, write_tokenizer(theirs, {"a": 0, "x": 1}))
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(IncompatibleDraftModel, match="only one of"):
        check_draft_model(ours, theirs)
