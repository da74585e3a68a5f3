"""Talk to a Manta inference server over gRPC.

from manta_client import Client

with Client("grpc://127.0.0.1:9000") as client:
    print(client.chat.create(messages=[{"role": "user", "content": "Why is the sky blue?"}]).text)
"""

from ._async.client import AsyncClient
from ._async.stream import AsyncStream
from ._sync.client import Client
from ._sync.stream import Stream
from .admin_info import Load, Rank, Replica, ReplicaLoad, ServerInfo
from .answers import (
    ChatCompletion,
    Choice,
    Completion,
    Delta,
    Embedding,
    EmbeddingList,
    Model,
    Tokenization,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from .errors import (
    AuthenticationFailed,
    BadRequest,
    CallFailed,
    Cancelled,
    DeadlineExceeded,
    InsecureKey,
    InvalidEndpoint,
    InvalidKey,
    MantaError,
    ModelNotChosen,
    NotFound,
    Overloaded,
    PermissionDenied,
    ServerError,
    StreamBroken,
    Unavailable,
)
from .requests import Options

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AuthenticationFailed",
    "BadRequest",
    "CallFailed",
    "Cancelled",
    "ChatCompletion",
    "Choice",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "Embedding",
    "EmbeddingList",
    "InsecureKey",
    "InvalidEndpoint",
    "InvalidKey",
    "Load",
    "MantaError",
    "Model",
    "ModelNotChosen",
    "NotFound",
    "Options",
    "Overloaded",
    "PermissionDenied",
    "Rank",
    "Replica",
    "ReplicaLoad",
    "ServerError",
    "ServerInfo",
    "Stream",
    "StreamBroken",
    "TokenLogprob",
    "Tokenization",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Unavailable",
    "Usage",
]
