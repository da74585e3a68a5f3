"""`client.embeddings`: vectors of texts."""

from __future__ import annotations

from collections.abc import Sequence

from .. import convert
from .._generated import service_pb2
from ..answers import EmbeddingList
from ..requests import Prompt, embed_request, key_of
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
        """The vectors of one or several texts.

        Args:
            input: text, token ids, or a list of either.
            model: a name from `models.list`; may be left out if the server has only one.
            dimensions: length to which vectors are cut, and then normalised; default: all dimensions.
            priority: from -1000 to 1000; lower numbers are served first.
            timeout: seconds in all, including retries; default: the client's.
            idempotency_key: requests with the same key are computed once; default: a new one.

        Raises:
            BadRequest: this model gives no embeddings, or an input is too long for it.
            CallFailed: the server refused the call or failed, or the timeout passed.
            ModelNotChosen: no model was named, and the server has several.
        """
        name, key = model or await self._models.only(timeout=timeout), key_of(idempotency_key)
        request = embed_request(model=name, input=input, dimensions=dimensions, priority=priority)
        response = await self._transport.call("Embed", request, service_pb2.EmbedResponse, timeout_s=timeout, key=key)
        return convert.embeddings(response)
