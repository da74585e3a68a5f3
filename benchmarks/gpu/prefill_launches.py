"""Compare three ways to run steps with prompts: Triton's launches, quick launches (`parallel.cuda.quick_launch`), and piecewise CUDA graphs
(`engine.run.prompt_graphs`). The second must match the first bit for bit, the third up to rounding."""

import statistics
import time

import torch
from torch import Tensor

from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.cuda_graphs import CudaGraphRecorder
from engine.run.prompt_graphs import SIZES, PromptGraphs
from parallel.native.screened import TopLogits

GREEDY = SamplingParams(temperature=0.0)
MOST = 2e-2
"""Maximum relative error of steps in pieces; see `benchmarks.gpu.graph_replays`."""
STEPS = {"16": (0, (16,)), "64": (0, (64,)), "512": (0, (512,)), "300 of three": (0, (100, 150, 50)), "512 beside 200": (200, (512,))}
"""(number of decoding sequences, tokens of each prompt) by step name."""
CONTEXT, FIRST_DECODING, FIRST_PROMPT_BLOCK, REPEATS = 40, 1 << 20, 1000, 7


class Prompts:
    """Steps of a runner that knows nothing of decoding graphs: they would sample in another way."""

    def __init__(self, served: ServedModel) -> None:
        self._runner, self._vocab_size, self._number = served.runner, served.model.config.vocab_size, 0
        self._block_tokens = served.runner.capacity.block_tokens

    def open_decoding(self, count: int) -> None:
        per_sequence = CONTEXT // self._block_tokens + 1
        works = [
            Work(FIRST_DECODING + n, 0, self._tokens(CONTEXT, n), tuple(range(per_sequence * n, per_sequence * (n + 1))), samples=True)
            for n in range(count)
        ]
        assert per_sequence * count <= FIRST_PROMPT_BLOCK
        self._runner.run(StepPlan(0, tuple(works), tuple(NewSequence(work.sequence, 0, CONTEXT, GREEDY) for work in works)))

    def step(self, decodes: int, lengths: tuple[int, ...]) -> float:
        """Run a step; returns the seconds until its tokens are known."""
        works, opened, block = [Work(FIRST_DECODING + n, CONTEXT, (7,), (), samples=True) for n in range(decodes)], [], FIRST_PROMPT_BLOCK
        for length in lengths:
            self._number += 1
            blocks = tuple(range(block, block + -(-length // self._block_tokens)))
            block += len(blocks)
            works.append(Work(self._number, 0, self._tokens(length, length), blocks, samples=True))
            opened.append(NewSequence(self._number, 0, length, GREEDY))
        plan = StepPlan(0, tuple(works), tuple(opened))
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._runner.run(plan)
        seconds = time.perf_counter() - began
        self._runner.run(StepPlan(0, (), closed=tuple(opening.sequence for opening in opened)))
        return seconds

    def logits(self, decodes: int, lengths: tuple[int, ...]) -> Tensor:
        model, found = self._runner.model, list[Tensor]()
        compute = model.logits

        def watched(hidden_RD: Tensor, sought: TopLogits | None = None) -> Tensor:
            found.append(compute(hidden_RD, sought).clone())
            return found[-1]

        model.logits = watched  # type: ignore[method-assign]
        try:
            self.step(decodes, lengths)
        finally:
            del model.logits
        return found[0]

    def _tokens(self, count: int, seed: int) -> tuple[int, ...]:
        return tuple((at * 7919 + seed * 31 + 13) % self._vocab_size for at in range(count))


def compare(results: Results, name: str, served: ServedModel) -> None:
    """``served`` has captured nothing.

    Raises:
        AssertionError: logits differ, or by more than rounding. Raised after everything was compared.
    """
    from parallel.cuda import quick_launch  # imports triton, which needs a GPU

    prompts, runner, wrong = Prompts(served), served.runner, list[str]()
    prompts.open_decoding(max(decodes for decodes, _ in STEPS.values()))
    began = time.perf_counter()
    pieces = PromptGraphs(served.model, runner.cache, CudaGraphRecorder(runner.device), sizes=SIZES)
    pieces.capture()
    results.add("prompts", f"{name}: {len(SIZES)} numbers of tokens captured", time.perf_counter() - began, "s")
    ways = {"Triton's launches": (False, None), "quick launches": (True, None), "in pieces": (True, pieces)}
    try:
        for step, (decodes, lengths) in STEPS.items():
            logits: dict[str, Tensor] = {}
            for way, (is_quick, graphs) in ways.items():
                results.go_on()
                quick_launch.enable(is_quick)
                runner.forward.prompt_graphs = graphs
                logits[way] = prompts.logits(decodes, lengths)
                seconds = statistics.median(prompts.step(decodes, lengths) for _ in range(REPEATS))
                results.add("prompts", f"{name}: step of {step}, {way}", seconds * 1000, "ms")
            wanted, quick, in_pieces = logits.values()
            error = float((in_pieces.double() - wanted.double()).norm() / wanted.double().norm())
            results.add("prompts", f"{name}: logits of {step} in pieces, error", error, "relative")
            if not torch.equal(wanted, quick):
                wrong.append(f"{name}: quick launches of {step} give other logits")
            if not error < MOST:  # as NaN is
                wrong.append(f"{name}: logits of {step} in pieces are off by {error:.2g}")
    finally:
        quick_launch.enable(False)
        runner.forward.prompt_graphs = None
        pieces.release()
    assert not wrong, "; ".join(wrong)
