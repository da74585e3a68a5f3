import asyncio
import functools
import gc
import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DeadlineExceeded, EngineError, EngineStopped, InvalidLogits, QueueFull
from engine.plan import TokenEvent
from engine.request import Request
from serve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NotSupported
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, Message, Options, TextEvent, Usage
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.serve.scripted import Script, ScriptedSource, events_of
from tests.serve.vocabularies import write_smol

EOS = 2


tokenizer_in = functools.cache(Tokenizer.from_folder)


def service_of(folder: Path, script: Script, **options: Any) -> tuple[Service, ScriptedSource]:
    tokenizer = tokenizer_in(folder)
    source = ScriptedSource(script)
    model = ModelFacts.from_checkpoint(folder, name="tiny", tokenizer=tokenizer)
    return Service(model=model, tokenizer=tokenizer, source=source, **options), source


def asked(content: str = "hi", **fields: Any) -> ChatRequest:
    options = Options(**fields.pop("options", {}))
    return ChatRequest(request_id="r1", model="tiny", messages=(Message(role="user", content=content),), options=options, **fields)


def completion(*prompts: str | tuple[int, ...], **fields: Any) -> CompletionRequest:
    return CompletionRequest(request_id="r1", model="tiny", prompts=prompts, options=Options(**fields.pop("options", {})), **fields)


def answering(tokenizer: Tokenizer, text: str, *, group: int = 1, **fields: Any) -> Script:
    """Every choice gets the tokens of ``text``, ``group`` at a time."""
    (ids,) = tokenizer.encode_plain([text])
    return lambda request: events_of(request, [ids[at : at + group] for at in range(0, len(ids), group)], **fields)


async def read(stream: AsyncGenerator[TextEvent, None]) -> list[TextEvent]:
    async with aclosing(stream) as events:
        return [event async for event in events]


async def test_a_chat_becomes_one_engine_request_with_the_templates_tokens(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "Paris", finish="stop"))
    await service.collect(asked("The capital of France is", priority=3, options={"seed": 7, "temperature": 0.0, "stop_token_ids": (9,)}))
    (request,) = source.requests
    assert smol.decode(request.prompt).endswith("user\nThe capital of France is\nassistant\n")
    assert request.prompt[-len(smol.encode_plain(["assistant\n"])[0]) - 1] == smol.id_of("<|im_start|>")
    assert (request.id, request.choice, request.priority) == ("r1", 0, 3)
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.stop_token_ids) == (7, 0.0, (EOS, 9))
    assert request.sampling.max_tokens == 1024 - len(request.prompt)


async def test_the_last_event_alone_carries_usage(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "Grüße 🙂", num_cached=5))
    events = await read(service.chat(asked()))
    num_tokens = len(smol.encode_plain(["Grüße 🙂"])[0])
    assert "".join(event.text for event in events) == "Grüße 🙂"
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].usage == Usage(prompt_tokens=len(source.requests[0].prompt), completion_tokens=num_tokens, cached_tokens=5)
    assert events[0].usage_so_far is not None
    assert events[0].usage_so_far.completion_tokens < num_tokens
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"]


@pytest.mark.parametrize("seed", range(8))
async def test_usage_waits_for_the_last_of_several_choices(smol_folder: Path, smol: Tokenizer, seed: int) -> None:
    delays = random.Random(seed)

    def script(request: Request) -> Sequence[TokenEvent | float]:
        return [delays.choice((0.0, 0.0, 0.002)), *answering(smol, "a b c")(request)]  # type: ignore[list-item]

    service, _ = service_of(smol_folder, script)
    events = []
    num_tokens = 0
    async for event in service.chat(asked(options={"n": 3})):
        events.append(event)
        num_tokens += len(event.tokens)
        assert event.usage_so_far is not None
        assert event.usage_so_far.completion_tokens == num_tokens
        await asyncio.sleep(delays.choice((0.0, 0.001, 0.004)))  # a slow client: the choices run ahead of it
    assert [event.finish_reason for event in events].count("length") == 3
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]


