"""Places 4, 5 and 8 of a request: the messages between processes.

A message is two bytes (version, kind) and a msgpack body, which msgspec validates against the dataclass of that kind.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.errors import ChannelError
from engine.executor import Capacity
from engine.load_stats import LoadStats
from engine.plan import StepPlan, StepResult, TokenEvent
from engine.request import Request

VERSION = 2
"""Raised when a message changes."""


@dataclass(frozen=True, slots=True)
class RankProgress:
    """A rank is starting; see `engine.run.start.StartProgress`."""

    rank: int
    phase: str
    done: int
    total: int
    read: LoadStats | None = None


@dataclass(frozen=True, slots=True)
class RankReady:
    rank: int
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A rank raised an exception; it sends nothing more."""

    rank: int
    host: str
    step: int | None
    message: str
    traceback: str
    was_terminated: bool = False
    """Whether it was ended by SIGTERM or Ctrl-C, so that no request is to blame."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Asks a rank to leave its loop and end."""


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request
    left_s: float | None = None
    """Seconds until its deadline when it was sent. Not a time, because the clocks of hosts differ."""


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    choice: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Ping:
    """A front is alive. Answered with `Pong`."""


@dataclass(frozen=True, slots=True)
class Pong:
    """A replica is alive."""

    ready: bool
    num_running: int
    num_waiting: int
    prefill_tokens: int = 0
    """Prompt and committed tokens that are not computed yet."""
    step_base_s: float = 0.0
    step_token_s: float = 0.0
    """See `engine.step_cost.StepCost`."""
    ranks_lost: bool = False
    """Whether its ranks must be restarted before it can make tokens."""
    lost_host: str | None = None
    """The unreachable host, if that is why its ranks were lost."""


@dataclass(frozen=True, slots=True)
class SubscribeBlocks:
    """A front asks for a snapshot of the prefix cache's blocks and for later changes; see `BlockUpdate`."""

    wanted: bool


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Blocks in a replica's prefix cache: a snapshot or changes. The keys are shortened content keys, concatenated."""

    number: int
    """Changes are numbered consecutively. A snapshot has the number of the last changes that it includes."""
    whole: bool
    """True: a snapshot, ``stored`` has all blocks. False: changes since the update before."""
    stored: bytes
    evicted: bytes


@dataclass(frozen=True, slots=True)
class StepEvents:
    """The output of one step for one front: events, and for streams that only go on decoding one token each, as columns of int64."""

    events: tuple[TokenEvent, ...]
    streams: bytes = b""
    """Stream numbers that the front chose (`Request.tag`)."""
    offsets: bytes = b""
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class FrontDropped:
    """The replica has dropped this front and cancelled all its requests; those that still matter must be submitted again."""


RankMessage = StepPlan | StepResult | RankProgress | RankReady | RankFailed | Stop
FrontMessage = Submit | Cancel | Ping | Pong | StepEvents | FrontDropped | SubscribeBlocks | BlockUpdate
Message = RankMessage | FrontMessage
KINDS: dict[int, type] = {
    1: StepPlan,
    2: StepResult,
    3: RankProgress,
    4: RankReady,
    5: RankFailed,
    6: Stop,
    20: Submit,
    21: Cancel,
    22: Ping,
    23: Pong,
    24: StepEvents,
    25: FrontDropped,
    28: SubscribeBlocks,
    29: BlockUpdate,
}
_KIND_OF = {message: kind for kind, message in KINDS.items()}
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {kind: msgspec.msgpack.Decoder(message) for kind, message in KINDS.items()}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return bytes((VERSION, _KIND_OF[type(message)])) + _ENCODER.encode(message)


def decode(raw: bytes) -> Any:
    """The message in ``raw``.

    Raises:
        ChannelError: its version or kind is unknown, or its body is invalid.
    """
    if len(raw) < 2 or raw[0] != VERSION:
        raise ChannelError(f"message of version {raw[0] if raw else 'none'}, this process speaks {VERSION}")
    decoder = _DECODERS.get(raw[1])
    if decoder is None:
        raise ChannelError(f"message of unknown kind {raw[1]}")
    try:
        return decoder.decode(memoryview(raw)[2:])
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ChannelError(f"malformed {KINDS[raw[1]].__name__}: {error}") from error
