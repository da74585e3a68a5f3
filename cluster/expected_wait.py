"""Step 4 of a request: the replica where its first token is to be expected soonest.

Expected is the time for what is queued there and for what of the prompt is not cached there, at the speed that the replica
has measured. A client's session stays where it was unless waiting there would cost more than that is worth.
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
"""Waits that differ by no more than this share count as equal; then the fewer requests decide, then chance."""
UNMEASURED = (0.01, 1e-4)
"""Seconds of a step and of each token in it, where no replica has measured any yet."""


@dataclass(frozen=True, kw_only=True)
class LoadEstimate:
    """What a request would find at a replica."""

    num_requests: int = 0
    """Running and waiting."""
    num_running: int = 0
    prefill_tokens: int = 0
    """Prompt tokens that are still to be computed for those that came before."""
    step_base_s: float = 0.0
    step_token_s: float = 0.0
    """A step of n tokens takes step_base_s + n x step_token_s there; both 0: not measured yet."""

    @property
    def is_measured(self) -> bool:
        return self.step_base_s > 0 or self.step_token_s > 0


def expected_wait_s(load_estimate: LoadEstimate, *, own_tokens: int, step_tokens: int) -> float:
    """Seconds until a request that brings ``own_tokens`` to compute has its first token. Steps hold ``step_tokens`` at most, and in
    each of them whoever is running takes part."""
    work = load_estimate.prefill_tokens + own_tokens
    steps = math.ceil(work / max(1, step_tokens - load_estimate.num_running))
    return steps * (load_estimate.step_base_s + load_estimate.num_running * load_estimate.step_token_s) + work * load_estimate.step_token_s


class RoutableReplica(Protocol):
    """A replica as this policy sees it; `cluster.replica_link.ReplicaLink` is one."""

    @property
    def id(self) -> str: ...
    @property
    def load_estimate(self) -> LoadEstimate: ...
    @property
    def index(self) -> PrefixIndex: ...
    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        """A request with these blocks, of which ``num_tokens`` are to be computed, goes there."""
        ...


Place = TypeVar("Place", bound=RoutableReplica)


@dataclass(frozen=True, slots=True)
class _Option(Generic[Place]):
    place: Place
    load_estimate: LoadEstimate
    own_tokens: int
    wait_s: float


class ExpectedWait:
    """A routing policy. Where no index can be used it takes the better of two by chance: what many fronts know of the load is
    old, and would send all of them to the same replica."""

    def __init__(self, *, block_tokens: int, step_tokens: int, session_worth_s: float, seed: int | None = None) -> None:
        """``block_tokens`` and ``step_tokens``: of a KV block, and of a step at most, at every replica."""
        self._block_tokens, self._step_tokens, self._session_worth_s = block_tokens, step_tokens, session_worth_s
        self._random = random.Random(seed)  # noqa: S311  (no secret)

    def choose(self, candidates: Sequence[Place], request: Request) -> Place:
        """One of ``candidates``, which is told what it may expect."""
        keys = prompt_keys(request, self._block_tokens) if len(candidates) > 1 else ()
        estimates = _all_measured([place.load_estimate for place in candidates])
        options = [self._option(place, load_estimate, request, keys) for place, load_estimate in zip(candidates, estimates, strict=True)]
        if len(options) > 2 and not any(place.index.usable for place in candidates):
            options = self._random.sample(options, 2)
        best = self._best(options, session_replica(candidates, request))
        best.place.expect(keys, best.own_tokens)
        return best.place

    def _option(self, place: Place, load_estimate: LoadEstimate, request: Request, keys: Sequence[bytes]) -> "_Option[Place]":
        own_tokens = len(request.prompt) + len(request.committed) - self._block_tokens * place.index.overlap(keys)
        return _Option(
            place, load_estimate, own_tokens, expected_wait_s(load_estimate, own_tokens=own_tokens, step_tokens=self._step_tokens)
        )

    def _best(self, options: "list[_Option[Place]]", home: Place | None) -> "_Option[Place]":
        costs = [option.wait_s - (self._session_worth_s if option.place is home else 0.0) for option in options]
        least = min(costs)
        margin = TIE_MARGIN * max(option.wait_s for option, cost in zip(options, costs, strict=True) if cost == least)
        equals = [option for option, cost in zip(options, costs, strict=True) if cost <= least + margin]
        fewest = min(option.load_estimate.num_requests for option in equals)
        return self._random.choice([option for option in equals if option.load_estimate.num_requests == fewest])


def _all_measured(estimates: Sequence[LoadEstimate]) -> list[LoadEstimate]:
    """A replica that has not measured its steps yet is taken to be as fast as the others on average."""
    measured = [(load_estimate.step_base_s, load_estimate.step_token_s) for load_estimate in estimates if load_estimate.is_measured] or [
        UNMEASURED
    ]
    base_s, token_s = (sum(part) / len(measured) for part in zip(*measured, strict=True))
    return [
        load_estimate if load_estimate.is_measured else dataclasses.replace(load_estimate, step_base_s=base_s, step_token_s=token_s)
        for load_estimate in estimates
    ]


def session_replica(candidates: Sequence[Place], request: Request) -> Place | None:
    """Where requests of this session go if all else is equal: the same at every front, and for most sessions also after another
    replica has come or gone (rendezvous hashing)."""
    if not request.session:
        return None
    name = f"{request.salt}\0{request.session}\0".encode()
    return max(candidates, key=lambda place: hashlib.blake2b(name + place.id.encode(), digest_size=8).digest())
