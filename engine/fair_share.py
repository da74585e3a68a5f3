"""Tenants get the engine in proportion to their shares, whatever they ask for: virtual token counters (arXiv 2401.00588).

Every token that is computed for a tenant moves its counter on, by less the larger its share is. The tenant whose counter is
lowest is admitted next. A tenant that comes back from a pause begins a little before the lowest of the others: nobody saves up more.
So one that asks for less than its share is always served first, however many requests of others wait; and the last places to run are
kept for it while it is about (`Admission`), so that it need not wait until one of the others ends.
With one tenant this is first come, first served.
"""

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Listed

from engine.policy import Rank, Waits
from engine.request import Request
from engine.sequence import Sequence

PROMPT_COST = 1.0
OUTPUT_COST = 2.0
"""What a token counts. An output token is computed alone in its sequence's step, prompt tokens many at once (the paper's weights)."""
HEAD_START = 40_000.0
"""What a tenant may have been served less than the others when it comes back, for a share of 1: some dozens of requests of a usual
length, so that one which is below its share on average but not in every second stays first. Without
it a tenant that now and then has nothing waiting would take turns with the ones that always have, whatever it used before."""
CLEARLY_LESS = HEAD_START / 8
"""By so much, for a share of 1, a tenant must have been served less than another for the last places to be kept for it: among equals
nothing is kept."""
ABOUT = 1_000_000.0
"""So long, in tokens computed for all, a tenant is about after the last one that was for it: half a minute of a busy GPU."""
MAX_OVERFULL = 2
"""With many tenants the queue may grow to so many times its limit: each one's part of it is kept free for it."""
MAX_COUNTERS = 10_000
"""Of tenants that may come back. Beyond, those are forgotten that were served least; they may get a head start again."""


class FairShare:
    """A `Policy`. Within a tenant the lower priority number comes first, then the earlier arrival."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        """By tenant: what had been computed for all when it last came or was served."""
        self._shares: dict[str, float] = {}
        """By tenant: as its last request had it."""
        self._total = 0.0
        self._last = ""
        """The tenant that was admitted last."""

    def rank(self, sequence: Sequence) -> Rank:
        return (self.served(sequence.request.tenant), sequence.request.priority, sequence.arrival)

    def order(self, waiting: Listed[Sequence]) -> Iterator[Sequence]:
        """Each time the first of the tenant that has been served least by then: an admission counts before the next is chosen."""
        queues: defaultdict[str, list[Sequence]] = defaultdict(list)
        for sequence in sorted(waiting, key=lambda one: (one.request.priority, one.arrival), reverse=True):
            queues[sequence.request.tenant].append(sequence)
        while queues:
            tenant = min(queues, key=lambda one: self.rank(queues[one][-1]))
            yield queues[tenant].pop()
            if not queues[tenant]:
                del queues[tenant]

    def gives_way(self, sequence: Sequence) -> bool:
        """Where another tenant is about that has clearly been served less."""
        own, since = self.served(sequence.request.tenant), self._total - ABOUT
        return any(
            served + CLEARLY_LESS / self._shares[tenant] < own and self._seen[tenant] >= since for tenant, served in self._served.items()
        )

    def may_wait(self, request: Request, waiting: Listed[Waits], limit: int) -> bool:
        """A tenant's part of the queue is free for it, however full others have made it."""
        if len(waiting) < limit:
            return True
        shares = {one.request.tenant: one.request.share for one in waiting} | {request.tenant: request.share}
        part = limit * request.share / sum(shares.values())
        own = sum(one.request.tenant == request.tenant for one in waiting)
        return own < part and len(waiting) < MAX_OVERFULL * limit

    def arrived(self, sequence: Sequence, waiting: Listed[Sequence]) -> None:
        tenant = sequence.request.tenant
        self._seen[tenant], self._shares[tenant] = self._total, sequence.request.share
        others = {one.request.tenant for one in waiting}
        if tenant in others:
            return
        floor = min((self.served(other) for other in others), default=self.served(self._last))
        self._served[tenant] = max(self.served(tenant), floor - HEAD_START / sequence.request.share)
        if len(self._served) > MAX_COUNTERS:
            self._forget(floor, kept=others | {tenant, self._last})

    def opened(self, sequence: Sequence) -> None:
        self._last = sequence.request.tenant
        self._charge(sequence.request, PROMPT_COST * (len(sequence.tokens) - sequence.num_computed))

    def sampled(self, request: Request, num_tokens: int) -> None:
        self._charge(request, OUTPUT_COST * num_tokens)

    def served(self, tenant: str) -> float:
        """Its counter, in tokens of the prompt's cost, divided by its share."""
        return self._served.get(tenant, 0.0)

    def _charge(self, request: Request, cost: float) -> None:
        self._total += cost
        self._seen[request.tenant], self._shares[request.tenant] = self._total, request.share
        self._served[request.tenant] = self.served(request.tenant) + cost / request.share

    def _forget(self, floor: float, kept: set[str]) -> None:
        for tenant in [one for one, served in self._served.items() if served <= floor and one not in kept]:
            del self._served[tenant], self._seen[tenant], self._shares[tenant]
