"""Place 4 of a request: the routing policy that chooses the replica with the shortest expected time to first token.

The estimate is the time for the tokens queued at a replica and for those of the prompt that are not in its prefix cache, at the speed that
the replica has measured. A session stays with its replica unless that would take longer by more than `session_worth_s`.
"""

import dataclasses
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cluster.prefix_index import PrefixIndex, prompt_keys
from engine.request import Request

TIE_MARGIN = 0.02
"""Waits that differ by no more than this fraction count as equal. Ties go to the replica with fewer requests, then to a random one."""
DEFAULT_STEP_COST = (0.01, 1e-4)
"""Seconds per step and per token in it, if no replica has measured them yet."""


@dataclass(frozen=True, kw_only=True)
class LoadEstimate:
    """The load that a request would find at a replica."""

    num_requests: int = 0
    """Running and waiting requests."""
    num_running: int = 0
    prefill_tokens: int = 0
    """Tokens still to prefill for earlier requests."""
    step_base_s: float = 0.0
    step_token_s: float = 0.0
    """A step of n tokens takes step_base_s + n x step_token_s. Both are 0 until measured."""

    @property
    def is_measured(self) -> bool:
        return self.step_base_s > 0 or self.step_token_s > 0


def expected_wait_s(load_estimate: LoadEstimate, *, own_tokens: int, step_tokens: int) -> float:
    """Seconds to the first token of a request with ``own_tokens`` to prefill. A step has at most ``step_tokens`` tokens, and one of them
    for each running request."""
    work = load_estimate.prefill_tokens + own_tokens
    steps = math.ceil(work / max(1, step_tokens - load_estimate.num_running))
    return steps * (load_estimate.step_base_s + load_estimate.num_running * load_estimate.step_token_s) + work * load_estimate.step_token_s


class RoutableReplica(Protocol):
    """A replica as this policy sees it, such as `cluster.replica_link.ReplicaLink`."""

    @property
    def id(self) -> str: ...
    @property
    def load_estimate(self) -> LoadEstimate: ...
    @property
    def index(self) -> PrefixIndex: ...
    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        """A request whose prompt has blocks with these keys, and ``num_tokens`` to compute, is sent there."""
        ...


Replica = TypeVar("Replica", bound=RoutableReplica)


@dataclass(frozen=True, slots=True)
class _Option(Generic[Replica]):
    replica: Replica
    load_estimate: LoadEstimate
    own_tokens: int
    wait_s: float


class ExpectedWait:
    """A routing policy. If no prefix index is usable it takes the better of two random replicas: the load that fronts know is out of
    date, and would send all fronts to the same replica."""

    def __init__(self, *, block_tokens: int, step_tokens: int, session_worth_s: float, seed: int | None = None) -> None:
        """``block_tokens``: tokens of a KV block; ``step_tokens``: most tokens of a step. Both are the same at all replicas."""
        self._block_tokens, self._step_tokens, self._session_worth_s = block_tokens, step_tokens, session_worth_s
        self._random = random.Random(seed)  # noqa: S311  (no secret)

    def choose(self, candidates: Sequence[Replica], request: Request) -> Replica:
        """Choose one of ``candidates``, and record there what it is going to compute."""
        keys = prompt_keys(request, self._block_tokens) if len(candidates) > 1 else ()
        estimates = _fill_unmeasured([replica.load_estimate for replica in candidates])
        options = [
            self._option(replica, load_estimate, request, keys) for replica, load_estimate in zip(candidates, estimates, strict=True)
        ]
        if len(options) > 2 and not any(replica.index.usable for replica in candidates):
            options = self._random.sample(options, 2)
        best = self._best(options, session_replica(candidates, request))
        best.replica.expect(keys, best.own_tokens)
        return best.replica

    def _option(self, replica: Replica, load_estimate: LoadEstimate, request: Request, keys: Sequence[bytes]) -> "_Option[Replica]":
        own_tokens = len(request.prompt) + len(request.committed) - self._block_tokens * replica.index.overlap(keys)
        return _Option(
            replica, load_estimate, own_tokens, expected_wait_s(load_estimate, own_tokens=own_tokens, step_tokens=self._step_tokens)
        )

    def _best(self, options: "list[_Option[Replica]]", preferred: Replica | None) -> "_Option[Replica]":
        costs = [option.wait_s - (self._session_worth_s if option.replica is preferred else 0.0) for option in options]
        least = min(costs)
        margin = TIE_MARGIN * max(option.wait_s for option, cost in zip(options, costs, strict=True) if cost == least)
        equals = [option for option, cost in zip(options, costs, strict=True) if cost <= least + margin]
        fewest = min(option.load_estimate.num_requests for option in equals)
        return self._random.choice([option for option in equals if option.load_estimate.num_requests == fewest])


def _fill_unmeasured(estimates: Sequence[LoadEstimate]) -> list[LoadEstimate]:
    """Give replicas that have not measured their steps yet the average cost of the others."""
    measured = [(load_estimate.step_base_s, load_estimate.step_token_s) for load_estimate in estimates if load_estimate.is_measured] or [
        DEFAULT_STEP_COST
    ]
    base_s, token_s = (sum(part) / len(measured) for part in zip(*measured, strict=True))
    return [
        load_estimate if load_estimate.is_measured else dataclasses.replace(load_estimate, step_base_s=base_s, step_token_s=token_s)
        for load_estimate in estimates
    ]


def session_replica(candidates: Sequence[Replica], request: Request) -> Replica | None:
    """The replica that a session prefers. All fronts agree on it, and for most sessions it stays the same when another replica comes or
    goes (rendezvous hashing)."""
    if not request.session:
        return None
    name = f"{request.salt}\0{request.session}\0".encode()
    return max(candidates, key=lambda replica: hashlib.blake2b(name + replica.id.encode(), digest_size=8).digest())
