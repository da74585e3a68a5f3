"""Steps 4, 5 and 8 of a request: the messages between processes.

A message is two bytes (version, kind) and a msgpack body that msgspec checks against the kind's dataclass.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.errors import ChannelError
from engine.executor import Capacity
from engine.load_stats import LoadStats
from engine.plan import StepPlan, StepResult, TokenEvent
from engine.request import Request

VERSION = 1


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
    """The last message of a rank that raised."""

    rank: int
    host: str
    step: int | None
    message: str
    traceback: str
    was_terminated: bool = False
    """By SIGTERM or Ctrl-C: nothing that it computed need have done it."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A rank is to leave its loop and end."""


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request
    left_s: float | None = None
    """Until its deadline, when it was sent: hosts' clocks differ."""


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
    """Known tokens that are not computed yet."""
    step_base_s: float = 0.0
    step_token_s: float = 0.0
    """See `engine.step_cost.StepCost`."""
    ranks_lost: bool = False
    """Nothing will come before its ranks have been started anew."""
    lost_host: str | None = None
    """The host that took its ranks with it."""


@dataclass(frozen=True, slots=True)
class SubscribeBlocks:
    """A front wants to know what the prefix cache holds, and what changes there; see `BlockUpdate`."""

    wanted: bool


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Shortened content keys of a replica's cached blocks, one behind the other."""

    number: int
    """Each but the whole follows on the number before."""
    whole: bool
    """``stored`` is all there is, as of that number; else it is what has come since the number before."""
    stored: bytes
    evicted: bytes


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What one step yielded for one front: events, or as columns of int64 one more token for each of many streams."""

    events: tuple[TokenEvent, ...]
    streams: bytes = b""
    """As the front named them by `Request.tag`."""
    offsets: bytes = b""
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class FrontDropped:
    """A replica has given a front up, and with it all that the front had sent; what still matters must be sent again."""


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
        ChannelError: it is of another version, of no known kind, or does not fit its kind.
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
