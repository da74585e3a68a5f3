"""A server for tests of programs that use Manta: `FakeServer` gives scripted answers over gRPC and HTTP.

from manta_client import Client
from manta_client.testing import FakeServer

with FakeServer() as server, Client(server.endpoint) as client:
    server.say("Paris.")
    assert client.chat.create(messages=[{"role": "user", "content": "The capital of France?"}]).text == "Paris."
"""

from .script import Answer, Call, Failure, Received
from .server import FakeServer

__all__ = ["Answer", "Call", "Failure", "FakeServer", "Received"]