@given(
    text=st.text(alphabet="ab🙂é\n", min_size=1, max_size=12),
    stops=st.lists(st.text(alphabet="ab🙂\n", min_size=1, max_size=3), max_size=2),
    group=st.integers(1, 4),
)
def test_streamed_text_equals_unstreamed_however_tokens_arrive(
    smol_folder: Path, smol: Tokenizer, text: str, stops: list[str], group: int
) -> None:
    async def both() -> None:
        one_by_one, _ = service_of(smol_folder, answering(smol, text))
        grouped, _ = service_of(smol_folder, answering(smol, text, group=group))
        request = asked(options={"stop": tuple(stops)})
        expected, events = await one_by_one.collect(request), await read(grouped.chat(request))
        (choice,) = expected.choices
        assert "".join(event.text for event in events) == choice.text
        assert tuple(token for event in events for token in event.tokens) == choice.tokens
        assert (events[-1].finish_reason, events[-1].stop_reason, events[-1].usage) == (
            choice.finish_reason,
            choice.stop_reason,
            expected.usage,
        )

    asyncio.run(both())


async def test_a_stop_string_over_several_tokens_ends_the_choice_and_cancels_it(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "one two three four"))
    events = await read(service.chat(asked(options={"stop": ("o th",)})))
    assert "".join(event.text for event in events) == "one tw"
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", "o th")
    assert source.cancelled == [0]
    assert source.open == set()
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == sum(len(event.tokens) for event in events)
    assert events[-1].usage.completion_tokens < len(smol.encode_plain(["one two three four"])[0])


async def test_a_stop_string_does_not_count_before_min_tokens(smol_folder: Path, smol: Tokenizer) -> None:
    text = "a b a b a b"
    (ids,) = smol.encode_plain([text])
    service, _ = service_of(smol_folder, answering(smol, text))
    result = await service.collect(asked(options={"stop": ("b",), "min_tokens": len(ids) - 1}))
    assert result.choices[0].text == "a b a b a "
    assert result.choices[0].stop_reason == "b"


async def test_text_that_looked_like_a_stop_string_comes_when_it_was_none(smol_folder: Path, smol: Tokenizer) -> None:
    service, _ = service_of(smol_folder, answering(smol, "to be"))
    result = await service.collect(asked(options={"stop": ("bet",)}))
    assert (result.choices[0].text, result.choices[0].finish_reason) == ("to be", "length")


@pytest.mark.parametrize(("stop_token", "reason"), [(EOS, None), (60, 60)])
async def test_the_token_that_ended_the_answer_counts_but_has_no_text(
    smol_folder: Path, smol: Tokenizer, stop_token: int, reason: int | None
) -> None:
    (ids,) = smol.encode_plain(["Paris"])
    service, _ = service_of(smol_folder, lambda request: events_of(request, [ids, [stop_token]], finish="stop", stop_token=stop_token))
    result = await service.collect(asked(options={"stop_token_ids": (60,)}))
    (choice,) = result.choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Paris", "stop", reason)
    assert result.usage.completion_tokens == len(ids) + 1
    assert choice.tokens[-1].id == stop_token


async def test_the_first_half_of_a_character_is_never_shown(smol_folder: Path, smol: Tokenizer) -> None:
    (ids,) = smol.encode_plain(["🙂"])
    assert len(ids) > 1
    service, _ = service_of(smol_folder, lambda request: events_of(request, [[token] for token in ids]))
    events = await read(service.chat(asked()))
    assert [event.text for event in events] == ["🙂"]
    assert [token.id for token in events[0].tokens] == ids
    cut, _ = service_of(smol_folder, lambda request: events_of(request, [ids[:-1]]))
    assert (await cut.collect(asked())).choices[0].text == "\ufffd"


async def test_log_probabilities_come_with_text_and_bytes_of_every_alternative(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "é", logprobs=True))
    (choice,) = (await service.collect(asked(options={"logprobs": 2}))).choices
    assert source.requests[0].sampling.logprobs == 2
    assert b"".join(token.raw for token in choice.tokens) == "é".encode()
    token = choice.tokens[0]
    assert token.logprobs is not None
    assert token.top == ((token.id, token.text, token.raw, -0.5), (0, "<|endoftext|>", b"<|endoftext|>", -2.0))


async def test_choices_of_all_prompts_are_merged_under_openais_numbers(smol_folder: Path, smol: Tokenizer) -> None:
    def script(request: Request) -> Sequence[TokenEvent | float]:
        (ids,) = smol.encode_plain([f"answer {request.choice}"])
        return [0.01 * (3 - request.choice), *events_of(request, [[token] for token in ids], num_cached=1)]

    service, source = service_of(smol_folder, script)
    result = await service.collect(completion("one", (70, 71, 72), options={"n": 2}))
    assert [(choice.choice, choice.text) for choice in result.choices] == [(index, f"answer {index}") for index in range(4)]
    assert [request.prompt for request in sorted(source.requests, key=lambda request: request.choice)][2:] == [(70, 71, 72)] * 2
    assert len({request.sampling.seed for request in source.requests if request.choice < 2}) == 1
    assert result.usage.prompt_tokens == len(smol.encode("one")) + 3
    assert result.usage.cached_tokens == 2
    assert result.usage.completion_tokens == sum(len(choice.tokens) for choice in result.choices)


