"""Text from untrusted files in a terminal."""

import pytest

from model.terminal_safe import MAX_CHARACTERS, terminal_safe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B"),
        ("/模型/Qwen2", "/模型/Qwen2"),
        ("\x1b[2Ja\nb", "\\x1b[2Ja\\nb"),
        ("\u202eB7", "\\u202eB7"),
        ("\ud800", "\\ud800"),
        ("a" * 10**6, "a" * MAX_CHARACTERS + "..."),
    ],
)
def test_control_characters_are_escaped_and_long_text_is_shortened(text: str, shown: str) -> None:
    assert terminal_safe(text) == shown
