from typing import Any

import pytest

from serve.errors import InvalidRequest
from serve.grpc import requests
from serve.grpc.generated import messages_pb2, service_pb2
from serve.limits import Limits
from serve.request import Message, Options

ALL = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "seed": 2**40,
    "n": 2,
    "max_tokens": 7,
    "min_tokens": 1,
    "logprobs": 3,
}


def test_what_was_not_said_is_none() -> None:
    assert requests.parse_options(messages_pb2.Options()) == Options()


def test_every_option_arrives_exactly() -> None:
    message = messages_pb2.Options(**ALL, logit_bias={9: -1.5, 3: 100.0}, stop=["END", "\n"], stop_token_ids=[4], ignore_eos=True)
    assert set(requests.OPTIONAL) == set(ALL)
    assert requests.parse_options(message) == Options(
        **ALL, logit_bias=((3, 100.0), (9, -1.5)), stop=("END", "\n"), stop_token_ids=(4,), ignore_eos=True
    )


def test_zero_is_something_said() -> None:
    options = requests.parse_options(messages_pb2.Options(temperature=0, seed=0, logprobs=0, max_tokens=0))
    assert (options.temperature, options.seed, options.logprobs, options.max_tokens) == (0, 0, 0, 0)


def test_a_conversation_keeps_its_order_roles_and_names() -> None:
    turns = [(messages_pb2.ROLE_SYSTEM, "Be brief."), (messages_pb2.ROLE_USER, "Hi"), (messages_pb2.ROLE_ASSISTANT, "")]
    message = service_pb2.ChatRequest(model="m", messages=[messages_pb2.Message(role=role, content=text) for role, text in turns])
    message.messages[1].name = "Ada"
    request = requests.chat_request(message, request_id="r", deadline_s=5.0)
    assert request.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi", name="Ada"),
        Message(role="assistant", content=""),
    )
    assert (request.request_id, request.model, request.deadline_s) == ("r", "m", 5.0)


@pytest.mark.parametrize(("value", "role"), [(0, "unspecified"), (77, "77")])
def test_a_role_this_server_does_not_know_is_passed_on_to_be_refused_by_name(value: int, role: str) -> None:
    message = service_pb2.ChatRequest(messages=[messages_pb2.Message(role=value, content="x")])
    assert requests.chat_request(message, request_id="r", deadline_s=None).messages[0].role == role


def test_prompts_are_text_or_ids() -> None:
    prompts = [messages_pb2.Prompt(text=""), messages_pb2.Prompt(token_ids=messages_pb2.TokenIds(ids=[5, -1]))]
    request = requests.completion_request(service_pb2.GenerateRequest(prompts=prompts, echo=True), request_id="r", deadline_s=None)
    assert request.prompts == ("", (5, -1))
    assert request.echo


def test_a_prompt_that_is_neither_is_refused() -> None:
    message = service_pb2.GenerateRequest(prompts=[messages_pb2.Prompt(text="a"), messages_pb2.Prompt()])
    with pytest.raises(InvalidRequest, match="prompt 1 has neither") as caught:
        requests.completion_request(message, request_id="r", deadline_s=None)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (service_pb2.ChatRequest(messages=[{}] * 2_049), "messages"),
        (service_pb2.ChatStreamRequest(request={"messages": [{}] * 2_049}), "messages"),
        (service_pb2.ChatRequest(messages=[{}, {"tool_calls": [{}] * 129}]), "messages[1].tool_calls"),
        (service_pb2.ChatRequest(tools=[{}] * 129), "tools"),
        (service_pb2.ChatStreamRequest(so_far=[{}] * 129), "so_far"),
        (service_pb2.GenerateRequest(prompts=[{}] * 129), "prompt"),
        (service_pb2.GenerateStreamRequest(request={"options": {"stop": ["a"] * 5}}), "stop"),
        (service_pb2.GenerateRequest(options={"response_format": {"choices": {"texts": ["a"] * 1_025}}}), "response_format"),
        (service_pb2.EmbedRequest(inputs=[{}] * 2_049), "input"),
        (service_pb2.TokenizeRequest(conversation={"messages": [{}] * 2_049}), "messages"),
    ],
)
def test_more_of_something_than_is_taken_is_refused_before_any_of_it_is_read(message: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        requests.check_counts(message, Limits())
    assert told.value.param == param


def test_as_many_as_are_taken_are_let_through() -> None:
    options = {"stop": ["a"] * 4, "response_format": {"choices": {"texts": ["a"] * 1_024}}}
    requests.check_counts(service_pb2.ChatRequest(messages=[{}] * 2_048, tools=[{}] * 128, options=options), Limits())
