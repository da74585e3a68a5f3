"""The real engine on real ranks with random weights: the hardest model to constrain by a grammar."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import WorkersLost
from engine.request import Request, SamplingParams
from engine.run.grammar import guides
from engine.run.grammar.llg import LlCompiler
from engine.run.local_executor import LocalExecutor
from engine.run.process_executor import ProcessExecutor
from model.vocabulary import Vocabulary
from parallel.topology import Topology
from tests.engine.run.capturable_ranks import capture_steps, runner_of, use_capturable_parts
from tests.engine.run.test_end_to_end import answer, serve
from tests.engine.run.tiny_models import engine_config, float32_config, write_dense
from tests.serve.vocabularies import write_smol

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ß"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = f"start: %json {json.dumps(PERSON | {'x-guidance': {'whitespace_flexible': False}})}"
GRAMMARS = [JSON, "start: /[a-c]{3,9}(-[0-9]{2}){1,3}/", 'start: "yes" | "no" | "maybe so"', None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and a real tokenizer of 600 tokens."""
    folder = write_smol(tmp_path_factory.mktemp("guided"))
    return write_dense(folder, vocab_size=640)


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    vocabulary = Vocabulary.from_checkpoint(folder)
    assert vocabulary is not None
    return vocabulary


def requests() -> list[Request]:
    sampling = SamplingParams(max_tokens=160, stop_token_ids=(EOS,))
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 30},
        {"top_p": 0.7, "repetition_penalty": 1.2, "min_tokens": 5},
    ]
    return [
        Request(
            id=str(number // 2),
            choice=number % 2,
            prompt=tuple(range(40, 45 + number)),
            sampling=replace(sampling, grammar=grammar, seed=number, **kind),
        )
        for number, (grammar, kind) in enumerate((grammar, kind) for grammar in GRAMMARS for kind in kinds)
    ]


def runner_config(*, num_blocks: int):
    return replace(float32_config(num_blocks=num_blocks, block_tokens=4), num_real_tokens=600)


def open_engine(folder: Path, *, num_blocks: int = 900, recover: bool = False, **changes: object) -> Engine:
    config = engine_config(max_running=40, **changes)

    def start(loss: WorkersLost | None = None) -> LocalExecutor:
        return LocalExecutor.open(folder, runner_config=runner_config(num_blocks=num_blocks), engine_config=config)

    return Engine(start(), config, recover=start if recover else None)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: answer(events) for key, events in serve(open_engine(folder), requests()).items()}


def text_of(vocabulary: Vocabulary, tokens: tuple[int, ...]) -> str:
    assert not vocabulary.special_ids & set(tokens[:-1])
    return b"".join(vocabulary.tokens[token] for token in tokens if token != EOS).decode()


def test_every_answer_that_ends_by_itself_follows_its_grammar(vocabulary, undisturbed):
    num_whole = 0
    for request in requests():
        tokens = undisturbed[request.key]
        if request.sampling.grammar is None or tokens[-1] != EOS:
            assert request.sampling.grammar is None or len(tokens) == request.sampling.max_tokens
            continue
        num_whole += 1
        text = text_of(vocabulary, tokens)
        if request.sampling.grammar == JSON:
            person = json.loads(text)
            assert set(person) == {"name", "age", "tags"}
            assert 0 <= person["age"] <= 150
            assert len(person["name"]) <= 8
        elif "maybe" in request.sampling.grammar:
            assert text in ("yes", "no", "maybe so")
        else:
            assert re.fullmatch("[a-c]{3,9}(-[0-9]{2}){1,3}", text)
    assert num_whole == 12  # all of them: each of these grammars ends before 160 tokens


@pytest.mark.parametrize(
    ("num_blocks", "changes"),
    [(48, {}), (48, {"max_step_tokens": 9, "prefix_cache": False}), (900, {"max_in_flight": 3})],
    ids=["preempted", "preempted-in-pieces", "steps-in-flight"],
)
def test_answers_do_not_depend_on_the_schedule(folder, undisturbed, num_blocks, changes):
    engine = open_engine(folder, num_blocks=num_blocks, **changes)
    assert {key: answer(events) for key, events in serve(engine, requests()).items()} == undisturbed
    assert num_blocks == 900 or engine.stats.num_preemptions > 0


