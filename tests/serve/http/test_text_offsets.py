"""Where the tokens of a completion are in its text: also behind characters of several tokens, and behind control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http.completions import TextOffsets
from serve.http.schema import CompletionBody
from serve.request import TextToken

CONTROL, TURN = 0, "<|im_start|>"


def token(raw: bytes) -> TextToken:
    return TextToken(id=1, text=raw.decode("utf-8", "replace"), raw=raw)


def control() -> TextToken:
    return TextToken(id=CONTROL, text=TURN, raw=TURN.encode(), of_text=False)


SMILE = [token("🙂".encode()[:2]), token("🙂".encode()[2:])]


@pytest.mark.parametrize(
    ("prompt", "tokens", "offsets"),
    [
        ("a🙂b", [token(b"a"), *SMILE, token(b"b")], [0, 1, 1, 2]),
        (TURN + "b", [control(), token(b"b")], [0, len(TURN)]),  # a text is echoed as the client wrote it
        ([CONTROL, 1], [control(), token(b"b")], [0, 0]),  # of ids, what is echoed is their text
        ([1, 1], [token(b"a"), SMILE[0]], [0, 1]),
    ],
)
def test_the_answer_begins_where_the_echo_ends(prompt: str | list[int], tokens: list[TextToken], offsets: list[int]) -> None:
    found = TextOffsets(CompletionBody(model="m", prompt=prompt, logprobs=0))
    assert found.of_prompt(tokens) == offsets
    echo = prompt if isinstance(prompt, str) else b"".join(one.raw for one in tokens if one.of_text).decode("utf-8", "replace")
    assert found.of_answer([token(b"x"), *SMILE, control(), token(b"y")]) == [len(echo) + at for at in (0, 1, 1, 2, 2)]


@given(st.lists(st.sampled_from([b"a", b"bc", b"\xf0", b"\x9f\x99", b"\x82", b"\xe2\x82", b"\xac!", b"\xff"])), st.data())
def test_a_token_is_where_the_character_of_its_first_byte_is(raws: list[bytes], data: st.DataObject) -> None:
    tokens, before, expected = [token(raw) for raw in raws], b"", []
    for raw in raws:
        expected.append(len((before + raw[:1]).decode("utf-8", "replace")) - 1)
        before += raw
    offsets = TextOffsets(CompletionBody(model="m", prompt="p", logprobs=0))
    cut = data.draw(st.integers(0, len(tokens)))
    assert offsets.of_answer(tokens[:cut]) + offsets.of_answer(tokens[cut:]) == expected
