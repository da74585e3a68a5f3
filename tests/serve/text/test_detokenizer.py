from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve.text.detokenizer import Detokenizer
from serve.text.tokenizer import Tokenizer

any_bytes = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=4).map(str.encode),
    st.sampled_from(["👩‍👩‍👧‍👦".encode(), "🏳️‍🌈".encode(), "é".encode(), b"\xf0\x9f", b"\xff"]),
)


@dataclass
class ByteTokens:
    """Token i stands for the i-th piece."""

    pieces: list[bytes]
    special_ids: frozenset[int] = field(default_factory=frozenset)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:stop] for start, stop in pairwise(edges)]


@given(data=st.lists(any_bytes, max_size=6).map(b"".join), places=st.lists(st.integers(0, 100)))
def test_the_text_does_not_depend_on_where_the_bytes_are_cut(data: bytes, places: list[int]) -> None:
    tokens = ByteTokens(cut(data, places))
    detokenizer = Detokenizer(tokens)
    texts = [detokenizer.push(token) for token in range(len(tokens.pieces))]
    assert "".join(texts) + detokenizer.flush() == data.decode("utf-8", "replace")


@given(text=st.text(max_size=10), places=st.lists(st.integers(0, 100)))
def test_valid_text_never_shows_a_replacement_character(text: str, places: list[int]) -> None:
    text = text.replace("\ufffd", "")
    tokens = ByteTokens(cut(text.encode(), places))
    detokenizer = Detokenizer(tokens)
    for token in range(len(tokens.pieces)):
        assert "\ufffd" not in detokenizer.push(token)
    assert detokenizer.flush() == ""


@given(ids=st.lists(st.integers(0, 151_645), max_size=30))
def test_all_texts_together_are_the_decoding_of_all_tokens(qwen2: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(qwen2)
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == qwen2.decode(ids)


def test_control_tokens_have_no_text_and_do_not_part_a_character() -> None:
    detokenizer = Detokenizer(ByteTokens([b"\xc3", b"<|im_end|>", b"\xa9"], frozenset({1})))
    assert [detokenizer.push(token) for token in range(3)] == ["", "", "é"]


def test_an_unfinished_character_shows_as_one_replacement_at_the_end() -> None:
    detokenizer = Detokenizer(ByteTokens([b"a\xf0\x9f\x99"]))
    assert detokenizer.push(0) == "a"
    assert detokenizer.flush() == "\ufffd"