def test_grammar_masks_are_uploaded_for_replayed_steps(folder, monkeypatch):
    """With penalties and biases that are counted on the device; the host edits no row's logits."""
    use_capturable_parts(monkeypatch)
    some = [replace(one, sampling=replace(one.sampling, max_tokens=24)) for one in requests()[::3]]
    wanted = {key: answer(events) for key, events in serve(open_engine(folder), some).items()}
    engine = open_engine(folder)
    graphs = capture_steps(engine.executor, engine_config(max_running=6))
    result_builder, num_decoded = runner_of(engine.executor).result_builder, 0
    sample = result_builder.sample

    def watched(logits_RV, works, allowed):
        nonlocal num_decoded
        num_decoded += all(len(work.tokens) == 1 for work in works)
        return sample(logits_RV, works, allowed)

    monkeypatch.setattr(result_builder, "sample", watched)
    assert {key: answer(events) for key, events in serve(engine, some).items()} == wanted
    assert graphs.num_replays > 20
    assert num_decoded == 0


def test_an_answer_continues_on_another_replica_after_its_committed_tokens(folder, undisturbed):
    for cut in (1, 6):
        resumed = [
            replace(request, committed=undisturbed[request.key][: min(cut, len(undisturbed[request.key]) - 1)]) for request in requests()
        ]
        events = serve(open_engine(folder), resumed)
        for request in resumed:
            tokens = [token for event in events[request.key] for token in event.tokens]
            assert request.committed + tuple(tokens) == undisturbed[request.key]


def test_answers_survive_the_loss_of_the_workers(folder, undisturbed):
    engine, lost = open_engine(folder, recover=True), []
    submit = engine.executor.submit

    def submit_and_lose(plan):
        if plan.step == 6 and not lost:
            lost.append(plan)
            engine.executor.close()
        return submit(plan)

    engine.executor.submit = submit_and_lose  # type: ignore[method-assign]
    assert {key: answer(events) for key, events in serve(engine, requests()).items()} == undisturbed
    assert (len(lost), engine.stats.num_losses) == (1, 1)


def test_a_slow_grammar_delays_only_its_own_request_and_changes_no_answer(folder, undisturbed, monkeypatch):
    """Every compilation waits until requests without a grammar have made progress."""
    monkeypatch.setattr(guides, "COMPILE_WAIT_S", 0.0)
    engine = open_engine(folder)
    steps: list[int] = []
    compile_now = LlCompiler.compile

    def compile_late(self, source):
        while len(steps) < 12:
            guides.time.sleep(0.005)
        return compile_now(self, source)

    monkeypatch.setattr(LlCompiler, "compile", compile_late)
    submit = engine.executor.submit
    engine.executor.submit = lambda plan: (steps.append(plan.step), submit(plan))[1]  # type: ignore[method-assign]
    events = serve(engine, requests())
    assert {key: answer(each) for key, each in events.items()} == undisturbed


def test_an_invalid_grammar_fails_only_its_own_request(folder, undisturbed):
    bad = Request(id="bad", prompt=(5, 6), sampling=SamplingParams(grammar="start: /(/"))
    empty = Request(id="empty", prompt=(5, 6), sampling=SamplingParams(grammar="start: a\na: b\nb: a"))
    events = serve(open_engine(folder), [bad, *requests(), empty])
    for key in (bad.key, empty.key):
        assert (events[key][-1].finish_reason, events[key][-1].error_kind) == ("error", "GrammarFailed")
    assert all(answer(events[request.key]) == undisturbed[request.key] for request in requests())


@pytest.mark.slow
@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(dp=2)], ids=str)
def test_ranks_on_every_axis_give_the_same_answers(folder, undisturbed, topology):
    config = engine_config(max_running=40)
    executor = ProcessExecutor(
        checkpoint_folder=folder, topology=topology, runner_config=runner_config(num_blocks=900), engine_config=config
    )
    try:
        assert {key: answer(events) for key, events in serve(Engine(executor, config), requests()).items()} == undisturbed
    finally:
        executor.close()
