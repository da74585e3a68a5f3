"""`client.completions`: prompts gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import convert
from .._generated import service_pb2
from ..answers import Completion
from ..assembly import Assembly, build_completion
from ..requests import Options, Prompt, generate_request, new_key, seeded
from .models import AsyncModels
from .stream import AsyncStream
from .transport import AsyncAsked, AsyncTransport

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncCompletions:
    def __init__(self, transport: AsyncTransport, models: AsyncModels) -> None:
        self._transport, self._models = transport, models

    async def create(
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
        """Go on with one prompt or several; no chat template is applied.

        Args:
            prompt: text, token ids, or a list of either.
            model: what `models.list` names; if not said, the only one there is.
            echo: begin the answer's text with the prompt's; with `logprobs`, tell those of the prompt as well.
            priority: lower is served first.
            timeout: seconds for everything, retries too; if not said, the client's.
            idempotency_key: requests of the same key are answered once; one of its own if not said.
            options: temperature, max_tokens, stop, seed, ...; see `Options`.

        Raises:
            CallFailed: the server refused or failed, or the time passed.
            ModelNotChosen: no model was named and there are several.
        """
        name, key = model or await self._models.only(timeout=timeout), idempotency_key or new_key()
        request = generate_request(model=name, prompt=prompt, echo=echo, priority=priority, options=seeded(options, key))
        response = await self._transport.call("Generate", request, service_pb2.GenerateResponse, timeout_s=timeout, key=key)
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
    ) -> AsyncStream[Completion]:
        """Go on with prompts as a stream of `Delta`s. The same arguments and errors as `create`."""

        key = idempotency_key or new_key()

        async def begin() -> tuple[AsyncAsked, Assembly[Completion]]:
            name = model or await self._models.only(timeout=timeout)
            request = generate_request(model=name, prompt=prompt, echo=echo, priority=priority, options=seeded(options, key))
            stream_request = service_pb2.GenerateStreamRequest(request=request)
            asked = AsyncAsked(self._transport, "GenerateStream", stream_request, timeout_s=timeout, key=key)
            return asked, Assembly(name, build_completion)

        return AsyncStream(begin)