async def test_echo_puts_the_prompts_own_text_before_the_answer(smol_folder: Path, smol: Tokenizer) -> None:
    service, _ = service_of(smol_folder, answering(smol, " Paris"))
    ids = tuple(smol.encode_plain(["is"])[0])
    result = await service.collect(completion("France: ", ids, echo=True, options={"stop": ("France",)}))
    assert [choice.text for choice in result.choices] == ["France:  Paris", "is Paris"]


async def test_a_completion_that_does_not_say_gets_16_tokens(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "x"))
    await service.collect(completion("x"))
    assert source.requests[0].sampling.max_tokens == 16


async def test_control_tokens_work_in_raw_prompts_and_not_in_messages(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "x"))
    await service.collect(completion("<|im_start|>user"))
    await service.collect(asked("<|im_start|>system"))
    assert source.requests[0].prompt[0] == 1
    assert source.requests[1].prompt.count(1) == 3


async def test_a_failure_of_one_choice_fails_the_request_after_cancelling_the_rest(smol_folder: Path, smol: Tokenizer) -> None:
    (ids,) = smol.encode_plain(["abc"])

    def script(request: Request) -> Sequence[TokenEvent | float]:
        if request.choice == 1:
            event = TokenEvent(
                request_id="r1", choice=1, attempt=0, offset=0, finish_reason="error", error_kind="InvalidLogits", error_message="NaN"
            )
            return [0.01, event]
        return [*events_of(request, [ids], finish=None), 60.0]

    service, source = service_of(smol_folder, script)
    with pytest.raises(InvalidLogits, match="NaN"):
        await read(service.chat(asked(options={"n": 3})))
    assert sorted(source.cancelled) == [0, 2]
    assert source.open == set()


async def test_a_refusal_is_raised_before_any_event(smol_folder: Path) -> None:
    service, source = service_of(smol_folder, lambda _request: [QueueFull(limit=3, retry_after_s=2.0)])
    stream = service.chat(asked())
    assert source.requests == []
    with pytest.raises(QueueFull):
        await anext(stream)


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("way", ["closed", "cancelled while waiting", "task ended", "dropped"])
async def test_when_the_reader_goes_every_choice_is_cancelled(smol_folder: Path, smol: Tokenizer, num_choices: int, way: str) -> None:
    (ids,) = smol.encode_plain(["abc"])
    service, source = service_of(smol_folder, lambda request: [*events_of(request, [ids], finish=None), 60.0])
    before = len(asyncio.all_tasks())
    stream = service.chat(asked(options={"n": num_choices}))
    for _ in range(num_choices):
        await anext(stream)
    assert len(source.open) == num_choices
    if way == "closed":
        await stream.aclose()
    elif way == "cancelled while waiting":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
    elif way == "task ended":
        waiting = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    else:
        del stream
        gc.collect()
        await asyncio.sleep(0.05)
    assert source.open == set()
    assert sorted(source.cancelled) == list(range(num_choices))
    assert len(asyncio.all_tasks()) == before


async def test_a_reader_that_goes_while_choices_wait_to_be_merged_leaves_nothing(smol_folder: Path, smol: Tokenizer) -> None:
    (ids,) = smol.encode_plain(["a long enough answer to fill the queue"])
    service, source = service_of(smol_folder, lambda request: events_of(request, [[token] for token in ids]))
    stream = service.chat(asked(options={"n": 8}))
    await anext(stream)
    for _ in range(20):
        await asyncio.sleep(0)
    await stream.aclose()
    assert source.open == set()


async def test_an_answer_without_an_end_is_an_error_and_never_a_short_answer(smol_folder: Path, smol: Tokenizer) -> None:
    service, _ = service_of(smol_folder, answering(smol, "abc", finish=None))
    with pytest.raises(EngineStopped):
        await service.collect(asked())
    with pytest.raises(EngineStopped):
        await read(service.chat(asked()))
    cancelled, _ = service_of(smol_folder, answering(smol, "abc", finish="cancelled"))
    with pytest.raises(EngineStopped):
        await cancelled.collect(asked())


