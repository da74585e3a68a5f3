import pytest
from manta_client._generated import messages_pb2
from manta_client.requests import KNOWN, chat_request, generate_request, key_of, options_message


def test_what_is_not_said_is_not_sent() -> None:
    message = options_message({"temperature": None, "top_p": 0.5})
    assert not message.HasField("temperature")
    assert message.top_p == 0.5


def test_a_zero_is_said() -> None:
    message = options_message({"temperature": 0, "logprobs": 0, "seed": 0})
    assert all(message.HasField(name) for name in ("temperature", "logprobs", "seed"))


def test_one_stop_string_is_a_list_of_one() -> None:
    assert list(options_message({"stop": "END"}).stop) == ["END"]
    assert list(options_message({"stop": ["a", "b"]}).stop) == ["a", "b"]


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        options_message({"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", "warm", "temperature must be float, not 'warm'"),
        ("n", "2", "n must be int, not '2'"),
        ("logprobs", True, "logprobs must be int, not True"),
        ("stop", 5, r"stop must be str \| Sequence\[str\], not 5"),
        ("logit_bias", [1, 2], r"logit_bias must be Mapping\[int, float\], not \[1, 2\]"),
        ("response_format", "json", "response_format must be a pydantic model"),
        ("response_format", {"type": "regex"}, 'response_format of type \'regex\' must look like {"type": "regex", "regex"'),
        ("response_format", {"type": "choice", "choice": "ab"}, 'must look like {"type": "choice", "choice": \\["yes", "no"\\]}'),
        ("response_format", {"type": "json_schema", "schema": {}}, "of type 'json_schema' must look like"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_its_name(name: str, value: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        options_message({"max_tokens": 5, name: value})  # type: ignore[misc]


def test_an_option_out_of_range_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="seed is out of range: 1180591620717411303424"):
        options_message({"seed": 2**70})


def test_a_response_format_of_text_asks_for_nothing() -> None:
    assert not options_message({"response_format": {"type": "text"}}).HasField("response_format")


def test_a_schema_whose_type_is_a_list_is_a_schema() -> None:
    assert options_message({"response_format": {"type": ["object", "null"]}}).response_format.json_schema


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", "messages must be a list like .* not 'Hi'"),
        ({"role": "user", "content": "Hi"}, "messages must be a list like"),
        (None, "messages must be a list like .* not None"),
        (["Hi"], "a message must be a dict like .* not 'Hi'"),
        ([{"content": "Hi"}], "role None is unknown; use one of system, user"),
        ([{"role": "user"}], "a message of role 'user' needs content"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "content must be a text, not"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "a tool call must be a ToolCall or"),
    ],
)
def test_malformed_messages_are_refused_with_what_they_should_be(messages: object, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        chat_request(model="m", messages=messages, priority=0, options={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (5, "prompt must be a text, a list of token ids, or a list of these, not 5"),
        (None, "prompt must be"),
        ({"a": 1}, "prompt must be"),
        ([1.5], "prompt must be a text or a list of token ids, not 1.5"),
        ([True], "prompt must be a text or a list of token ids"),
    ],
)
def test_a_malformed_prompt_is_refused_with_what_it_should_be(prompt: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        generate_request(model="m", prompt=prompt, echo=False, priority=0, options={})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", "two\nlines", 4])
def test_an_idempotency_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="idempotency_key must be text in printable ASCII"):
        key_of(key)


def test_every_option_of_the_protocol_can_be_said() -> None:
    assert set(messages_pb2.Options.DESCRIPTOR.fields_by_name) == KNOWN


def test_messages_have_roles_and_content() -> None:
    request = chat_request(model="m", messages=[{"role": "user", "content": "Hi", "name": "Ada"}], priority=0, options={})
    assert request.messages[0] == messages_pb2.Message(role=messages_pb2.ROLE_USER, content="Hi", name="Ada")


@pytest.mark.parametrize("role", ["wizard", "unspecified", ""])
def test_an_unknown_role_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match="use one of system, user, assistant"):
        chat_request(model="m", messages=[{"role": role, "content": "Hi"}], priority=0, options={})


def test_a_message_with_more_than_is_known_is_refused() -> None:
    with pytest.raises(TypeError, match="audio"):
        chat_request(model="m", messages=[{"role": "user", "content": "Hi", "audio": "x"}], priority=0, options={})


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Once", [messages_pb2.Prompt(text="Once")]),
        ([1, 2], [messages_pb2.Prompt(token_ids=messages_pb2.TokenIds(ids=[1, 2]))]),
        (["a", "b"], [messages_pb2.Prompt(text="a"), messages_pb2.Prompt(text="b")]),
        (
            [[1], (2, 3)],
            [
                messages_pb2.Prompt(token_ids=messages_pb2.TokenIds(ids=[1])),
                messages_pb2.Prompt(token_ids=messages_pb2.TokenIds(ids=[2, 3])),
            ],
        ),
        ([], []),
    ],
)
def test_prompts_are_text_or_ids_one_or_many(prompt, wanted) -> None:
    assert list(generate_request(model="m", prompt=prompt, echo=False, priority=0, options={}).prompts) == wanted
