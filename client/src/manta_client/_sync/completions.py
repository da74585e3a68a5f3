# Generated from `_async/completions.py` by client/unasync.py. Do not edit.
"""`client.completions`: completions of prompts, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import convert
from .._generated import service_pb2
from ..answers import Completion
from ..assembly import Assembly, build_completion
from ..requests import Options, Prompt, generate_request, key_of, seeded
from .models import Models
from .stream import Stream
from .transport import StreamingCall, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Completions:
    def __init__(self, transport: Transport, models: Models) -> None:
        self._transport, self._models = transport, models

    def create(
        self,
        *,
        prompt: Prompt | Sequence[Prompt],
        model: str | None = None,
        echo: bool = False,
        priority: int = 0,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Complete one prompt or several; no chat template is applied.

        Args:
            prompt: text, token ids, or a list of either.
            model: a name from `models.list`; may be left out if the server has only one.
            echo: begin the answer with the prompt; with `logprobs`, also return the log-probabilities of the prompt.
            priority: from -1000 to 1000; lower numbers are served first.
            timeout: seconds in all, including retries; default: the client's.
            idempotency_key: requests with the same key are computed once; default: a new one.
            options: temperature, max_tokens, stop, seed, ...; see `Options`.

        Raises:
            CallFailed: the server refused the call or failed, or the timeout passed.
            ModelNotChosen: no model was named, and the server has several.
        """
        name, key = model or self._models.only(timeout=timeout), key_of(idempotency_key)
        request = generate_request(model=name, prompt=prompt, echo=echo, priority=priority, options=seeded(options, key))
        response = self._transport.call("Generate", request, service_pb2.GenerateResponse, timeout_s=timeout, key=key)
        return convert.completion(response)

    def stream(
        self,
        *,
        prompt: Prompt | Sequence[Prompt],
        model: str | None = None,
        echo: bool = False,
        priority: int = 0,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Stream[Completion]:
        """Complete prompts as a stream of `Delta`s. The same arguments and errors as `create`."""

        key = key_of(idempotency_key)

        def begin() -> tuple[StreamingCall, Assembly[Completion]]:
            name = model or self._models.only(timeout=timeout)
            request = generate_request(model=name, prompt=prompt, echo=echo, priority=priority, options=seeded(options, key))
            stream_request = service_pb2.GenerateStreamRequest(request=request)
            call = StreamingCall(self._transport, "GenerateStream", stream_request, timeout_s=timeout, key=key)
            return call, Assembly(name, build_completion)

        return Stream(begin)
