import pytest
from manta_client._generated import messages_pb2
from manta_client.requests import KNOWN, chat_request, generate_request, options_message


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


def test_an_option_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError):
        options_message({"temperature": "warm"})  # type: ignore[typeddict-item]


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
