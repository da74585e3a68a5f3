"""Streams that break are gone on with, and calls that are sent again are the same request: against a scripted server."""

import grpc
import pytest
from manta_client import BadRequest, StreamBroken, Unavailable
from manta_client._generated import messages_pb2

from .conftest import USAGE, Refusal, Script, whole_answer
from .test_client import MESSAGES, TEXT, Twin, client, twin

__all__ = ["client", "twin"]
LOST = {"error": messages_pb2.Error(code=14, reason="UNAVAILABLE", message="lost")}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta_client.retry.RetryPolicy.first_pause_s", 0.01)
    monkeypatch.setattr("manta_client.retry.Attempts._own_pause_s", lambda self: 0.01)


@pytest.mark.parametrize("cut", range(6))
async def test_wherever_it_breaks_the_rest_is_asked_for_and_the_answer_is_whole(twin: Twin, client, script: Script, cut: int) -> None:
    all_of_it = [*whole_answer(), USAGE]
    script.events, script.next_events = [*all_of_it[:cut], LOST], all_of_it[cut:]
    stream = client.chat.stream(messages=MESSAGES)
    deltas = await twin.list(stream)
    assert ("".join(delta.text for delta in deltas), stream.text) == (TEXT, TEXT)
    assert [delta.offset for delta in deltas] == [0, 1, 2, 3, 4]
    first, second = script.requests("ChatStream")
    assert first.request == second.request
    assert not first.so_far
    if cut:
        had = messages_pb2.SoFar(index=0, token_ids=range(min(cut, 4)), finished=cut == 5)
        assert list(second.so_far) == [had]


async def test_a_call_that_ends_well_without_the_answers_end_is_gone_on_with(twin: Twin, client, script: Script) -> None:
    script.events, script.next_events = whole_answer()[:2], [*whole_answer()[2:], USAGE]
    assert (await twin.get(client.chat.stream(messages=MESSAGES).final)).text == TEXT


async def test_a_break_after_everything_has_come_is_none(twin: Twin, client, script: Script) -> None:
    script.events = [*whole_answer(), USAGE, LOST]
    assert (await twin.get(client.chat.stream(messages=MESSAGES).final)).text == TEXT
    assert len(script.requests("ChatStream")) == 1


async def test_several_breaks_and_refusals_between_them(twin: Twin, client, script: Script) -> None:
    """What comes between breaks shows that it goes on: the tries are counted anew."""
    events = [*whole_answer(), USAGE]
    plays = [[event, LOST] for event in events[:5]] + [[LOST], [events[5]]]

    def stream(response, context):
        yield from (response(id="chatcmpl-7", **event) for event in plays.pop(0))

    script._stream = stream
    assert (await twin.get(client.chat.stream(messages=MESSAGES).final)).text == TEXT


async def test_tokens_that_come_twice_are_no_part_of_an_answer(twin: Twin, client, script: Script) -> None:
    script.events, script.next_events = [*whole_answer()[:3], LOST], [*whole_answer(), USAGE]
    with pytest.raises(StreamBroken, match="is at token 3"):
        await twin.list(client.chat.stream(messages=MESSAGES))


async def test_what_cannot_be_gone_on_with_fails_as_the_server_says(twin: Twin, client, script: Script) -> None:
    script.events = [*whole_answer()[:3], {"error": messages_pb2.Error(code=3, reason="INVALID_GRAMMAR", message="no")}]
    stream = client.chat.stream(messages=MESSAGES)
    with pytest.raises(BadRequest, match="no"):
        await twin.list(stream)
    assert stream.text == "The sky is"


async def test_a_server_that_does_not_come_back_is_given_up(twin: Twin, client, script: Script) -> None:
    script.events, script.next_events = [*whole_answer()[:1], LOST], [LOST]
    with pytest.raises(Unavailable, match="lost"):
        await twin.list(client.chat.stream(messages=MESSAGES))
    assert len(script.requests("ChatStream")) == 1 + 8


async def test_closing_while_it_is_gone_on_with_ends_it(twin: Twin, client, script: Script) -> None:
    script.events, script.next_events = [*whole_answer()[:1], LOST], [*whole_answer()[1:], USAGE]
    stream = client.chat.stream(messages=MESSAGES)
    await twin.next(stream)
    await twin.get(stream.close)
    assert await twin.list(stream) == []


@pytest.mark.parametrize("method", ["create", "stream"])
async def test_all_tries_have_one_key_and_one_seed_and_the_next_request_others(twin: Twin, client, script: Script, method: str) -> None:
    async def ask(**more) -> None:
        if method == "create":
            await twin.get(client.chat.create, messages=MESSAGES, **more)
        else:
            await twin.get(client.chat.stream(messages=MESSAGES, **more).final)

    script.refusals = [Refusal(grpc.StatusCode.UNAVAILABLE, "one"), Refusal(grpc.StatusCode.UNAVAILABLE, "two")]
    await ask()
    await ask()
    asked = [(metadata["idempotency-key"], getattr(request, "request", request)) for name, request, metadata in script.calls[1:]]
    keys, seeds = [key for key, _ in asked], [request.options.seed for _, request in asked]
    assert (len(keys), len(set(keys)), len(set(seeds))) == (4, 2, 2)
    assert keys[0] == keys[1] == keys[2] != keys[3]
    await ask(idempotency_key="mine")
    await ask(idempotency_key="mine")
    (first, second) = [getattr(request, "request", request) for _, request, _ in script.calls[-2:]]
    assert script.calls[-1][2]["idempotency-key"] == "mine"
    assert first == second
    await ask(seed=5)
    assert getattr(script.calls[-1][1], "request", script.calls[-1][1]).options.seed == 5


async def test_a_proxy_that_lost_its_front_is_tried_again_and_a_fault_of_manta_is_not(twin: Twin, client, script: Script) -> None:
    class Lost(Refusal):
        def tell(self, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.INTERNAL, "The actor died unexpectedly")

    script.refusals = [Lost(grpc.StatusCode.INTERNAL)]
    assert (await twin.get(client.chat.create, messages=MESSAGES)).text == TEXT
    script.refusals = [Refusal(grpc.StatusCode.INTERNAL), Refusal(grpc.StatusCode.INTERNAL)]
    with pytest.raises(Exception, match="no"):
        await twin.get(client.chat.create, messages=MESSAGES)
    assert len(script.refusals) == 1
