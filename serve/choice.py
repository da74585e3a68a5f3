"""Place 13 of a request: the tokens of one choice become text, up to a stop string or the end."""

from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.plan import TokenEvent, TokenLogprobs
from serve.errors import error_from_event
from serve.request import TextEvent, TextToken
from serve.text.detokenizer import Detokenizer
from serve.text.stop_strings import StopStrings
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """What a choice needs to know of its request."""

    index: int
    prompt_index: int
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings count only in text after this many tokens."""
    eos_ids: frozenset[int] = frozenset()
    """Stop tokens that are the model's own end of sequence, and so not reported as a stop reason."""
    echo: str = ""
    """Text that comes before the answer."""
    prompt: tuple[int, ...] = ()
    """The prompt's tokens, if their log-probabilities are to be reported."""


@dataclass(eq=False, kw_only=True)
class Choice:
    """The state of one choice between its events."""

    settings: ChoiceSettings
    tokenizer: Tokenizer
    num_tokens: int = 0
    """Tokens of the answer so far, including the one that ended it."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache."""
    finished: bool = False
    _pending_tokens: list[TextToken] = field(default_factory=list)
    """Tokens whose text is held back."""

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)
        self._prompt_tokens: tuple[TextToken, ...] = ()
        self._stops = StopStrings(self.settings.stop)
        self._echo = self.settings.echo

    def apply(self, event: TokenEvent) -> TextEvent | None:
        """The text that the event brings, or None if all of it is held back.

        Raises:
            EngineError: the event reports a failure, or does not follow the one before it.
        """
        if event.finish_reason in ("error", "cancelled"):
            raise error_from_event(event)
        if event.offset != self.num_tokens:
            raise EngineError(
                f"choice {self.settings.index} of {event.request_id} got offset {event.offset} after {self.num_tokens} tokens"
            )
        self.num_cached = event.num_cached
        if self.settings.prompt and event.offset == 0:
            self._read_prompt(event)
        text, matched = self._take(event)
        if matched is not None:
            return self._text_event(text, finish_reason="stop", stop_reason=matched)
        if event.finish_reason is None:
            return self._text_event(text) if text or self._prompt_tokens else None
        text, matched = self._flush(text)
        stop_token = None if event.stop_token in self.settings.eos_ids else event.stop_token
        if matched is not None:
            return self._text_event(text, finish_reason="stop", stop_reason=matched)
        return self._text_event(text, finish_reason=event.finish_reason, stop_reason=stop_token)

    def discard_pending(self) -> None:
        """Forget the held-back tokens and the echo: the client has them already."""
        self._pending_tokens, self._echo = [], ""

    def _take(self, event: TokenEvent) -> tuple[str, str | None]:
        """The text up to the first stop string, and that string. Tokens after it are not part of the answer."""
        shown = ""
        for position, token in enumerate(event.tokens):
            self.num_tokens += 1
            is_stop = event.stop_token is not None and position == len(event.tokens) - 1
            self._pending_tokens.append(self._text_token(token, event.logprobs[position] if event.logprobs else None, is_stop=is_stop))
            text, matched = self._check_stops("" if is_stop else self._detokenizer.push(token))
            shown += text
            if matched is not None:
                return shown, matched
        return shown, None

    def _check_stops(self, text: str) -> tuple[str, str | None]:
        return (text, None) if self.num_tokens <= self.settings.min_tokens else self._stops.push(text)

    def _flush(self, shown: str) -> tuple[str, str | None]:
        text, matched = self._check_stops(self._detokenizer.flush())
        return shown + text + ("" if matched else self._stops.flush()), matched

    def _text_event(self, text: str, *, finish_reason: str | None = None, stop_reason: str | int | None = None) -> TextEvent:
        tokens, self._pending_tokens = tuple(self._pending_tokens), []
        text, self._echo = self._echo + text, ""
        prompt, self._prompt_tokens = self._prompt_tokens, ()
        self.finished = finish_reason is not None
        return TextEvent(
            choice=self.settings.index,
            text=text,
            tokens=tokens,
            prompt_tokens=prompt,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _read_prompt(self, event: TokenEvent) -> None:
        pairs = zip(self.settings.prompt, (None, *event.prompt_logprobs), strict=True)
        self._prompt_tokens = tuple(self._text_token(token, one) for token, one in pairs)

    def _text_token(self, token: int, logprobs: TokenLogprobs | None, *, is_stop: bool = False) -> TextToken:
        raw = self.tokenizer.token_bytes(token)
        top = tuple((other, *self._text_and_bytes(other), logprob) for other, logprob in logprobs.top) if logprobs else ()
        of_text = not is_stop and token not in self.tokenizer.special_ids
        return TextToken(id=token, text=raw.decode("utf-8", "replace"), raw=raw, logprobs=logprobs, top=top, of_text=of_text)

    def _text_and_bytes(self, token: int) -> tuple[str, bytes]:
        raw = self.tokenizer.token_bytes(token)
        return raw.decode("utf-8", "replace"), raw
