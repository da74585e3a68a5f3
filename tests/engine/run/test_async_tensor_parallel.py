"""Tensor-parallel ranks that continue with a token that only one of them has sampled: the same answers, launched and replayed."""

from pathlib import Path

import pytest
import torch.distributed as dist

from engine.engine import Engine
from engine.plan import NO_TOKEN, StepPlan
from engine.request import Request
from engine.run.local_executor import LocalExecutor, LocalStep
from engine.run.runner import Runner
from engine.run.warm_up import capture
from parallel.groups import ParallelGroups
from parallel.topology import Topology
from tests.engine.run.capturable_ranks import record_collectives, use_capturable_parts
from tests.engine.run.test_async_steps import UNDECIDED
from tests.engine.run.test_decode_graphs import PLAIN, _runner_of_rank
from tests.engine.run.test_end_to_end import PROMPTS, SAMPLING, answer, serve
from tests.engine.run.tiny_models import engine_config
from tests.fakes.graphs import RecordedGraphs
from tests.ranks import run_ranks

CONFIG = engine_config(max_running=6, max_step_tokens=24)  # prompts are chunked, and their chunks come beside decodes
REQUESTS = [
    Request(id=str(number), prompt=PROMPTS[number % len(PROMPTS)][:30], sampling=sampling)
    for number, sampling in enumerate([*PLAIN, *SAMPLING, *(one.sampling for one in UNDECIDED)])
]
Answers = dict[tuple[str, int], tuple[int, ...]]


class Leading:
    """The first rank in this process, as an executor. The others get every plan before it starts it."""

    def __init__(self, runner: Runner, groups: ParallelGroups) -> None:
        self._executor, self._groups = LocalExecutor(runner), groups
        self.capacity = runner.capacity
        self.num_promised = self.num_promised_beside_prompts = 0

    def submit(self, plan: StepPlan) -> LocalStep:
        num_promised = int((plan.decodes.columns[2] == NO_TOKEN).sum())
        self.num_promised += num_promised
        self.num_promised_beside_prompts += num_promised if plan.other_works else 0
        told(plan, self._groups)
        return self._executor.submit(plan)

    def close(self) -> None:
        self._executor.close()


def told(plan: StepPlan | None, groups: ParallelGroups) -> StepPlan | None:
    """The first rank's plan, on all ranks. None: there are no more."""
    plans = [plan]
    assert groups.world.transport is not None
    dist.broadcast_object_list(plans, group=groups.world.transport.process_group, group_src=0)
    return plans[0]


def _answers_of_rank(groups: ParallelGroups, folder: Path, runs_ahead: bool, replays: bool) -> tuple[Answers, int, int, int] | None:
    """On the first rank: the answers, how many works lacked their token, how many of those were in mixed steps, and how many replays
    there were."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        record_collectives(monkeypatch)
        monkeypatch.setattr("engine.run.sampling.sampler_graphs.MAX_CANDIDATES", 6)
        runner, graphs = _runner_of_rank(groups, folder, runs_ahead=runs_ahead), RecordedGraphs()
        if replays:
            capture(runner, graphs, CONFIG, prompts_ahead=True)
            graphs.num_replays = 0
        if groups.rank > 0:
            while (plan := told(None, groups)) is not None:
                runner.begin(plan)
            return None
        leading = Leading(runner, groups)
        found = serve(Engine(leading, CONFIG), REQUESTS)
        told(None, groups)
        answers = {key: answer(events) for key, events in found.items()}
        return answers, leading.num_promised, leading.num_promised_beside_prompts, graphs.num_replays


def _of_the_first(folder: Path, topology: Topology, *, runs_ahead: bool, replays: bool) -> tuple[Answers, int, int, int]:
    found = run_ranks(topology, _answers_of_rank, folder, runs_ahead, replays)[0]
    assert found is not None
    return found


@pytest.mark.parametrize("replays", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_continue_with_the_token_that_one_of_them_sampled(dense_folder: Path, replays: bool) -> None:
    """With all kinds of sampling, and in mixed steps. A few candidates do not decide some rows."""
    wanted, *none = _of_the_first(dense_folder, Topology(tp=2), runs_ahead=False, replays=False)
    assert none == [0, 0, 0]
    found, num_promised, num_beside_prompts, num_replays = _of_the_first(dense_folder, Topology(tp=2), runs_ahead=True, replays=replays)
    assert found == wanted
    assert num_promised > 20
    assert num_beside_prompts > 0, "steps that are launched, too"
    assert (num_replays > 20) == replays


@pytest.mark.slow
def test_so_do_expert_parallel_ranks(moe_folder: Path) -> None:
    wanted, *_ = _of_the_first(moe_folder, Topology(tp=2, ep=2), runs_ahead=False, replays=False)
    found, num_promised, _, num_replays = _of_the_first(moe_folder, Topology(tp=2, ep=2), runs_ahead=True, replays=True)
    assert found == wanted
    assert min(num_promised, num_replays) > 20
