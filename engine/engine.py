"""Step 6 of a request: take it in, turn the scheduler and the executor, hand out what happened."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial

from engine.config import EngineConfig
from engine.draft.factory import make_speculator
from engine.draft.speculator import Speculator
from engine.errors import EngineError, EngineStopped, WorkersLost
from engine.executor import Executor, PendingStep
from engine.expert_balancer import ExpertBalancer
from engine.failpoints import hit
from engine.inbox import Inbox
from engine.kv.block_pool import BlockListener
from engine.output import EngineOutput
from engine.plan import COLUMN, Rebalance, RebalanceResult, StepPlan, StepResult, TokenEvent
from engine.policy import FirstCome, Policy
from engine.prefill_budget import PrefillBudget
from engine.request import Request
from engine.request_timer import RequestTimer
from engine.request_trace import trace_place
from engine.scheduler import Scheduler
from engine.stats import EngineStats
from engine.step_cost import StepCost

logger = logging.getLogger(__name__)

Recover = Callable[[WorkersLost], Executor]
RECOVERY_POLL_S = 0.02
"""While new workers start, how often arrivals, cancellations and deadlines are looked at."""
STEP_SMOOTHING = 0.05


class Engine:
    """One scheduler and one executor. `turn` belongs to one thread; `submit`, `cancel`, `stop` and `stats` to any.

    Every request that `submit` took ends in exactly one event with a ``finish_reason``, whatever happens. Lost workers are
    replaced by `recover`, and the requests go on; without it, or when it raises, they all end with that error and the engine
    is stopped.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        recover: Recover | None = None,
        policy: Policy | None = None,
        listener: BlockListener | None = None,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.executor = executor
        self._step_cost = StepCost()
        self._speculator = speculator = speculator or make_speculator(config, lambda: self._step_cost.line)
        self._policy: Policy = policy or FirstCome()
        self._pace = PrefillBudget(config, lambda: self._step_cost.line)
        self.scheduler = Scheduler(
            config, executor.capacity, policy=self._policy, listener=listener, speculator=speculator, pace=self._pace
        )
        self._config = config
        self._expert_balancer = ExpertBalancer(config)
        self._timer = RequestTimer()
        self._recover, self._clock = recover, clock
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._inbox = Inbox(max_waiting=config.max_waiting, policy=self._policy)
        self._num_taken = 0
        """Requests, of those that the door let in."""
        self._recovery: Future[Executor] | None = None
        self._end: EngineError | None = None
        """Why no further step will be taken."""
        self._outbox = EngineOutput()
        self._num_steps = 0
        self._step_s = 0.0
        self._note_stats()

    # --- from any thread

    def submit(self, request: Request) -> None:
        """Take a request in. What is wrong with it is told by its only event.

        Whom the queue has no place for is mostly told so here, and not only after the step that is under way and the one after it.

        Raises:
            EngineStopped: the engine takes nothing any more.
            QueueFull: nobody like this may wait now.
        """
        self._inbox.submit(request)

    def cancel(self, request_id: str, choice: int = 0) -> None:
        """End a request; it is no error if it has ended already."""
        self._inbox.cancel((request_id, choice))

    def rebalance_experts(self, threshold: float = 1.0) -> Future[RebalanceResult]:
        """Have the ranks even out what their routed experts have to do, between two steps; see `Rebalance.threshold`.

        Requests go on afterwards as if nothing had been. The future fails if the ranks are lost over it.

        Raises:
            EngineStopped: the engine takes nothing any more.
        """
        with self._inbox.held_open():
            return self._expert_balancer.request(threshold)

    def stop(self) -> None:
        """Have `run_forever` end all requests with `EngineStopped`, and return."""
        self._inbox.close()

    @property
    def stats(self) -> EngineStats:
        """As of the last turn, and with what was submitted since: a request is at no moment in neither."""
        noted, num_taken = self._noted
        stats = noted()
        return replace(stats, num_waiting=stats.num_waiting + self._inbox.num_submitted - num_taken)

    @property
    def max_in_flight(self) -> int:
        """Steps under way at the same time at most: one for every pipeline stage at least, else stages would stand idle, and one that
        waits behind the one that is computed, where ranks can go on without an answer and everybody who decodes is in it."""
        capacity = self.executor.capacity
        return max(self._num_of_anything, 1 + (capacity.runs_ahead and self._config.run_ahead))

    @property
    def _num_of_anything(self) -> int:
        """Of those, how many may hold whatever is ready when they are planned."""
        return max(self._config.max_in_flight, self.executor.capacity.num_stages)

    @property
    def is_recovering(self) -> bool:
        """Whether there are no workers right now."""
        return self._recovery is not None

    # --- the engine's thread

    def run_forever(self, deliver: Callable[[EngineOutput], None]) -> None:
        """Turn until `stop`, sleeping while there is nothing to do. ``deliver`` gets each turn's events, never none.

        Raises:
            EngineError: the workers were lost for good; every request has been told.
        """
        try:
            while not self._inbox.is_closed:
                events = self.turn()
                if events:
                    deliver(events)
                if self._is_idle():
                    self._inbox.wait()
        except Exception as error:
            self._close(deliver, error if isinstance(error, EngineError) else EngineStopped("the engine failed"))
            raise
        self._close(deliver, EngineStopped("this engine has been stopped"))

    def turn(self) -> EngineOutput:
        """Take arrivals, keep the workers busy, and record the oldest step that is under way.

        Raises:
            EngineError: there are no workers and there will be none; the turn before has returned its events.
        """
        if self._end is not None:
            raise self._end
        hit("engine.turn")
        self._take_arrivals()
        self._tell(self.scheduler.expire(self._clock()))
        try:
            if self._recovery is not None:
                self._await_workers(self._recovery)
            else:
                self._step()
        except WorkersLost as loss:
            self._lose_workers(loss)
        self._inbox.show(self.scheduler.queue())
        self._note_stats()
        return self._take_outbox()

    def _step(self) -> None:
        rebalance = self._expert_balancer.next_rebalance(self._num_steps)
        while rebalance is None and (plan := self._plan_next()):
            self._timer.planned(plan)
            self._in_flight.append((plan, self.executor.submit(plan)))
        self._inbox.show(self.scheduler.queue())
        if self._in_flight:
            plan, pending = self._in_flight[0]
            result = _answer(plan, pending)
            self._in_flight.popleft()
            self._note_step(plan, result)
            hit("engine.apply")
            output = self.scheduler.apply(plan, result)
            self._tell(output.events)
            self._outbox.token_batches += output.token_batches  # who is in there has had its first token, and not its last
        elif rebalance is not None:
            self._rebalance(rebalance)

    def _plan_next(self) -> StepPlan | None:
        """None where as many steps are under way as may be."""
        if len(self._in_flight) >= self.max_in_flight:
            return None
        return self.scheduler.schedule(only_ahead=len(self._in_flight) >= self._num_of_anything)

    def _rebalance(self, rebalance: Rebalance) -> None:
        """Experts change places while no step is under way."""
        plan = StepPlan(self.scheduler.number_step(), (), rebalance=rebalance)
        result = _answer(plan, self.executor.submit(plan))
        self._expert_balancer.finish(rebalance, result.rebalanced, self._num_steps)

    def _take_arrivals(self) -> None:
        for arrival in self._inbox.take():
            if isinstance(arrival, Request):
                self._admit(arrival)
            else:
                self._tell(self.scheduler.cancel(arrival))

    def _admit(self, request: Request) -> None:
        trace_place(6, request.id)
        self._num_taken += 1
        try:
            whole_already = self.scheduler.add(request)
            self._outbox.events += whole_already
            if not whole_already:
                self._timer.admitted(request)
        except EngineError as error:
            self._outbox.events.append(refusal(request, error))
        except Exception:  # a request can fail only itself
            logger.exception("request %s could not be admitted", request.id)
            self._outbox.events.append(refusal(request, EngineError("the engine could not read this request")))

    def _lose_workers(self, loss: WorkersLost) -> None:
        """Rewind everything and have new workers started beside this thread, so that cancels and deadlines are still heard."""
        logger.error("the workers are lost: %s", loss)
        self._in_flight.clear()
        self._expert_balancer.fail_all(loss)
        if self._recover is None:
            self._end = loss
            return
        self._tell(self.scheduler.lose_workers(from_outside=loss.from_outside))
        self._recovery = Future()
        threading.Thread(target=_fulfil, args=(self._recovery, self._recover, loss), name="recovery", daemon=True).start()

    def _await_workers(self, recovery: Future[Executor]) -> None:
        if not wait([recovery], timeout=RECOVERY_POLL_S).done:
            return
        self._recovery = None
        error = recovery.exception()
        if error is None:
            self.executor = recovery.result()
            self._tell(self.scheduler.adopt(self.executor.capacity))
        else:
            self._end = error if isinstance(error, EngineError) else EngineStopped("no new workers could be started")

    def _tell(self, events: list[TokenEvent]) -> None:
        self._outbox.events += self._timer.add_times(events)

    def _take_outbox(self) -> EngineOutput:
        output, self._outbox = self._outbox, EngineOutput()
        return output

    def _is_idle(self) -> bool:
        is_busy = self._in_flight or self._recovery is not None or self.scheduler.num_requests or self._expert_balancer.has_requests
        return not is_busy and self._inbox.is_empty()

    def _close(self, deliver: Callable[[EngineOutput], None], error: EngineError) -> None:
        """Nothing more is taken; what was taken is told."""
        self.stop()
        self._in_flight.clear()
        self._take_arrivals()
        self._expert_balancer.fail_all(error)
        self._tell(self.scheduler.fail_all(error))
        self._note_stats()
        try:
            if self._outbox:
                deliver(self._take_outbox())
        finally:
            if self._recovery is not None:
                _close_when_done(self._recovery)

    def _note_step(self, plan: StepPlan, result: StepResult) -> None:
        self._num_steps += 1
        self._step_cost.note(plan.num_tokens, result.elapsed_s - result.drafting_s)
        if self._speculator is not None and result.drafting_s:
            self._speculator.note_guessing(max((work.num_next_draft for work in plan.other_works), default=0) - 1, result.drafting_s)
        self._pace.note(plan, result.elapsed_s)
        self._step_s += (result.elapsed_s - self._step_s) * (STEP_SMOOTHING if self._step_s else 1.0)

    def _note_stats(self) -> None:
        scheduler = self.scheduler
        step_base_s, step_token_s = self._step_cost.line
        pools = [shard.pool for shard in scheduler.shards]
        noted = partial(  # a third of the time of making an object that mostly nobody asks for
            EngineStats,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            prefill_tokens=scheduler.prefill_tokens,
            blocks_used=sum(pool.num_used for pool in pools),
            blocks_cached=sum(pool.num_cached for pool in pools),
            blocks_free=sum(pool.num_free for pool in pools),
            num_steps=self._num_steps,
            num_finished=scheduler.num_finished,
            num_preemptions=scheduler.num_preemptions,
            num_losses=scheduler.num_losses,
            computed_tokens=scheduler.computed_tokens,
            sampled_tokens=scheduler.sampled_tokens,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            expert_moves=self._expert_balancer.num_moved,
            expert_imbalance=self._expert_balancer.imbalance,
            step_base_s=step_base_s,
            step_token_s=step_token_s,
            step_s=self._step_s,
        )
        self._noted = (noted, self._num_taken)  # one assignment: a reader in another thread sees both or neither


def _answer(plan: StepPlan, pending: PendingStep) -> StepResult:
    result = pending.result()
    if result.step != plan.step:
        raise WorkersLost(f"the ranks answered step {result.step} where step {plan.step} was due")
    if result.tokens and len(result.tokens) != COLUMN.itemsize * len(plan.decodes):
        raise WorkersLost(f"the ranks answered step {plan.step} of {len(plan.decodes)} tokens with {len(result.tokens)} bytes")
    return result


def refusal(request: Request, error: EngineError) -> TokenEvent:
    """The only event of a request that was not admitted."""
    return TokenEvent(
        request_id=request.id,
        choice=request.choice,
        attempt=request.attempt,
        offset=len(request.committed),
        finish_reason="error",
        error_kind=type(error).__name__,
        error_message=str(error),
    )


def _close_when_done(recovery: Future[Executor]) -> None:
    """Workers that come too late are ended: nobody else knows of them."""
    wait([recovery])
    if recovery.exception() is None:
        recovery.result().close()


def _fulfil(recovery: Future[Executor], recover: Recover, loss: WorkersLost) -> None:
    try:
        recovery.set_result(recover(loss))
    except Exception as error:
        logger.exception("no new workers")
        recovery.set_exception(error)
