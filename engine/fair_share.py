"""Fair scheduling of tenants in proportion to their shares, whatever they ask for: virtual token counters (arXiv 2401.00588).

Every token computed for a tenant advances its counter, by less the larger its share is. The tenant with the lowest counter is admitted
next. When a tenant comes back from a pause, its counter is raised to a little below the lowest of the others, so a pause saves up little.
So a tenant that asks for less than its share is always served first, however many requests of others wait, and the last of `max_running`
are reserved for it while it is active (`engine.admission`), so that it need not wait for another request to end.
With one tenant this is first come, first served.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator

from engine.policy import QueuedRequest, SortKey
from engine.request import Request
from engine.sequence import Sequence

PROMPT_COST = 1.0
OUTPUT_COST = 2.0
"""Cost of a token (the paper's weights). An output token is computed alone in its sequence's step, prompt tokens many at once."""
MAX_CREDIT = 40_000.0
"""How far below the others a returning tenant's counter may be, for a share of 1: some dozens of requests of a usual length. So a tenant
that stays below its share on average, but not in every second, stays first. Without it, a tenant that sometimes has nothing waiting would
take turns with those that always have, whatever it used before."""
RESERVE_GAP = MAX_CREDIT / 8
"""A tenant's counter must be this far below another's, for a share of 1, for the last of `max_running` to be reserved. Among equals
nothing is reserved."""
ACTIVE_COST = 1_000_000.0
"""A tenant counts as active until this cost has been computed for all tenants since it was last served: half a minute of a busy GPU."""
MAX_QUEUE_FACTOR = 2
"""With many tenants the waiting queue may grow to this many times its limit, because each tenant's part of it is kept for that tenant."""
MAX_COUNTERS = 10_000
"""Counters kept for tenants that may return. Beyond that, the lowest are dropped; such a tenant may get a head start again."""


class FairShare:
    """A `Policy`. Within a tenant the lower priority number comes first, then the earlier arrival."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last_active: dict[str, float] = {}
        """By tenant: `_total` when it last arrived or was served."""
        self._shares: dict[str, float] = {}
        """By tenant: the share in its last request."""
        self._total = 0.0
        """Cost computed for all tenants so far."""
        self._last_admitted = ""
        """The tenant that was admitted last."""

    def sort_key(self, sequence: Sequence) -> SortKey:
        return (self.served(sequence.request.tenant), sequence.request.priority, sequence.arrival)

    def admission_order(self, waiting: Collection[Sequence]) -> Iterator[Sequence]:
        """Each time the first sequence of the tenant served least by then: each admission is charged before the next one is chosen."""
        queues: defaultdict[str, list[Sequence]] = defaultdict(list)
        for sequence in sorted(waiting, key=lambda one: (one.request.priority, one.arrival), reverse=True):
            queues[sequence.request.tenant].append(sequence)
        while queues:
            tenant = min(queues, key=lambda one: self.sort_key(queues[one][-1]))
            yield queues[tenant].pop()
            if not queues[tenant]:
                del queues[tenant]

    def must_leave_reserve(self, sequence: Sequence) -> bool:
        """True if another active tenant has clearly been served less."""
        own, since = self.served(sequence.request.tenant), self._total - ACTIVE_COST
        return any(
            served + RESERVE_GAP / self._shares[tenant] < own and self._last_active[tenant] >= since
            for tenant, served in self._served.items()
        )

    def may_queue(self, request: Request, waiting: Collection[QueuedRequest], limit: int) -> bool:
        """Each tenant can always use its part of the queue, however full others have made it."""
        if len(waiting) < limit:
            return True
        shares = {one.request.tenant: one.request.share for one in waiting} | {request.tenant: request.share}
        part = limit * request.share / sum(shares.values())
        own = sum(one.request.tenant == request.tenant for one in waiting)
        return own < part and len(waiting) < MAX_QUEUE_FACTOR * limit

    def on_arrival(self, sequence: Sequence, waiting: Collection[Sequence]) -> None:
        tenant = sequence.request.tenant
        self._last_active[tenant], self._shares[tenant] = self._total, sequence.request.share
        others = {one.request.tenant for one in waiting}
        if tenant in others:
            return
        floor = min((self.served(other) for other in others), default=self.served(self._last_admitted))
        self._served[tenant] = max(self.served(tenant), floor - MAX_CREDIT / sequence.request.share)
        if len(self._served) > MAX_COUNTERS:
            self._drop_counters(floor, kept=others | {tenant, self._last_admitted})

    def on_admission(self, sequence: Sequence) -> None:
        self._last_admitted = sequence.request.tenant
        self._charge(sequence.request, PROMPT_COST * (len(sequence.tokens) - sequence.num_computed))

    def on_sampled(self, request: Request, num_tokens: int) -> None:
        self._charge(request, OUTPUT_COST * num_tokens)

    def served(self, tenant: str) -> float:
        """The tenant's counter: cost computed for it, divided by its share."""
        return self._served.get(tenant, 0.0)

    def _charge(self, request: Request, cost: float) -> None:
        self._total += cost
        self._last_active[request.tenant], self._shares[request.tenant] = self._total, request.share
        self._served[request.tenant] = self.served(request.tenant) + cost / request.share

    def _drop_counters(self, floor: float, kept: set[str]) -> None:
        for tenant in [one for one, served in self._served.items() if served <= floor and one not in kept]:
            del self._served[tenant], self._last_active[tenant], self._shares[tenant]
