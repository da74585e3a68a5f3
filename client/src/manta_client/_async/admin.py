"""`client.admin`: for operators of the server. If the server has keys, these calls need one with the scope `admin`."""

from .. import admin_info
from .._generated import admin_pb2
from ..admin_info import Load, ServerInfo
from .transport import AsyncTransport


class AsyncAdmin:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, models, replicas and their ranks, and limits of the server.

        Raises:
            CallFailed: the server refused the call or failed, or the timeout passed. The other methods raise it too.
        """
        request = admin_pb2.GetServerInfoRequest()
        response = await self._transport.call("GetServerInfo", request, admin_pb2.GetServerInfoResponse, timeout_s=timeout)
        return admin_info.server_info(response)

    async def load(self, *, timeout: float | None = None) -> Load:
        """What is running and waiting now."""
        response = await self._transport.call("GetLoad", admin_pb2.GetLoadRequest(), admin_pb2.GetLoadResponse, timeout_s=timeout)
        return admin_info.load(response)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> int:
        """End a request of any client, which gets a typed error. Returns how many of its choices were ended."""
        request = admin_pb2.AbortRequest(request_id=request_id)
        response = await self._transport.call("Abort", request, admin_pb2.AbortResponse, timeout_s=timeout)
        return response.choices

    async def drain(self, *, undo: bool = False, timeout: float | None = None) -> int:
        """Make the front refuse new requests (with ``undo``: accept them again). Returns how many are still being answered."""
        response = await self._transport.call("Drain", admin_pb2.DrainRequest(undo=undo), admin_pb2.DrainResponse, timeout_s=timeout)
        return response.open_requests
