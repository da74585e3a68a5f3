"""`client.embeddings`: texts as vectors."""

from __future__ import annotations

from collections.abc import Sequence

from .. import convert
from .._generated import service_pb2
from ..answers import EmbeddingList
from ..requests import Prompt, embed_request, new_key
from .models import AsyncModels
from .transport import AsyncTransport


class AsyncEmbeddings:
    def __init__(self, transport: AsyncTransport, models: AsyncModels) -> None:
        self._transport, self._models = transport, models

    async def create(
        self,
        *,
        input: Prompt | Sequence[Prompt],
        model: str | None = None,
        dimensions: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> EmbeddingList:
        """A vector of one text or of each of several.

        Args:
            input: text, token ids, or a list of either.
            model: what `models.list` names; if not said, the only one there is.
            dimensions: of each vector the first so many numbers, scaled to length 1 again; all if not said.
            priority: lower is served first.
            timeout: seconds for everything, retries too; if not said, the client's.
            idempotency_key: requests of the same key are answered once; one of its own if not said.

        Raises:
            BadRequest: this model gives no embeddings, or an input is too long for it.
            CallFailed: the server refused or failed, or the time passed.
            ModelNotChosen: no model was named and there are several.
        """
        name, key = model or await self._models.only(timeout=timeout), idempotency_key or new_key()
        request = embed_request(model=name, input=input, dimensions=dimensions, priority=priority)
        response = await self._transport.call("Embed", request, service_pb2.EmbedResponse, timeout_s=timeout, key=key)
        return convert.embeddings(response)
