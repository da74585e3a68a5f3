"""`client.models`: the models of the server."""

from .. import convert
from .._generated import service_pb2
from ..answers import Model
from ..errors import ModelNotChosen
from .transport import AsyncTransport


class AsyncModels:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._only: str | None = None

    async def list(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """All models."""
        request = service_pb2.ListModelsRequest()
        response = await self._transport.call("ListModels", request, service_pb2.ListModelsResponse, timeout_s=timeout)
        return tuple(convert.model(model) for model in response.models)

    async def get(self, model: str, *, timeout: float | None = None) -> Model:
        """One model.

        Raises:
            NotFound: there is no model of that name.
        """
        request = service_pb2.GetModelRequest(model=model)
        response = await self._transport.call("GetModel", request, service_pb2.GetModelResponse, timeout_s=timeout)
        return convert.model(response.model)

    async def only(self, *, timeout: float | None = None) -> str:
        """The id of the server's only model; requested once.

        Raises:
            ModelNotChosen: there is not exactly one.
        """
        if self._only is None:
            names = [model.id for model in await self.list(timeout=timeout)]
            if len(names) != 1:
                raise ModelNotChosen(f"name a model (model=...): this server has {', '.join(names) or 'none'}")
            self._only = names[0]
        return self._only
