"""A stream that breaks anywhere and is asked for again gives the rest: nothing twice, nothing left out."""

import itertools
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve.errors import InvalidRequest
from serve.request import ChatRequest, CompletionRequest, Message, Options, ResponseFormat, SoFar, TextEvent, ToolCallDelta
from serve.service import Service
from tests.serve.tools.scenarios_30 import SCENARIOS


@dataclass
class Received:
    """What a client has of one choice."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: dict[int, ToolCallDelta] = field(default_factory=dict)
    end: tuple[str, Any] | None = None


@dataclass
class Client:
    """Takes in events as messages come over gRPC: what an event brings, then its choice's end, then the usage."""

    choices: dict[int, Received] = field(default_factory=dict)
    usage: Any = None

    def take(self, event: TextEvent, *, only_the_delta: bool = False) -> None:
        choice = self.choices.setdefault(event.choice, Received())
        choice.text += event.text
        choice.tokens += [token.id for token in event.tokens]
        choice.prompt += [token.id for token in event.prompt_tokens]
        choice.logprobs += [round(token.logprobs.logprob, 4) for token in event.tokens if token.logprobs]
        for call in event.tool_calls:
            known = choice.calls.get(call.index)
            choice.calls[call.index] = known.with_more(call.arguments) if known else call
        if event.finish_reason and not only_the_delta:
            choice.end = (event.finish_reason, event.stop_reason)
        if event.usage and not only_the_delta:
            self.usage = replace(event.usage, cached_tokens=0)

    def so_far(self) -> tuple[SoFar, ...]:
        held = sorted(self.choices.items())
        return tuple(SoFar(choice=index, tokens=tuple(one.tokens), finished=one.end is not None) for index, one in held)


IDS = itertools.count()


async def read(service: Service, request: ChatRequest | CompletionRequest) -> list[TextEvent]:
    request = replace(request, request_id=f"resuming-{next(IDS)}")
    stream = service.chat(request) if isinstance(request, ChatRequest) else service.complete(request)
    async with aclosing(stream) as events:
        return [event async for event in events]


async def broken_everywhere(service: Service, request: ChatRequest | CompletionRequest) -> Client:
    """Break before every event, and between the delta and the end of one; the whole is the same each time."""
    events = await read(service, request)
    whole = Client()
    for event in events:
        whole.take(event)
    for cut in range(len(events)):
        for half in (False, True):
            client = Client()
            for event in events[:cut]:
                client.take(event)
            if half:
                client.take(events[cut], only_the_delta=True)
            for event in await read(service, replace(request, so_far=client.so_far())):
                client.take(event)
            assert client == whole, (cut, half)
    return whole


EXPRESSION = ResponseFormat(kind="regex", text="[ab]{3}é(x|yz){2}")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 10},
    "sampled": {"temperature": 1.0, "seed": 3, "max_tokens": 10, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    "with logprobs": {"temperature": 1.0, "seed": 4, "max_tokens": 6, "logprobs": 2},
    "three choices": {"temperature": 1.2, "seed": 5, "max_tokens": 5, "n": 3},
    "with an expression": {
        "temperature": 1.0,
        "seed": 6,
        "max_tokens": 20,
        "format": EXPRESSION,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_a_chat_goes_on_where_it_broke(random_service: Service, options: dict[str, Any]) -> None:
    messages = (Message(role="user", content="Tell me of the sea."),)
    whole = await broken_everywhere(
        random_service, ChatRequest(request_id="r", model="random", messages=messages, options=Options(**options), idempotency_key="k")
    )
    assert len(whole.choices) == options.get("n", 1)


async def test_a_stop_string_that_had_begun_still_ends_it(random_service: Service) -> None:
    asked = ChatRequest(
        request_id="r",
        model="random",
        messages=(Message(role="user", content="Hi"),),
        options=Options(
            temperature=1.0,
            seed=1,
            max_tokens=40,
            stop=("END",),
            format=ResponseFormat(kind="regex", text="[ab]{3}(ENx|EN )[ab]{2}END[ab]{9}"),
        ),
    )
    whole = await broken_everywhere(random_service, asked)
    assert whole.choices[0].end == ("stop", "END")


async def test_held_back_text_at_a_length_comes_once(random_service: Service) -> None:
    """The end lets out what might have become a stop string, with the last token's delta."""
    form = ResponseFormat(kind="regex", text="abE")
    options = Options(temperature=0, max_tokens=40, stop=("END",), format=form)
    asked = ChatRequest(request_id="r", model="random", messages=(Message(role="user", content="Hi"),), options=options)
    whole = await broken_everywhere(random_service, asked)
    assert whole.choices[0].text == "abE"


async def test_several_prompts_and_their_echo(random_service: Service) -> None:
    options = Options(temperature=1.0, seed=9, max_tokens=3, n=2)
    await broken_everywhere(
        random_service, CompletionRequest(request_id="r", model="random", prompts=("Once", (9, 10)), options=options, echo=True)
    )


async def test_log_probabilities_of_the_prompt_come_once(random_service: Service) -> None:
    options = Options(temperature=0, max_tokens=4, logprobs=1)
    request = CompletionRequest(request_id="r", model="random", prompts=((9, 10, 11),), options=options, echo=True)
    whole = await broken_everywhere(random_service, request)
    assert len(whole.choices[0].prompt) == 3


TOOLS = [name for name, case in SCENARIOS.items() if case["tool_choice"] in ("required", "function")][:3]


@pytest.mark.parametrize("name", TOOLS)
async def test_calls_of_tools_go_on_with_the_same_ids(random_service: Service, name: str) -> None:
    case = {key: value for key, value in SCENARIOS[name].items() if key != "form"}
    options = Options(temperature=1.0, seed=3, max_tokens=60, format=SCENARIOS[name].get("form"))
    whole = await broken_everywhere(
        random_service, ChatRequest(request_id="r", model="random", options=options, idempotency_key="k", **case)
    )
    assert whole.choices[0].calls


@pytest.mark.parametrize(
    "so_far",
    [
        (SoFar(choice=1, tokens=(1,)),),
        (SoFar(choice=-1, tokens=()),),
        (SoFar(choice=0, tokens=(1,)), SoFar(choice=0, tokens=(2,))),
        (SoFar(choice=0, tokens=(640,)),),
        (SoFar(choice=0, tokens=(-1,)),),
    ],
    ids=repr,
)
async def test_what_cannot_have_come_is_refused(random_service: Service, so_far: tuple[SoFar, ...]) -> None:
    asked = ChatRequest(request_id="r", model="random", messages=(Message(role="user", content="Hi"),), so_far=so_far)
    with pytest.raises(InvalidRequest) as caught:
        await read(random_service, asked)
    assert caught.value.param == "so_far"


async def test_more_than_the_answer_may_have_is_the_answers_end(random_service: Service) -> None:
    asked = ChatRequest(
        request_id="r",
        model="random",
        messages=(Message(role="user", content="Hi"),),
        options=Options(max_tokens=2),
        so_far=(SoFar(choice=0, tokens=(9, 10, 11)),),
    )
    (event,) = await read(random_service, asked)
    assert (event.finish_reason, event.text, event.tokens) == ("length", "", ())
