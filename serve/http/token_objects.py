"""Place 14 of a request over HTTP: tokens with their log-probabilities, in OpenAI's form."""

from collections.abc import Iterable
from typing import Any

from serve.request import TextToken


def token_objects(tokens: Iterable[TextToken]) -> list[dict[str, Any]]:
    """For the tokens that have a log-probability; the first token of a prompt has none."""
    return [_object(token) for token in tokens if token.logprobs is not None]


def _object(token: TextToken) -> dict[str, Any]:
    assert token.logprobs is not None
    return {
        "token": token.text,
        "logprob": token.logprobs.logprob,
        "bytes": list(token.raw),
        "top_logprobs": [{"token": text, "logprob": logprob, "bytes": list(raw)} for _, text, raw, logprob in token.top],
    }
