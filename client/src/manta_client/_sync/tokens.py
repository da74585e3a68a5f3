# Generated from `_async/tokens.py` by client/unasync.py. Do not edit.
"""`client.tokens`: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence

from .. import convert
from .._generated import service_pb2
from ..answers import Tokenization
from ..requests import ChatMessage, tokenize_request
from .models import Models
from .transport import Transport


class Tokens:
    def __init__(self, transport: Transport, models: Models) -> None:
        self._transport, self._models = transport, models

    def tokenize(
        self,
        input: str | Sequence[ChatMessage],
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        return_tokens: bool = False,
        timeout: float | None = None,
    ) -> Tokenization:
        """The token ids of a text, as a completion's prompt, or of messages, as a chat.

        Args:
            input: a text, or messages as in `chat.create`.
            model: a name from `models.list`; may be left out if the server has only one.
            add_special_tokens: for a text, add the control tokens that the tokenizer puts around it; default: yes.
            return_tokens: also return the text of each token.
            timeout: seconds in all, including retries; default: the client's.

        Raises:
            CallFailed: the server refused the call or failed, or the timeout passed.
        """
        name = model or self._models.only(timeout=timeout)
        request = tokenize_request(model=name, input=input, add_special_tokens=add_special_tokens, return_tokens=return_tokens)
        response = self._transport.call("Tokenize", request, service_pb2.TokenizeResponse, timeout_s=timeout)
        return convert.tokenization(response)

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, timeout: float | None = None) -> str:
        """The text of token ids, without control tokens.

        Raises:
            CallFailed: the server refused the call (there is no such token) or failed, or the timeout passed.
        """
        name = model or self._models.only(timeout=timeout)
        request = service_pb2.DetokenizeRequest(model=name, token_ids=token_ids)
        response = self._transport.call("Detokenize", request, service_pb2.DetokenizeResponse, timeout_s=timeout)
        return response.text
