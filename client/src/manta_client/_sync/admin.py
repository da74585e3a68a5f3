# Generated from `_async/admin.py` by client/unasync.py. Do not edit.
"""`client.admin`: for whoever runs the server. Where keys are in force, these calls need one with the scope `admin`."""

from .. import operating
from .._generated import admin_pb2
from ..operating import Load, ServerInfo
from .transport import Transport


class Admin:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is: version, models, replicas and their ranks, limits.

        Raises:
            CallFailed: the server refused or failed, or the time passed. So do the others.
        """
        request = admin_pb2.GetServerInfoRequest()
        response = self._transport.call("GetServerInfo", request, admin_pb2.GetServerInfoResponse, timeout_s=timeout)
        return operating.server_info(response)

    def load(self, *, timeout: float | None = None) -> Load:
        """What runs and waits at this moment."""
        response = self._transport.call("GetLoad", admin_pb2.GetLoadRequest(), admin_pb2.GetLoadResponse, timeout_s=timeout)
        return operating.load(response)

    def abort(self, request_id: str, *, timeout: float | None = None) -> int:
        """End a request, whoever sent it; how many choices of it were ended. Its client gets a typed error."""
        request = admin_pb2.AbortRequest(request_id=request_id)
        response = self._transport.call("Abort", request, admin_pb2.AbortResponse, timeout_s=timeout)
        return response.choices

    def drain(self, *, undo: bool = False, timeout: float | None = None) -> int:
        """Have the front take no new requests (or, with ``undo``, take them again); how many are still being answered."""
        response = self._transport.call("Drain", admin_pb2.DrainRequest(undo=undo), admin_pb2.DrainResponse, timeout_s=timeout)
        return response.open_requests
