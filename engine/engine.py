"""Place 6 of a request: the engine's loop. It takes requests in, runs the scheduler and the executor, and hands events out."""

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
from engine.policy import FirstComeFirstServed, Policy
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
"""How often arrivals, cancellations and deadlines are handled while new workers start."""
STEP_SMOOTHING = 0.05
"""Weight of the last step in `EngineStats.step_s`."""


class Engine:
    """One scheduler and one executor. `turn` belongs to one thread; `submit`, `cancel`, `stop` and `stats` may be called from any.

    Every request that `submit` accepted ends in exactly one event with a ``finish_reason``, whatever happens. When workers are lost,
    `recover` starts new ones and the requests go on. Without `recover`, or if it raises, all requests end with that error and the engine
    stops.
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
        self._policy: Policy = policy or FirstComeFirstServed()
        self._prefill_budget = PrefillBudget(config, lambda: self._step_cost.line)
        self.scheduler = Scheduler(
            config,
            executor.capacity,
            policy=self._policy,
            listener=listener,
            speculator=speculator,
            prefill_budget=self._prefill_budget,
        )
        self._config = config
        self._expert_balancer = ExpertBalancer(config)
        self._timer = RequestTimer()
        self._recover, self._clock = recover, clock
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._inbox = Inbox(max_waiting=config.max_waiting, policy=self._policy)
        self._num_arrivals_taken = 0
        """Requests taken from the inbox."""
        self._recovery: Future[Executor] | None = None
        """The new workers, while they start."""
        self._fatal_error: EngineError | None = None
        """Why there will be no more steps."""
        self._output = EngineOutput()
        """What the current turn returns."""
        self._num_steps = 0
        self._step_s = 0.0
        self._update_stats()

    # --- from any thread

    def submit(self, request: Request) -> None:
        """Take a request in. An invalid request gets one event, which says what is wrong with it.

        A full queue is mostly reported here, rather than by an event one or two steps later.

        Raises:
            EngineStopped: the engine accepts no more requests.
            QueueFull: the queue accepts no such request now.
        """
        self._inbox.submit(request)

    def cancel(self, request_id: str, choice: int = 0) -> None:
        """End a request. It is no error if it has ended already."""
        self._inbox.cancel((request_id, choice))

    def rebalance_experts(self, threshold: float = 1.0) -> Future[RebalanceResult]:
        """Have the ranks even out the load of their routed experts, between two steps; see `Rebalance.threshold`.

        Running requests go on afterwards. The future fails if the workers are lost before the ranks have answered.

        Raises:
            EngineStopped: the engine accepts nothing any more.
        """
        with self._inbox.while_open():
            return self._expert_balancer.request(threshold)

    def stop(self) -> None:
        """Have `run_forever` end all requests with `EngineStopped`, and return."""
        self._inbox.close()

    @property
    def stats(self) -> EngineStats:
        """As of the last turn, plus the requests submitted since: at no moment is a request missing from the counts."""
        make_stats, num_taken = self._stats
        stats = make_stats()
        return replace(stats, num_waiting=stats.num_waiting + self._inbox.num_submitted - num_taken)

    @property
    def max_in_flight(self) -> int:
        """How many steps may be in flight: at least one for each pipeline stage, so that no stage is idle.

        If the ranks can run ahead, at least two: one more step may wait behind the one being computed, if all decoding sequences are in it.
        """
        capacity = self.executor.capacity
        return max(self._max_unrestricted, 1 + (capacity.runs_ahead and self._config.run_ahead))

    @property
    def _max_unrestricted(self) -> int:
        """How many steps may be in flight whichever sequences they hold."""
        return max(self._config.max_in_flight, self.executor.capacity.num_stages)

    @property
    def is_recovering(self) -> bool:
        """Whether there are no workers right now."""
        return self._recovery is not None

    # --- the engine's thread

    def run_forever(self, deliver: Callable[[EngineOutput], None]) -> None:
        """Run turns until `stop`, sleeping while there is nothing to do. ``deliver`` gets each turn's output unless it is empty.

        Raises:
            EngineError: the workers were lost for good. Every request has got its final event.
        """
        try:
            while not self._inbox.is_closed:
                output = self.turn()
                if output:
                    deliver(output)
                if self._is_idle():
                    self._inbox.wait()
        except Exception as error:
            self._close(deliver, error if isinstance(error, EngineError) else EngineStopped("the engine failed"))
            raise
        self._close(deliver, EngineStopped("this engine has been stopped"))

    def turn(self) -> EngineOutput:
        """Take arrivals, submit steps to the workers, and record the oldest step in flight.

        Raises:
            EngineError: there are no workers and there will be none. The turn before has returned its events.
        """
        if self._fatal_error is not None:
            raise self._fatal_error
        hit("engine.turn")
        self._take_arrivals()
        self._emit(self.scheduler.expire(self._clock()))
        try:
            if self._recovery is not None:
                self._await_workers(self._recovery)
            else:
                self._step()
        except WorkersLost as loss:
            self._lose_workers(loss)
        self._inbox.set_waiting(self.scheduler.queue())
        self._update_stats()
        return self._take_output()

    def _step(self) -> None:
        """Submit as many steps as may be in flight, then wait for the oldest and record it."""
        rebalance = self._expert_balancer.next_rebalance(self._num_steps)
        while rebalance is None and (plan := self._plan_next()):
            self._timer.planned(plan)
            self._in_flight.append((plan, self.executor.submit(plan)))
        self._inbox.set_waiting(self.scheduler.queue())
        if self._in_flight:
            plan, pending = self._in_flight[0]
            result = _checked_result(plan, pending)
            self._in_flight.popleft()
            self._note_step(plan, result)
            hit("engine.apply")
            output = self.scheduler.apply(plan, result)
            self._emit(output.events)
            self._output.token_batches += output.token_batches  # the timer need not see these: neither first nor last tokens
        elif rebalance is not None:
            self._rebalance(rebalance)

    def _plan_next(self) -> StepPlan | None:
        """The next step's plan; None if nothing can run or as many steps are in flight as may be."""
        if len(self._in_flight) >= self.max_in_flight:
            return None
        return self.scheduler.schedule(only_ahead=len(self._in_flight) >= self._max_unrestricted)

    def _rebalance(self, rebalance: Rebalance) -> None:
        """Have the ranks move experts. No step is in flight."""
        plan = StepPlan(self.scheduler.next_step_number(), (), rebalance=rebalance)
        result = _checked_result(plan, self.executor.submit(plan))
        self._expert_balancer.finish(rebalance, result.rebalanced, self._num_steps)

    def _take_arrivals(self) -> None:
        for arrival in self._inbox.take():
            if isinstance(arrival, Request):
                self._admit(arrival)
            else:
                self._emit(self.scheduler.cancel(arrival))

    def _admit(self, request: Request) -> None:
        trace_place(6, request.id)
        self._num_arrivals_taken += 1
        try:
            final_events = self.scheduler.add(request)
            self._output.events += final_events
            if not final_events:
                self._timer.admitted(request)
        except EngineError as error:
            self._output.events.append(rejection(request, error))
        except Exception:  # a request can fail only itself
            logger.exception("request %s could not be admitted", request.id)
            self._output.events.append(rejection(request, EngineError("the engine could not read this request")))

    def _emit(self, events: list[TokenEvent]) -> None:
        self._output.events += self._timer.add_times(events)

    def _take_output(self) -> EngineOutput:
        output, self._output = self._output, EngineOutput()
        return output

    def _is_idle(self) -> bool:
        if self._fatal_error is not None:  # there is an end to report, whether anybody waits for a token or not
            return False
        is_busy = self._in_flight or self._recovery is not None or self.scheduler.num_requests or self._expert_balancer.has_requests
        return not is_busy and self._inbox.is_empty()

    def _close(self, deliver: Callable[[EngineOutput], None], error: EngineError) -> None:
        """Accept no more requests, and end those that were accepted with ``error``."""
        self.stop()
        self._in_flight.clear()
        self._take_arrivals()
        self._expert_balancer.fail_all(error)
        self._emit(self.scheduler.fail_all(error))
        self._update_stats()
        try:
            if self._output:
                deliver(self._take_output())
        finally:
            if self._recovery is not None:
                _close_when_started(self._recovery)

    # --- recovery

    def _lose_workers(self, loss: WorkersLost) -> None:
        """Rewind all sequences and start new workers in another thread, so that cancellations and deadlines are handled meanwhile."""
        logger.error("the workers are lost: %s", loss)
        self._in_flight.clear()
        self._expert_balancer.fail_all(loss)
        if self._recover is None:
            self._fatal_error = loss
            return
        self._emit(self.scheduler.lose_workers(from_outside=loss.from_outside))
        self._recovery = Future()
        threading.Thread(target=_run_recovery, args=(self._recovery, self._recover, loss), name="recovery", daemon=True).start()

    def _await_workers(self, recovery: Future[Executor]) -> None:
        if not wait([recovery], timeout=RECOVERY_POLL_S).done:
            return
        self._recovery = None
        error = recovery.exception()
        if error is None:
            self.executor = recovery.result()
            self._emit(self.scheduler.use_new_workers(self.executor.capacity))
        else:
            self._fatal_error = error if isinstance(error, EngineError) else EngineStopped("no new workers could be started")

    # --- statistics

    def _note_step(self, plan: StepPlan, result: StepResult) -> None:
        self._num_steps += 1
        self._step_cost.note(plan.num_tokens, result.elapsed_s - result.drafting_s)
        if self._speculator is not None and result.drafting_s:
            num_passes = max((work.num_next_draft for work in plan.other_works), default=0) - 1
            self._speculator.note_draft_passes(num_passes, result.drafting_s)
        self._prefill_budget.note(plan, result.elapsed_s)
        self._step_s += (result.elapsed_s - self._step_s) * (STEP_SMOOTHING if self._step_s else 1.0)

    def _update_stats(self) -> None:
        scheduler = self.scheduler
        step_base_s, step_token_s = self._step_cost.line
        pools = [shard.pool for shard in scheduler.shards]
        make_stats = partial(  # takes a third of the time of making the object, which is rarely asked for
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
        self._stats = (make_stats, self._num_arrivals_taken)  # one assignment: a reader in another thread sees both or neither


def rejection(request: Request, error: EngineError) -> TokenEvent:
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


def _checked_result(plan: StepPlan, pending: PendingStep) -> StepResult:
    """Wait for a step and check that the result fits its plan."""
    result = pending.result()
    if result.step != plan.step:
        raise WorkersLost(f"the ranks answered step {result.step} where step {plan.step} was due")
    if result.tokens and len(result.tokens) != COLUMN.itemsize * len(plan.decodes):
        raise WorkersLost(f"the ranks answered step {plan.step} of {len(plan.decodes)} tokens with {len(result.tokens)} bytes")
    return result


def _run_recovery(recovery: Future[Executor], recover: Recover, loss: WorkersLost) -> None:
    try:
        recovery.set_result(recover(loss))
    except Exception as error:
        logger.exception("no new workers")
        recovery.set_exception(error)


def _close_when_started(recovery: Future[Executor]) -> None:
    """End workers that started too late to be used. Nothing else refers to them."""
    wait([recovery])
    if recovery.exception() is None:
        recovery.result().close()
