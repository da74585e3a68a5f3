import pytest
from manta_client._generated import messages_pb2, service_pb2
from manta_client.assembly import Assembly, build_chat
from manta_client.errors import BadRequest, StreamBroken


def event(**fields: object) -> service_pb2.ChatStreamResponse:
    return service_pb2.ChatStreamResponse(id="r", **fields)


def delta(index: int, offset: int, text: str, *ids: int) -> service_pb2.ChatStreamResponse:
    return event(delta=messages_pb2.Delta(index=index, offset=offset, text=text, token_ids=ids))


def finish(index: int, num_tokens: int) -> service_pb2.ChatStreamResponse:
    return event(finish=messages_pb2.Finish(index=index, finish_reason=messages_pb2.FINISH_REASON_LENGTH, completion_tokens=num_tokens))


USAGE = event(usage=messages_pb2.Usage(prompt_tokens=1, completion_tokens=3, total_tokens=4))


def assembled(*events: service_pb2.ChatStreamResponse) -> Assembly:
    assembly = Assembly("m", build_chat)
    for one in events:
        assembly.add(one)
    return assembly


def test_interleaved_choices_come_out_whole_and_in_order() -> None:
    answer = assembled(delta(1, 0, "b", 7), delta(0, 0, "a", 5), delta(1, 1, "B", 8), finish(1, 2), finish(0, 1), USAGE).answer()
    assert [(choice.index, choice.text, choice.token_ids, choice.finish_reason) for choice in answer.choices] == [
        (0, "a", (5,), "length"),
        (1, "bB", (7, 8), "length"),
    ]
    assert answer.usage.completion_tokens == 3
    assert answer.raw.choices[1].message.content == "bB"


def test_a_missing_token_is_noticed() -> None:
    with pytest.raises(StreamBroken, match="is at token 1, and the next event is for token 2"):
        assembled(delta(0, 0, "a", 5), delta(0, 2, "c", 6))


def test_a_repeated_token_is_noticed() -> None:
    with pytest.raises(StreamBroken):
        assembled(delta(0, 0, "a", 5), delta(0, 0, "a", 5))


def test_a_finish_that_counts_more_tokens_than_came_is_noticed() -> None:
    with pytest.raises(StreamBroken):
        assembled(delta(0, 0, "a", 5), finish(0, 2))


def test_nothing_comes_after_the_end_of_a_choice() -> None:
    with pytest.raises(StreamBroken, match="and finished"):
        assembled(delta(0, 0, "a", 5), finish(0, 1), delta(0, 1, "b", 6))


@pytest.mark.parametrize("events", [(), (delta(0, 0, "a", 5),), (delta(0, 0, "a", 5), finish(0, 1)), (delta(0, 0, "a", 5), USAGE)])
def test_an_answer_without_its_end_is_no_answer(events) -> None:
    with pytest.raises(StreamBroken, match="ended before its answer did"):
        assembled(*events).answer()


def test_an_error_event_is_raised_as_its_class() -> None:
    with pytest.raises(BadRequest) as caught:
        assembled(event(error=messages_pb2.Error(code=3, reason="INVALID_VALUE", message="too hot", param="temperature")))
    assert (caught.value.reason, caught.value.param, caught.value.request_id) == ("invalid_value", "temperature", "r")
