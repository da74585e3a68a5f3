"""Step 8 of a request without processes: an executor whose one rank lives here."""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.plan import StepPlan, StepResult
from engine.run.runner import Runner
from engine.run.settings import RunnerConfig
from engine.run.start import OnProgress, start_rank
from parallel.topology import Topology


class DoneStep:
    """A step that is over: its result, or how the rank was lost in it."""

    def __init__(self, outcome: StepResult | WorkersLost) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        if isinstance(self._outcome, WorkersLost):
            raise self._outcome
        return self._outcome


class LocalExecutor:
    """One rank in this process; `submit` returns when the step is done. An `engine.executor.Executor`."""

    def __init__(self, runner: Runner, on_close: Callable[[], None] = lambda: None) -> None:
        self._runner: Runner | None = runner
        self._capacity = replace(runner.capacity, runs_ahead=False)  # a step is over when `submit` returns: nothing would be gained
        self._on_close = on_close

    @classmethod
    def open(
        cls,
        checkpoint_folder: Path | str,
        *,
        runner_config: RunnerConfig | None = None,
        engine_config: EngineConfig | None = None,
        on_progress: OnProgress | None = None,
    ) -> "LocalExecutor":
        """Load a checkpoint into this process. Raises what `start_rank` raises."""
        with ExitStack() as stack:
            runner = stack.enter_context(
                start_rank(
                    checkpoint_folder=checkpoint_folder,
                    topology=Topology(),
                    rank=0,
                    rendezvous=None,
                    runner_config=runner_config or RunnerConfig(),
                    engine_config=engine_config or EngineConfig(),
                    on_progress=on_progress,
                )
            )
            return cls(runner, on_close=stack.pop_all().close)

    def __repr__(self) -> str:
        return f"<LocalExecutor {self._runner or 'closed'}>"

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> DoneStep:
        if self._runner is None:
            return DoneStep(WorkersLost(f"step {plan.step} was submitted after the end of the rank", rank=0))
        try:
            result = self._runner.run(plan)
            assert result is not None  # the only rank samples
            return DoneStep(result)
        except Exception as error:
            self.close()  # as with ranks elsewhere: what raised in a step cannot be trusted with another
            lost = WorkersLost(f"{type(error).__name__} in step {plan.step}: {error}", rank=0, rank_traceback=traceback.format_exc())
            lost.__cause__ = error
            return DoneStep(lost)

    def close(self) -> None:
        if self._runner is not None:
            self._runner = None
            self._on_close()
