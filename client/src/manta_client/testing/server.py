"""The fake server."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import grpc

from .._generated import admin_pb2_grpc, service_pb2_grpc
from .grpc_front import FakeAdmin, FakeManta, Gate
from .http_front import FakeHttp
from .script import Answer, Item, Received, Script


class FakeServer:
    """Gives scripted answers over real gRPC and HTTP, on free ports of 127.0.0.1. Needs no model or GPU, and starts within milliseconds.

    Args:
        answer: for requests that have no scripted answer.
        models: names of models, or a mapping from names to context lengths in tokens.
        api_key: if set, calls without it are refused.
    """

    def __init__(
        self, answer: str | Answer = "This is a test.", *, models: Sequence[str] | Mapping[str, int] = ("fake",), api_key: str | None = None
    ) -> None:
        self._script = Script(Answer(answer) if isinstance(answer, str) else answer)
        self._gate = Gate(api_key)
        known = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, 4096)
        self._grpc = grpc.server(ThreadPoolExecutor(16, thread_name_prefix="fake-manta"))
        service_pb2_grpc.add_MantaServiceServicer_to_server(FakeManta(self._script, known, self._gate), self._grpc)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(FakeAdmin(self._script, known, self._gate), self._grpc)
        self._port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http = FakeHttp(self._script, known, self._gate)

    @property
    def endpoint(self) -> str:
        """For `Client` and `AsyncClient`."""
        return f"grpc://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """For OpenAI's clients, as their `base_url`."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def requests(self) -> list[Received]:
        """The received chats, completions and requests for embeddings in order, including those with a scripted failure."""
        return self._script.requests

    def say(self, *items: str | Item) -> "FakeServer":
        """Script the next requests, one item each: a text, an `Answer`, a `Failure`, or a function from the request to these."""
        self._script.add([Answer(item) if isinstance(item, str) else item for item in items])
        return self

    def start(self) -> "FakeServer":
        self._grpc.start()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(grace=None).wait(timeout=5)

    def __enter__(self) -> "FakeServer":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