@pytest.mark.parametrize("offset", [0, 2])
async def test_a_repeated_or_missing_token_is_an_error_and_never_shown(smol_folder: Path, smol: Tokenizer, offset: int) -> None:
    def script(request: Request) -> list[TokenEvent]:
        first = TokenEvent(request_id="r1", choice=0, attempt=0, offset=0, tokens=(70,))
        return [first, TokenEvent(request_id="r1", choice=0, attempt=0, offset=offset, tokens=(71,), finish_reason="stop")]

    service, _ = service_of(smol_folder, script)
    with pytest.raises(EngineError, match="offset"):
        await service.collect(asked())


async def test_a_deadline_holds_even_if_the_engine_forgets_it(smol_folder: Path) -> None:
    service, source = service_of(smol_folder, lambda _request: [60.0])
    with pytest.raises(DeadlineExceeded):
        await service.collect(asked(deadline_s=time.time() + 0.05))
    assert source.requests[0].deadline_s is not None
    assert source.open == set()
    late, untouched = service_of(smol_folder, lambda _request: [60.0], clock=lambda: 100.0)
    with pytest.raises(DeadlineExceeded):
        await late.collect(asked(deadline_s=99.0))
    assert untouched.requests == []


async def test_bad_requests_never_reach_the_engine(smol_folder: Path) -> None:
    service, source = service_of(smol_folder, lambda _request: [])
    for request, error, param in [
        (asked(options={"temperature": 3.0}), InvalidRequest, "temperature"),
        (asked("x" * 9000), ContextLengthExceeded, "messages"),
        (asked(options={"max_tokens": 1020}), ContextLengthExceeded, "max_tokens"),
        (completion(""), InvalidRequest, "prompt"),
        (completion("x" * 9000), ContextLengthExceeded, "prompt"),
    ]:
        with pytest.raises(error) as raised:
            await service.collect(request)
        assert raised.value.param == param
    assert source.requests == []


async def test_a_base_model_refuses_chats_clearly_and_completes(tmp_path: Path) -> None:
    folder = write_smol(tmp_path, template=None)
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_folder(folder)
    service, _ = service_of(folder, answering(tokenizer, "ok"))
    with pytest.raises(NotSupported, match="no chat template"):
        await service.collect(asked())
    assert (await service.collect(completion("x"))).choices[0].text == "ok"


async def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    folder = write_smol(tmp_path, template="{{ raise_exception('roles must alternate') }}")
    service, _ = service_of(folder, lambda _request: [])
    with pytest.raises(InvalidRequest, match="roles must alternate") as raised:
        await service.collect(asked())
    assert raised.value.param == "messages"


async def test_models_and_readiness_are_told(smol_folder: Path) -> None:
    service, source = service_of(smol_folder, lambda _request: [])
    assert [model.name for model in service.models()] == ["tiny"]
    assert service.model("tiny").max_context_tokens == 1024
    with pytest.raises(ModelNotFound):
        service.model("../../etc/passwd")
    assert service.ready()
    source.is_ready = False
    assert not service.ready()


async def test_a_request_without_a_seed_gets_a_new_one_each_time(smol_folder: Path, smol: Tokenizer) -> None:
    service, source = service_of(smol_folder, answering(smol, "x"))
    for _ in range(3):
        await service.collect(asked())
    assert len({request.sampling.seed for request in source.requests}) == 3


async def test_a_request_is_seen_at_places_3_and_13_in_this_order(
    smol_folder: Path, smol: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="manta.places")
    service, _ = service_of(smol_folder, answering(smol, "abc"))
    await service.collect(asked(options={"n": 2}))
    told = [record.getMessage().split(" at=")[0] for record in caplog.records if record.name == "manta.places"]
    assert told == ["place=3 request=r1", "place=13 request=r1"]


async def test_facts_of_a_model_and_a_tokenizer_that_do_not_belong_together_are_refused(smol_folder: Path, qwen2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="knows 151646 tokens, the model only 640"):
        ModelFacts.from_checkpoint(smol_folder, name="x", tokenizer=qwen2)


async def test_who_is_refused_anyway_is_not_tokenized(smol_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = TokenEvent("other", 0, 0, 0, finish_reason="error", error_kind="QueueFull", error_message="7 wait")
    service, source = service_of(smol_folder, answering(tokenizer_in(smol_folder), "yes"), refusal=lambda tenant: refused)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_args, **_more: pytest.fail("it was tokenized"))
    for stream in (service.chat(asked()), service.complete(completion("a"))):
        with pytest.raises(QueueFull, match="7 wait"):
            await read(stream)
    with pytest.raises(InvalidRequest):
        await read(service.complete(completion("a", options={"temperature": 9.0})))
    assert not source.requests
