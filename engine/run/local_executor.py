"""An executor whose only rank is in this process. Place 8 of a request without other processes."""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.plan import StepPlan, StepResult
from engine.run.runner import Runner
from engine.run.settings import RunnerConfig
from engine.run.start import OnProgress, start_rank
from engine.step_handle import StepHandle
from parallel.topology import Topology


class LocalStep:
    """A step that the rank has begun, or the error by which the rank was lost."""

    def __init__(self, executor: "LocalExecutor", step: int, begun: StepHandle | WorkersLost) -> None:
        self._executor, self._step, self._begun = executor, step, begun

    def result(self) -> StepResult:
        if isinstance(self._begun, WorkersLost):
            raise self._begun
        try:
            result = self._begun.result()
        except Exception as error:
            raise self._executor.fail(self._step, error) from error
        assert result is not None  # the only rank samples
        return result


class LocalExecutor:
    """One rank in this process. On a CPU a step is finished when `submit` returns. An `engine.executor.Executor`."""

    def __init__(self, runner: Runner, on_close: Callable[[], None] = lambda: None) -> None:
        self._runner: Runner | None = runner
        self._capacity = runner.capacity
        self._on_close = on_close

    @classmethod
    def open(
        cls,
        checkpoint_folder: Path | str,
        *,
        runner_config: RunnerConfig | None = None,
        engine_config: EngineConfig | None = None,
        adapter: Path | str | None = None,
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
                    adapter=adapter,
                    on_progress=on_progress,
                )
            )
            return cls(runner, on_close=stack.pop_all().close)

    def __repr__(self) -> str:
        return f"<LocalExecutor {self._runner or 'closed'}>"

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> LocalStep:
        if self._runner is None:
            return LocalStep(self, plan.step, WorkersLost(f"step {plan.step} was submitted after the end of the rank", rank=0))
        try:
            return LocalStep(self, plan.step, self._runner.begin(plan))
        except Exception as error:
            return LocalStep(self, plan.step, self.fail(plan.step, error))

    def fail(self, step: int, error: Exception) -> WorkersLost:
        """End the rank, as other executors do: after an exception its state cannot be trusted."""
        self.close()
        lost = WorkersLost(f"{type(error).__name__} in step {step}: {error}", rank=0, rank_traceback=traceback.format_exc())
        lost.__cause__ = error
        return lost

    def close(self) -> None:
        if self._runner is not None:
            self._runner = None
            self._on_close()
