import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text.stop_strings import StopStrings

letters = st.text(alphabet="ab\n🙂", max_size=12)
stops = st.lists(st.text(alphabet="ab\n🙂", min_size=1, max_size=4), max_size=4)


def expected(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The slow reference: look at every beginning of the text in turn, for the longest stop string that it ends with."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stop_strings: list[str]) -> tuple[list[str], str | None]:
    watcher = StopStrings(stop_strings)
    shown = []
    for piece in pieces:
        text, stop = watcher.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, watcher.flush()], None


@given(pieces=st.lists(letters, max_size=8), stop_strings=stops)
def test_streamed_equals_unstreamed_however_the_text_is_cut(pieces: list[str], stop_strings: list[str]) -> None:
    shown, stop = streamed(pieces, stop_strings)
    assert ("".join(shown), stop) == expected("".join(pieces), stop_strings)


@given(text=letters, stop_strings=stops)
def test_only_what_could_become_a_stop_string_is_held_back(text: str, stop_strings: list[str]) -> None:
    watcher = StopStrings(stop_strings)
    shown, stop = watcher.push(text)
    if stop is None:
        held = text[len(shown) :]
        assert held == "" or any(stop_string.startswith(held) and stop_string != held for stop_string in stop_strings)
        longer = (text[-length:] for length in range(len(held) + 1, len(text) + 1))
        assert not any(stop_string.startswith(ending) for ending in longer for stop_string in stop_strings)


@pytest.mark.parametrize(
    ("pieces", "stop_strings", "text", "stop"),
    [
        (["Hello", " wor", "ld", "!"], ["world"], "Hello ", "world"),
        (["a\n", "\nb"], ["\n\n"], "a", "\n\n"),
        (["abc"], ["abc", "b"], "a", "b"),
        (["ab", "c"], ["bc", "abc"], "", "abc"),
        (["🙂", "👩‍", "👩"], ["‍👩"], "🙂👩", "‍👩"),
        (["aab"], ["ab"], "a", "ab"),
        (["no end in sig", "ht"], ["sigh!"], "no end in sight", None),
        (["anything"], [], "anything", None),
    ],
)
def test_examples(pieces: list[str], stop_strings: list[str], text: str, stop: str | None) -> None:
    shown, found = streamed(pieces, stop_strings)
    assert ("".join(shown), found) == (text, stop)
