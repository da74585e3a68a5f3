"""Encodes a conversation with the checkpoint's chat template. What clients write never becomes a control token."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.text.escaping import ControlTokens, Escaper, TooManyPrivateCharacters
from serve.text.sandbox import SandboxedTemplate, TemplateRefused
from serve.text.tokenizer import InvalidTokenizer, SpecialToken, Tokenizer, read_settings

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template that Qwen2's instruct models are trained with, for checkpoints whose files lack it."""


class ChatTemplate:
    """The template of a checkpoint. Shared by all requests and threads."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, seconds: float = 2.0, chars: int = 8 * 1024 * 1024) -> None:
        """``seconds`` and ``chars`` are the limits of one rendering.

        Raises:
            InvalidTokenizer: ``source`` is not a template.
        """
        try:
            self._template = SandboxedTemplate(source)
        except ValueError as error:
            raise InvalidTokenizer(str(error)) from error
        self._source, self._tokenizer = source, tokenizer
        self._seconds, self._chars = seconds, chars
        self._control_tokens = ControlTokens(special.text for special in tokenizer.special_tokens)
        self._ids = {special.text: special.id for special in tokenizer.special_tokens}
        self._splitter = _splitter(tokenizer.special_tokens)

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, *, seconds: float = 2.0, chars: int = 8 * 1024 * 1024
    ) -> "ChatTemplate | None":
        """The template in ``folder``. If there is none: Qwen2's if the model ends its turns as in ChatML, else None.

        Raises:
            InvalidTokenizer: the template is damaged; the message names the folder.
        """
        try:
            return cls._from_folder(folder, tokenizer, seconds=seconds, chars=chars)
        except (OSError, ValueError) as error:
            raise InvalidTokenizer(f"the chat template in {folder} cannot be used: {error}") from error

    @classmethod
    def _from_folder(cls, folder: Path, tokenizer: Tokenizer, *, seconds: float, chars: int) -> "ChatTemplate | None":
        source = stored_source(folder)
        if source is None and tokenizer.named.get("eos_token") == "<|im_end|>" and tokenizer.id_of("<|im_start|>") in tokenizer.special_ids:
            source = CHATML
        return None if source is None else cls(source, tokenizer, seconds=seconds, chars=chars)

    @property
    def source(self) -> str:
        """The Jinja text."""
        return self._source

    def encode(self, messages: Sequence[Mapping[str, Any]], prefix: str = "") -> list[int]:
        """The ids of the conversation, up to the beginning of the assistant's next turn, which starts with ``prefix``.

        For messages without control tokens these are the ids of the whole rendered text.

        Args:
            messages: each with ``role`` (trusted, because it is one of the known ones) and what the client wrote.
            prefix: what the assistant's turn already has.

        Raises:
            TemplateRefused: the template cannot be rendered with these messages.
        """
        rendered, escaper = self._render(messages, prefix)
        pieces = self._splitter.split(rendered) if self._ids else [rendered]  # text, control token, text, ..., text
        texts = [escaper.unescape(text) for text in pieces[::2]]
        encoded = iter(self._tokenizer.encode_plain([text for text in texts if text]))
        ids: list[int] = []
        for index, text in enumerate(texts):
            if index:
                ids.append(self._ids[pieces[2 * index - 1]])
            if text:
                ids += self._without_control(next(encoded))
        return ids

    def _render(self, messages: Sequence[Mapping[str, Any]], prefix: str) -> tuple[str, Escaper]:
        from_client = [{key: value for key, value in message.items() if key != "role"} for message in messages]
        try:
            escaper = Escaper(self._control_tokens, [*from_client, prefix], others=self._source)
        except TooManyPrivateCharacters as error:
            raise TemplateRefused(str(error)) from error
        escaped = [{"role": message["role"], **escaper.escape(rest)} for message, rest in zip(messages, from_client, strict=True)]
        values = {"messages": escaped, "tools": None, "documents": None, "add_generation_prompt": True, **self._tokenizer.named}
        return self._template.render(values, seconds=self._seconds, chars=self._chars) + escaper.escape(prefix), escaper

    def _without_control(self, ids: list[int]) -> list[int]:
        """The last defence: in a vocabulary whose merges spell a control token, text could still become one."""
        if not self._tokenizer.special_ids.isdisjoint(ids):
            raise TemplateRefused("the messages hold text that this model's tokenizer cannot tell from a control token")
        return ids


def _splitter(specials: Sequence[SpecialToken]) -> re.Pattern[str]:
    """Splits at control tokens as `tokenizers` does: leftmost, then longest, with the white space that some of them absorb."""
    longest_first = sorted(specials, key=lambda special: -len(special.text))
    names = "|".join(re.escape(special.text) for special in longest_first)
    before = "|".join(re.escape(special.text) for special in longest_first if special.takes_space_before)
    after = "|".join(re.escape(special.text) for special in longest_first if special.takes_space_after)
    head = rf"(?:\s*(?={before}))?" if before else ""
    tail = "".join(rf"(?:(?<={re.escape(special.text)})\s*)?" for special in longest_first if special.takes_space_after) if after else ""
    return re.compile(f"{head}({names}){tail}")


def stored_source(folder: Path) -> str | None:
    """The text of `chat_template.jinja`, or of `chat_template` in tokenizer_config.json (a string, or a list of named ones)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    stored = read_settings(folder).get("chat_template")
    if isinstance(stored, list):
        named = {item["name"]: item["template"] for item in stored if isinstance(item, dict) and {"name", "template"} <= item.keys()}
        stored = named.get("default")
    if stored is not None and not isinstance(stored, str):
        raise InvalidTokenizer("chat_template in tokenizer_config.json is not a string")
    return stored
