"""CPU time of the control plane per step: the engine's own work, with simulated ranks that answer immediately."""

import statistics
import time

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.request import Request, SamplingParams
from engine.shard_results import pack_tokens

SEQUENCES = 256
PROMPT_TOKENS = 128
STEPS = 200


class InstantRanks:
    """An executor that gives every sequence a token at once. Its own CPU time is measured, so that it can be subtracted."""

    capacity = Capacity(num_blocks=SEQUENCES * 64, block_tokens=16, max_context_tokens=1024)
    spent_s = 0.0

    def submit(self, plan: StepPlan) -> "_Answered":
        started = time.thread_time()
        tokens, rest = pack_tokens(plan.decodes, [SampledTokens(work.sequence, (1,)) for work in plan.works if work.samples])
        answer = _Answered(StepResult(plan.step, rest, 0.0, tokens=tokens))
        self.spent_s += time.thread_time() - started
        return answer

    def close(self) -> None:
        pass


class _Answered:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def control_plane_s(sequences: int = SEQUENCES, steps: int = STEPS) -> float:
    """CPU seconds of this thread per step with ``sequences`` decoding sequences. The median, so that other programs matter little."""
    ranks = InstantRanks()
    engine = Engine(ranks, EngineConfig(max_running=sequences, max_step_tokens=sequences * PROMPT_TOKENS))
    sampling = SamplingParams(temperature=0.0, max_tokens=steps + 8)
    for number in range(sequences):
        prompt = tuple(1000 * number + place for place in range(PROMPT_TOKENS))
        engine.submit(Request(id=str(number), prompt=prompt, sampling=sampling))
    engine.turn()
    took = []
    for _ in range(steps):
        started, answering_s = time.thread_time(), ranks.spent_s
        events = engine.turn()
        took.append(time.thread_time() - started - (ranks.spent_s - answering_s))
        assert len(events) == sequences
    return statistics.median(took)
